"""Which rows of a test with several arguments `make test` runs; the others are marked `deep` and run in `make test-deep`.

A test over backends x losses x dtypes x layouts has hundreds of rows, and a wrong formula fails in many of them. A defect that
needs one value of one argument, or a certain pair of values of two arguments, is found by a few rows that hold every pair.
`@pytest.mark.covering(1)` on a test says that single values suffice: the arguments do not act on each other there, or another
test has their pairs.
"""

from itertools import combinations


def covering(rows, strength):
    """The indices of some of `rows`, as few as a greedy choice needs to hold every combination of `strength` values.

    Args:
        rows: one dict for each row, argument -> value. All have the same arguments.
        strength: how many arguments are combined.
    """
    left = [set(combinations(sorted(row.items()), min(strength, len(row)))) for row in rows]
    missing, chosen = set().union(*left), set()
    bound = {i: len(held) for i, held in enumerate(left)}  # at most so many of the missing combinations are in row i
    while missing:
        best, most = None, 0
        for i, limit in sorted(bound.items(), key=lambda item: -item[1]):
            if limit <= most:
                break
            left[i] &= missing
            bound[i] = len(left[i])
            if bound[i] > most:
                best, most = i, bound[i]
        chosen.add(best)
        missing -= left[best]
    return chosen


def values(item):
    """argument -> identity of its value in this row. Arguments that one `parametrize` gives together count as one."""
    given = {name: id(value) for name, value in item.callspec.params.items()}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        if len(names) > 1:
            given[names[0]] = tuple(given.pop(name) for name in names)
    return given


def deep(items):
    """Those of `items` that `make test` leaves to `make test-deep`: other rows of the same test hold their combinations."""
    tests = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("deep"):
            tests.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for rows in tests.values():
        mark = rows[0].get_closest_marker("covering")
        chosen = covering([values(row) for row in rows], mark.args[0] if mark else 2)
        yield from (row for i, row in enumerate(rows) if i not in chosen)
