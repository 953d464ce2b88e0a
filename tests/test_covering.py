"""The choice of rows of `make test` (covering.py)."""

from itertools import combinations, product

import pytest
from covering import covering, values

AXES = {"backend": ["reference", "cpu-avx2", "cpu-avx512"], "case": range(16), "dtype": range(4), "layout": range(8)}


def held(rows, strength):
    return {pairs for row in rows for pairs in combinations(sorted(row.items()), strength)}


@pytest.mark.parametrize("strength, least", [(1, 16), (2, 128), (3, 512)])
def test_every_combination_is_held(strength, least):
    """By few rows: not many more than the longest axes alone have."""
    rows = [dict(zip(AXES, values)) for values in product(*AXES.values())]
    chosen = [rows[i] for i in covering(rows, strength)]
    assert held(chosen, strength) == held(rows, strength)
    assert least <= len(chosen) <= 1.3 * least


def test_rows_that_are_not_there():
    """A table with holes, as one with skipped rows; and rows of one argument, which all stay."""
    rows = [{"a": a, "b": b, "c": c} for a, b, c in product(range(3), repeat=3) if a != b]
    assert held([rows[i] for i in covering(rows, 2)], 2) == held(rows, 2)
    assert covering([{"a": n} for n in range(5)], 2) == set(range(5)) == covering([{"a": n} for n in range(5)], 1)


TABLE = [(1, 2, "x"), (1, 3, "y"), (4, 2, "z"), (4, 3, "w")]


@pytest.mark.covering(1)
@pytest.mark.parametrize("first, second, name", TABLE)
def test_rows_of_a_table(first, second, name, request):
    """Arguments that one `parametrize` gives together are one argument: no row of a table is left out because others have its
    numbers."""
    assert values(request.node).keys() == {"first"} and not request.node.get_closest_marker("deep")
    assert (first, second, name) in TABLE
