"""The picture of docs/performance.md: every ratio of the records is in it, and at its place."""

import json

import pytest
from bench_cases import (
    performance_plot,
    same_path,  # noqa: F401 (a fixture)
)
from matplotlib.colors import to_hex


def peer(median, width, target=None):
    return {"ratio": {"median": median, "q1": median * (1 - width / 2), "q3": median * (1 + width / 2)}, "target": target}


def record(suite, case, peers):
    return {"results": [{"suite": suite, "case": case, "peers": {"absgd_fast": {}} | peers}]}


LOSS = record(
    "loss", "2 × 2", {"cross_entropy": peer(0.5, 0.04, 0.4), "absgd package": peer(0.2, 0.4), "torch.compile": peer(0.3, 0)}
)
STEP = record("step", "a tensor", {"SGD fused": peer(1.5, 0.04, 1.0), "SGD default": peer(0.7, 0.04)})


def dots(axes):
    """{(x, whether it is hollow)} of the medians, and the x of the marks of what was aimed at."""
    points = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    medians = {
        (line.get_xdata()[0], to_hex(line.get_markerfacecolor()) == "#ffffff") for line in points if line.get_marker() != "|"
    }
    return medians, [line.get_xdata()[0] for line in points if line.get_marker() == "|"]


def test_every_ratio_is_drawn():
    figure = performance_plot.picture([STEP, LOSS])
    loss, step = figure.axes  # in the order of the page, whatever the order of the records
    assert dots(loss) == ({(0.5, False), (0.2, True)}, [0.4])  # torch.compile is in the table alone
    assert dots(step) == ({(1.5, False), (0.7, False)}, [1.0])
    whiskers = [tuple(segment[:, 0]) for lines in loss.collections for segment in lines.get_segments()]
    assert whiskers == [pytest.approx((0.49, 0.51)), pytest.approx((0.16, 0.24))]
    assert loss.get_xscale() == "log" and [text.get_text() for text in loss.get_yticklabels()] == ["2 × 2"]
    assert any(list(line.get_xdata()) == [1, 1] for line in loss.lines)
    names = [text.get_text() for text in figure.legends[0].texts]
    assert "the package absgd" in names and "torch's SGD by default" in names and "aimed at" in names


def test_a_later_record_replaces_a_case():
    found = performance_plot.cases([LOSS, STEP, record("loss", "2 × 2", {"cross_entropy": peer(0.9, 0)})])
    assert found["loss"]["2 × 2"]["cross_entropy"]["ratio"]["median"] == 0.9 and found["step"].keys() == {"a tensor"}


def test_the_command_writes_a_picture(tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps(LOSS))
    out = tmp_path / "picture.png"
    assert performance_plot.main([str(tmp_path / "record.json"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and f"written: {out}" in capsys.readouterr().out


def test_the_records_of_the_page_are_the_default(tmp_path):
    """They have every suite of the picture."""
    out = tmp_path / "picture.png"
    assert performance_plot.main(["--out", str(out)]) == 0 and out.stat().st_size > 10_000
    found = performance_plot.cases([json.loads(path.read_text()) for path in performance_plot.RECORDS])
    assert found.keys() == performance_plot.PANELS.keys()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"results": [{"suite": "clip", "case": "x", "peers": {"a": peer(1.0, 0)}}]}, "none of the suites"),
        ({}, "no list `results`"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, content, words):
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as leaving:
        performance_plot.main([str(tmp_path / "record.json"), "--out", str(tmp_path / "x.png")])
    assert leaving.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "x.png").exists()
