"""The documents hold together: cited sections and papers exist, links lead somewhere, and nothing grows beyond its limit."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MATH = (ROOT / "docs" / "MATH.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SOURCES = sorted(
    path
    for folder in ("absgd_fast", "csrc", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
)
MOST_LINES = {"README.md": 180, "docs/MATH.md": 330}
MOST_UNFORMATTED = 40  # statements that keep a layout by hand

SECTION = re.compile(r"^#+ (\d+(?:\.\d+)?) ", re.MULTILINE)
CITED_SECTION = re.compile(r"MATH(?:\.md)? (§\d+(?:\.\d+)?(?:(?:, | and |, and )§\d+(?:\.\d+)?)*)")
PAPER = re.compile(r"\[([A-Z][\w-]+(?: [A-Z])? \d{4})\]")
CITED_PAPER = re.compile(r"\b([A-Z][a-z]+)(?: et al\.| & [A-Z][\w-]+) (\d{4})")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# a file that a page names, and what it says stands in it: csrc/math/losses.h `Row`
NAMED_FILE = re.compile(
    r"(?<![\w./-])((?:[\w.*-]+/)+[\w.*-]+\.(?:py|h|cpp|cu|cuh|sh|json))(?![\w/])(?:,? (`[A-Za-z_]\w*`(?:, `[A-Za-z_]\w*`)*))?"
)


def name(path):
    return path.relative_to(ROOT).as_posix()


def slug(heading):
    """The anchor that a code host gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_cited_sections_exist():
    sections = set(SECTION.findall(MATH))
    cited = {
        (name(path), section)
        for path in (*SOURCES, *DOCUMENTS)
        for found in CITED_SECTION.findall(path.read_text())
        for section in re.findall(r"§(\d+(?:\.\d+)?)", found)
    }
    assert len(cited) > 20, "the pattern finds no citations any more"
    assert not {(file, section) for file, section in cited if section not in sections}


def test_own_sections_exist():
    """The references of docs/MATH.md to its own sections."""
    assert set(re.findall(r"§(\d+(?:\.\d+)?)", MATH)) <= set(SECTION.findall(MATH))


def test_cited_papers_are_in_the_bibliography():
    text, bibliography = MATH.split("## 9 Bibliography")
    entries = set(re.findall(r"^- \*\*\[(.+?)\]\*\*", bibliography, re.MULTILINE))
    assert set(PAPER.findall(text)) <= entries, "cited without an entry"
    assert entries <= set(PAPER.findall(text)) | set(PAPER.findall(bibliography.split("\n- ")[0])), "an entry that nothing cites"
    short = {(entry.split()[0], entry.split()[-1]) for entry in entries}
    cited = {
        (name(path), paper)
        for path in SOURCES
        if path.parts[len(ROOT.parts)] != "tests"
        for paper in CITED_PAPER.findall(path.read_text())
    }
    assert len(cited) > 20, "the pattern finds no citations any more"
    assert not {(file, paper) for file, paper in cited if paper not in short}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    missing = []
    for link in LINK.findall(document.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        headings = (
            re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if target.suffix == ".md" and target.exists() else []
        )
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if re.match(r"DESIGN|CONTRIBUTING|design-", d.name)], ids=name)
def test_named_files_have_what_is_named(document):
    plain = re.sub(r"\s+", " ", document.read_text().replace("\\_", "_").replace("**", ""))
    missing = []
    for path, words in NAMED_FILE.findall(plain):
        files = [file for home in ("", "absgd_fast", "csrc", "benchmarks") for file in (ROOT / home).glob(path)]
        text = "".join(file.read_text() for file in files)
        missing += [] if files else [path]
        missing += [f"{path} {word}" for word in re.findall(r"\w+", words) if not re.search(rf"\b{word}\b", text)]
    assert not missing


@pytest.mark.parametrize("document, limit", MOST_LINES.items(), ids=list(MOST_LINES))
def test_documents_stay_short(document, limit):
    assert len((ROOT / document).read_text().splitlines()) <= limit


def test_few_statements_are_formatted_by_hand():
    assert sum(path.read_text().count("# fmt: " + "skip") for path in SOURCES) < MOST_UNFORMATTED


def test_decisions_have_one_number_and_one_text():
    listed = [int(n) for n in re.findall(r"^\| (\d+) \|", (ROOT / "DESIGN.md").read_text(), re.MULTILINE)]
    written = [int(n) for page in DOCUMENTS for n in re.findall(r"^### (\d+)\. ", page.read_text(), re.MULTILINE)]
    assert sorted(listed) == list(range(1, len(listed) + 1)), "numbers in DESIGN.md"
    assert sorted(written) == sorted(listed), "headings in docs/design-*.md"
