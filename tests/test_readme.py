"""Every Python example of the README and of docs/ runs, with small stand-ins for what it takes for granted; the README leads to
every guide, and its table has the numbers of the record."""

import json
from pathlib import Path

import pytest
from document_examples import examples, run, stand_ins

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def test_there_are_examples():
    with_examples = {page.name for page in PAGES if examples(page)}
    guides = {
        "losses.md",
        "choosing-lambda.md",
        "optimizers.md",
        "scale.md",
        "language-models.md",
        "weightings.md",
        "from-absgd.md",
    }
    assert {"README.md", *guides} <= with_examples
    assert sum(len(examples(page)) for page in PAGES) >= 18


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples(page):
    if page.name == "integrations.md":
        pytest.skip("needs the frameworks; tests/integrations/test_documents.py runs it in `make test-integrations`")
    run(page, stand_ins())


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
