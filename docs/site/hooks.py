"""What mkdocs does not do by itself: pages from the whole repository, the files that they link to, and executed tutorials.

Every file has the same path in the site as in the repository. So a relative link of a Markdown file leads to the same place in
both, and mkdocs checks it. A link to a file that is no page leads to a page that shows the file. A link to a folder leads to a
list of its files.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Link, Navigation, Section
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
SERVED = {".md", ".png", ".css", ".json"}  # what a browser or mkdocs shows as it is
LANGUAGES = {".py": "python", ".cff": "yaml", ".sh": "bash", ".toml": "toml"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
# title: (the page of the navigation behind which it stands, the heading that it leads to)
HEADINGS = {"How to add a loss": ("CONTRIBUTING.md", "one-more-loss-on-logits")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site. mkdocs has found those of docs/, as if docs/ were the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*"))]:
        if path.suffix in SERVED:
            add(files, config, path)
    for script in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        for name, content in executed(script).items():
            files.append(File.generated(config, name, content=content))
    for page in list(files.documentation_pages()):
        for target in linked(page.src_uri, page.content_string):
            add(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files that are shown on a page of the site lead to that page."""

    def to_its_page(found: re.Match) -> str:
        path = target_of(page.file.src_uri, found[2])
        if path is None or path.suffix in SERVED:
            return found[0]
        return found[1] + os.path.relpath(page_of(path), PurePosixPath(page.file.src_uri).parent) + found[3]

    return LINK.sub(to_its_page, markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Adds what mkdocs.yml cannot say: entries that lead to a heading."""
    for title, (name, heading) in HEADINGS.items():
        page = files.get_file_from_path(name).page
        siblings = page.parent.children if isinstance(page.parent, Section) else nav.items
        siblings.insert(siblings.index(page) + 1, Link(title, f"{page.url}#{heading}"))


def add(files: Files, config: MkDocsConfig, path: Path) -> None:
    """Add a file or folder of the repository to the site, unless it is there."""
    name = page_of(path)
    if files.get_file_from_path(name) is not None:
        return
    if path.suffix in SERVED:
        files.append(File.generated(config, name, abs_src_path=str(path)))
        return
    if path.is_dir():
        shown = [file for file in sorted(path.iterdir()) if file.suffix in {*SERVED, *LANGUAGES}]
        text = "".join(f"- [{file.name}]({file.name})\n" for file in shown)
    else:
        text = f"````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
    title = path.relative_to(ROOT).as_posix()
    text = f"---\ntitle: {title}\nsearch:\n  exclude: true\n---\n\n# `{title}`\n\n{text}"
    files.append(File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    for target in linked(name, text) if path.is_dir() else ():
        add(files, config, target)


def page_of(path: Path) -> str:
    """Where the site has a file or folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if path.parent == ROOT / "docs" / "tutorials" and path.suffix == ".py":
        return name.removesuffix(".py") + ".md"
    if path.is_dir():
        return f"{name}/index.md"
    return name if path.suffix in SERVED else f"{name}.md"


def target_of(page: str, link: str) -> Path | None:
    """The file or folder of the repository to which a page links; None for every other link."""
    path = Path(os.path.normpath(ROOT / PurePosixPath(page).parent / link))
    return path if "://" not in link and ROOT in path.parents and path.exists() else None


def linked(page: str, text: str) -> Iterator[Path]:
    """The files and folders of the repository to which a page links."""
    for found in LINK.finditer(text):
        path = target_of(page, found[2])
        if path is not None:
            yield path


def executed(script: Path) -> dict[str, str | bytes]:
    """Run a tutorial. Returns its page and its figures, by their paths in the site. An error of the tutorial is an error here."""
    name = page_of(script)
    notebook = jupytext.read(script)
    local = Config({"ConnectionFileMixin": {"transport": "ipc"}})  # a kernel that no other user of the machine can listen to
    NotebookClient(notebook, timeout=300, kernel_name="python3", config=local).execute()
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{script.stem}_files"})
    figures = {f"{PurePosixPath(name).parent}/{file}": content for file, content in resources["outputs"].items()}
    return {name: text, **figures}
