"""What the suites of the CPU print: tables for rich, and the last lines."""

from collections import Counter

from .peer import OURS
from .verdict import MOST_SPREAD


def _with_quartiles(values, text):
    return f"{text(values['median'])} ({text(values['q1'])}–{text(values['q3'])})"


def _ratio(value):
    return f"{value:.2f}"


def _time(us):
    unit, scale = (" µs", 1) if us["median"] < 999.5 else (" ms", 1e3)
    return _with_quartiles(us, lambda value: f"{value / scale:.{3 if value < 999.5 * scale else 4}g}") + unit


def is_too_noisy(peer):
    """Whether the figure of a competitor can be neither met nor missed, because its ratio varies too much."""
    return peer["target"] is not None and peer["met"] is None


def _verdict(met, lost=False):
    return {True: "[green]met[/]", False: "[bold red]missed[/]", None: "[yellow]slower[/]" if lost else ""}[met]


def _table(title, columns):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "competitor", "measure", "") else "right")
    return table


def time_table(results):
    """Rich table of compare's results, with a line for each competitor. Missed targets and slower cases are marked."""
    weighed = any("peak_bytes" in result["peers"][OURS] for result in results)
    table = _table(
        f"{results[0]['suite']}: medians (quartiles); error against float64",
        (
            "case",
            "competitor",
            "time",
            "error",
            "ours / theirs",
            "target",
            "",
            *(["peak", "ours / theirs", "target", ""] * weighed),
        ),
    )
    for result in results:
        for name, peer in result["peers"].items():
            line = [result["case"] if name == OURS else "", name, _time(peer["us"]), f"{peer['error']:.0e}"]
            if "ratio" in peer:
                ratio, target = peer["ratio"], peer["target"]
                line += [_with_quartiles(ratio, _ratio), "" if target is None else f"≤ {target:g}"]
                line += ["[yellow]too noisy[/]" if is_too_noisy(peer) else _verdict(peer["met"], lost=ratio["median"] > 1)]
            if weighed:
                line += [""] * (7 - len(line)) + _memory(peer)
            table.add_row(*line)
        for name in result["absent"]:
            table.add_row("", name, "left out")
        table.add_section()
    return table


def _memory(peer):
    """The cells of a competitor's peak memory."""
    peak = peer.get("peak_bytes")
    cells = ["–" if peak is None else f"{peak / 2**20:.0f} MiB"]
    if found := peer.get("memory"):
        ratio, target = found["ratio"], found["target"]
        cells += ["–" if ratio is None else _ratio(ratio), "" if target is None else f"≤ {target:g}", _verdict(found["met"])]
    return cells


UNITS = {"growth": "bytes kept per step", "peak": "peak, in gradients", "retained": "peak, graph kept"}


def memory_table(results):
    """Rich table of weigh's results."""
    table = _table("memory of forward and backward", ("case", "competitor", "measure", "value", "target", ""))
    for result in results:
        for name, values in result["peers"].items():
            for measure, value in values.items():
                line = [result["case"], name, UNITS[measure], "–" if value is None else f"{value:.2f}"]
                if name == OURS:
                    line += [f"≤ {result['targets'][measure]:g}", _verdict(result["met"][measure])]
                table.add_row(*line)
        table.add_section()
    return table


def changes_table(found):
    """Rich table of the ratios that moved beyond the spread of both runs (changes.py)."""
    table = _table(
        "ratios of our time to theirs that moved by more than they varied in either run",
        ("case", "competitor", "old", "new", "change", ""),
    )
    for change in found:
        words = "[bold red]up[/]" if change.factor > 1 else "[green]down[/]"
        ratios = (_with_quartiles(quartiles, _ratio) for quartiles in (change.old, change.new))
        table.add_row(f"{change.suite} {change.case}", change.competitor, *ratios, f"{100 * (change.factor - 1):+.0f} %", words)
    return table


def verdicts(result):
    """(competitor or measure, its verdict, a remark) of everything in a result that has one: met, missed, too noisy or slower."""
    if result["suite"] == "memory":
        for name, met in result["met"].items():
            if met is not None:
                yield name, "met" if met else "missed", ""
        return
    for name, peer in result["peers"].items():
        if name == OURS:
            continue
        if is_too_noisy(peer):
            yield name, "too noisy", f": the ratio varies by {100 * peer['spread']:.1f} % (at most {100 * MOST_SPREAD:g} %)"
        elif peer["met"] is False:
            yield name, "missed", ""
        else:
            if peer["met"]:
                yield name, "met", ""
            if peer["ratio"]["median"] > 1:
                yield name, "slower", ""
        reached = peer.get("memory", {}).get("met")
        if reached is not None:
            yield f"memory of {name}", "met" if reached else "missed", ""


def summary(results):
    """The last lines: how many figures were met, which were not or are too noisy, where we are slower, and who was left out."""
    count, lines = Counter(), []
    for result in results:
        place = f"{result['suite']} {result['case']}"
        for name, verdict, remark in verdicts(result):
            count[verdict] += 1
            if verdict != "met":
                lines.append(f"{verdict}: {place}, {name}{remark}")
        lines += [f"left out: {place}, {name}: {reason}" for name, reason in result["absent"].items()]
    noisy = f", {count['too noisy']} more too noisy to be judged" if count["too noisy"] else ""
    return [f"{count['met']} of {count['met'] + count['missed']} targets met{noisy}", *lines]
