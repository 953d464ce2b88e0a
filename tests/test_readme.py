"""Every Python example of the README and of docs/ runs, with small stand-ins for what it takes for granted; the README leads to
every guide, and its table has the numbers of the record."""

import json
import re
from pathlib import Path

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def examples(page):
    """(line of the page, text) of each Python example."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]


def stand_ins():
    """What the pages call the reader's own."""
    torch.manual_seed(0)
    batch = lambda: (torch.randn(6, 8), torch.randint(4, (6,)))  # noqa: E731
    x, y = batch()
    return {
        "model": torch.nn.Linear(8, 4),
        "make_model": lambda: torch.nn.Linear(8, 4),
        "loader": [batch()],
        "val_x": x,
        "val_y": y,
        "held_out": batch(),
        "groups": [[batch(), batch()]],
        "clean_loader": [batch()],
        "images": torch.randn(70, 8),
        "labels": torch.randint(4, (70,)),
        "backbone": torch.nn.Identity(),
        "epochs": 2,
    }


def test_there_are_examples():
    with_examples = {page.name for page in PAGES if examples(page)}
    assert {"README.md", "losses.md", "lambda.md", "optimizers.md", "scale.md", "weightings.md", "from-absgd.md"} <= with_examples
    assert sum(len(examples(page)) for page in PAGES) >= 18


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples(page):
    """In their order, each after the ones above it, as a reader meets them."""
    names = stand_ins()
    for line, text in examples(page):
        # the empty lines before it give a traceback the page's own numbers
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)


def test_every_guide_is_found_from_the_readme():
    text, guides = README.read_text(), [page.name for page in PAGES[1:] if not page.name.startswith("design-")]
    assert [name for name in guides if f"(docs/{name})" not in text] == []


def test_the_table_is_that_of_the_record():
    """benchmarks/results/digits-demo.json has the summaries of the `make demo` that the README shows."""
    record = json.loads((ROOT / "benchmarks" / "results" / "digits-demo.json").read_text())
    text = README.read_text().replace("**", "")
    for name in ("noise", "longtail"):
        assert readme.row(record[name]) in text


def test_the_picture_is_drawn(tmp_path):
    """`make demo` draws it from results like these; a method that gains must not vanish from it."""
    runs = []
    for seed in range(2):
        for method, level in (("sgd", 60.0), ("absgd", 80.0 + seed)):
            series = {
                "balanced_accuracy": [level] * 4,
                "clean_weight": [1.0, 1.0, 1.4, 1.5],
                "flipped_weight": [1.0, 1.0, 0.2, None],
            }
            runs.append({"method": method, "seed": seed, "epochs": series})
    figure = readme.picture({"config": {"epochs": 4, "warmup": 0.5}, "runs": runs})
    figure.savefig(tmp_path / "picture.png")
    left, right = figure.axes
    assert {text.get_text().strip() for text in left.texts} == {"SGD", "ABSGD", "λ is switched on"}
    assert {text.get_text().strip() for text in right.texts} == {"right label", "wrong label", "λ is switched on"}
    assert [line.get_ydata()[-1] for line in left.lines[:2]] == [60, 80.5]
