"""`absgd-fast bench --compare`: which ratios moved between two records. Nothing runs."""

import copy
import json

import pytest
from bench_cases import (  # noqa: F401 (fixtures)
    changes,
    one_case,
    quiet,
    run,
    same_path,
)

from absgd_fast import __main__ as cli

HERE = {
    "hardware": {"cpu": "a", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "compiler": "GNU",
    "threads": 2,
    "seconds_per_case": 5.0,
}


def ratio(median, width=0.0):
    """Quartiles whose spread is `width`."""
    return {"median": median, "q1": median * (1 - width / 2), "q3": median * (1 + width / 2)}


def record(cases, **here):
    """{(suite, case): {competitor: ratio}} as a record."""
    results = [
        {
            "suite": suite,
            "case": case,
            "peers": {"absgd_fast": {"us": ratio(1.0)}} | {name: {"ratio": r} for name, r in of.items()},
        }
        for (suite, case), of in cases.items()
    ]
    return HERE | here | {"results": results}


@pytest.fixture
def compare(monkeypatch, tmp_path, capsys):
    """compare(old, new) -> (exit code, printed lines). Whatever would measure fails."""
    for module, name in ((one_case, "interleave"), (quiet, "look"), (run, "environment")):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("something was measured"))

    def call(old, new, *more):
        paths = []
        for name, content in (("old", old), ("new", new)):
            paths.append(tmp_path / f"{name}.json")
            text = content if isinstance(content, str) else json.dumps(content)
            paths[-1].write_text(text)
        code = cli.main(["bench", "--compare", *map(str, paths), *more])
        out, err = capsys.readouterr()
        return code, (out or err).splitlines()

    return call


def rows(lines):
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_the_largest_change_comes_first(compare):
    """A ratio must change by more than its spread in both runs; halves and doubles are equally large."""
    old = {
        ("loss", "small"): {"a": ratio(1.0, 0.05), "b": ratio(1.0, 0.15), "c": ratio(1.0, 0.01)},
        ("step", "large"): {"d": ratio(0.5)},
        ("step", "huge"): {"e": ratio(0.5)},
    }
    new = copy.deepcopy(old)
    new["loss", "small"] = {"a": ratio(1.1, 0.06), "b": ratio(1.1, 0.01), "c": ratio(1.1, 0.12)}
    new["step", "large"] = {"d": ratio(0.3)}
    new["step", "huge"] = {"e": ratio(0.5)}
    code, lines = compare(record(old), record(new))
    assert [row[:2] for row in rows(lines)] == [["step large", "d"], ["loss small", "a"]]
    assert rows(lines)[0][2:] == ["0.50 (0.50–0.50)", "0.30 (0.30–0.30)", "-40 %", "down"]
    assert rows(lines)[1][4:] == ["+10 %", "up"]
    assert "3 of 5 ratios moved by no more than they varied in a run" in lines
    assert code == 0 and lines[-1] == "ours got slower in no case"  # one of three competitors got faster


@pytest.mark.parametrize(
    "factors, code",
    [((1.3,), 1), ((0.7,), 0), ((1.0,), 0), ((1.3, 1.0), 1), ((1.3, 1.0, 1.0), 0), ((1.3, 1.3, 1.0), 1), ((1.3, 1.3, 1.3), 1)],
    ids=str,
)
def test_who_got_slower(compare, factors, code):
    """Ours, if the ratios to at least half of the competitors rose; else those competitors got faster."""
    old = {("loss", "x"): {str(k): ratio(0.5, 0.1) for k in range(len(factors))}}
    new = {("loss", "x"): {str(k): ratio(0.5 * factor, 0.1) for k, factor in enumerate(factors)}}
    found, lines = compare(record(old), record(new))
    assert found == code
    assert ("ours got slower: loss x" in lines) is (code == 1)


def test_what_is_in_one_record_only(compare):
    old = {("loss", "x"): {"a": ratio(1.0), "gone": ratio(1.0)}}
    new = {("loss", "x"): {"a": ratio(1.0)}, ("train", "y"): {"a": ratio(1.0)}}
    _, lines = compare(record(old), record(new))
    assert [line for line in lines if line.startswith("only")] == [
        "only in the old record: loss x, gone",
        "only in the new record: train y, a",
    ]
    assert not rows(lines)


def test_what_differs(compare):
    cases = {("loss", "x"): {"a": ratio(1.0)}}
    other = {"hardware": {"cpu": "b", "cores": 2}, "versions": {"torch": "2.14.0"}, "threads": 1, "date": "later"}
    gpu = {"gpu": {"name": "G", "state": {"clock": "1"}}}
    _, lines = compare(
        record(cases, quiet={"quiet": True}, gpu={"name": "G", "state": {"clock": "2"}}),
        record(cases, quiet={"quiet": False}, **other, **gpu),
    )
    assert [line for line in lines if line.startswith("differs")] == [
        "differs: hardware cpu: a -> b",
        "differs: versions torch: 2.13.0 -> 2.14.0",
        "differs: threads: 2 -> 1",
        "differs: the machine was not quiet in the new run",
    ]
    assert not any(line.startswith("differs") for line in compare(record(cases), record(cases))[1])


def test_a_record_of_this_repository_is_one(capsys):
    """Compared with itself; the suite memory in it has no ratio, and is no obstacle."""
    name = str(run.Path(run.__file__).parent / "results" / "cpu-2-cores-avx512.json")
    count = len(changes.ratios(changes.read(name)))
    assert cli.main(["bench", "--compare", name, name]) == 0 and count > 20
    lines = capsys.readouterr().out.splitlines()
    # Whether the machine was quiet is a property of the run that made the record, so the test does not ask it.
    assert [line for line in lines if not line.startswith("differs: the machine was not quiet")] == [
        f"{count} of {count} ratios moved by no more than they varied in a run",
        "ours got slower in no case",
    ]


GOOD = record({("loss", "x"): {"a": ratio(1.0)}})
WRONG = {"suite": "gpu loss", "case": "y", "wrong": "off by 1"}


def test_a_case_with_a_wrong_result_has_no_ratio(compare):
    code, lines = compare(GOOD, GOOD | {"results": [*GOOD["results"], WRONG]})
    assert code == 0 and "1 of 1 ratios moved by no more than they varied in a run" in lines


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not JSON"),
        ([1, 2], "has no list `results`"),
        ({"linear": {}}, "has no list `results`"),
        ({"results": {"a": 1}}, "has no list `results`"),
        ({"results": ["x"]}, "are not those of cases"),
        ({"results": [{"suite": "a", "case": "b", "peers": {"c": {"ratio": 0.5}}}]}, "are not those of cases"),
        ({"results": [{"case": "b", "peers": {"c": {"ratio": ratio(1.0)}}}]}, "are not those of cases"),
        ({"results": [{"suite": "a", "case": "b", "peers": {"c": {"ratio": ratio(0.0)}}}]}, "are not those of cases"),
        ({"results": [WRONG]}, "has no ratio"),
        (record({("step", "z"): {"a": ratio(1.0)}}), "no ratio in common"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["old", "new"])
def test_what_is_no_record_is_refused(compare, place, content, words):
    code, lines = compare(*((content, GOOD) if place == "old" else (GOOD, content)))
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert f"{place}.json" in lines[0] or "in common" in words


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--compare", name, name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"absgd-fast bench: {name} cannot be read: ") and err.count("\n") == 1


@pytest.mark.parametrize("more", [["--suite", "loss"], ["--out", "x.json"], ["--threads", "1"], ["--prepare"]], ids=str)
def test_nothing_is_measured_beside(compare, more):
    code, lines = compare(GOOD, GOOD, *more)
    assert code == 2 and lines[0].startswith(f"absgd-fast bench: --compare measures nothing, so it takes no {more[0]}")
