"""What a release needs: one version in three files, and the text of the release.

    python3 .github/release.py prepare 0.2.0     writes the version and today's date into the three files
    python3 .github/release.py check [v0.2.0]    says where the files (and the tag) disagree
    python3 .github/release.py notes v0.2.0      prints the section of CHANGELOG.md

pyproject.toml has the version. CITATION.cff and CHANGELOG.md repeat it with the date, because they are read as they stand.
The tag is taken from the environment variable TAG if it is not given, so that no shell sees it.
"""

import datetime
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
VERSION = re.compile(r'^version = "(.+)"$', re.MULTILINE)
CITED = re.compile(r"^version: (.+)\ndate-released: (.+)$", re.MULTILINE)
UNRELEASED = "## Unreleased\n"
RELEASED = re.compile(r"^## (\d[^ \n]*) — (\d{4}-\d{2}-\d{2})\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
RELEASE = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def read(root):
    """The texts of the three files."""
    return [(root / name).read_text(encoding="utf-8") for name in FILES]


def unreleased(changelog):
    """The entries under `## Unreleased`."""
    return changelog.partition(UNRELEASED)[2].partition("\n## ")[0].strip()


def faults(root, tag=None):
    """Sentences about what disagrees; none if a release can be made of these files."""
    project, citation, changelog = read(root)
    version = VERSION.search(project)[1]
    cited, released = CITED.search(citation), RELEASED.search(changelog)
    out = []
    if not RELEASE.fullmatch(version):
        out.append(f"pyproject.toml: {version!r} is no version such as 0.2.0 or 0.2.0rc1")
    if cited is None or cited[1] != version:
        out.append(f"CITATION.cff: `version` and `date-released` do not say {version}")
    if UNRELEASED not in changelog or not changelog.split(UNRELEASED)[0].startswith("# Changelog\n"):
        out.append("CHANGELOG.md: the section `## Unreleased` is missing")
    elif "## " in changelog.split(UNRELEASED)[0].removeprefix("# Changelog\n"):
        out.append("CHANGELOG.md: `## Unreleased` does not come first")
    if released is None or released[1] != version:
        out.append(f"CHANGELOG.md: the newest section is not `## {version} — YEAR-MONTH-DAY`")
    elif not released[3].strip():
        out.append(f"CHANGELOG.md: the section of {version} is empty")
    elif cited and cited[2] != released[2]:
        out.append(f"CITATION.cff says {cited[2]} and CHANGELOG.md {released[2]}")
    if tag is not None and tag != f"v{version}":
        out.append(f"the tag is {tag!r}, expected 'v{version}'")
    if tag is not None and unreleased(changelog):
        out.append("CHANGELOG.md: `## Unreleased` has entries, which this release would leave out")
    return out


def notes(root, tag):
    """The section of CHANGELOG.md that belongs to the tag. Raises SystemExit if there is none."""
    for version, _, text in RELEASED.findall(read(root)[2]):
        if tag == f"v{version}":
            return text.strip() + "\n"
    raise SystemExit(f"CHANGELOG.md has no section for the tag {tag!r}")


def prepare(root, version, date):
    """Writes the version and the date into the three files. The entries under `## Unreleased` become its section."""
    if not RELEASE.fullmatch(version):
        raise SystemExit(f"{version!r} is no version such as 0.2.0 or 0.2.0rc1")
    project, citation, changelog = read(root)
    if not unreleased(changelog):
        raise SystemExit("CHANGELOG.md: there is nothing under `## Unreleased` to be released")
    new = [
        VERSION.sub(f'version = "{version}"', project, count=1),
        CITED.sub(f"version: {version}\ndate-released: {date}", citation, count=1),
        changelog.replace(UNRELEASED, f"{UNRELEASED}\n## {version} — {date}\n", 1),
    ]
    for name, text in zip(FILES, new):
        (root / name).write_text(text, encoding="utf-8")


def main(command, argument=None):
    """Runs one of the three commands; the exit code is a sentence if something is wrong."""
    if command == "prepare":
        prepare(ROOT, argument or os.environ.get("VERSION", ""), datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    tag = argument or os.environ.get("TAG") or None
    if command == "notes":
        print(notes(ROOT, tag), end="")
    elif found := faults(ROOT, tag if command == "check" else None):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    if not (2 <= len(sys.argv) <= 3 and sys.argv[1] in ("prepare", "check", "notes")):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
