"""The documentation site: it is built without a warning, every page is looked at, and it reads as the Markdown files do."""

import functools
import io
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import absgd_fast as ab

pytestmark = pytest.mark.deep

ROOT = Path(__file__).resolve().parents[1]
WHAT_IT_NEEDS = "pip install -r docs/requirements.txt"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@dataclass
class Page:
    """What a page holds, with whole addresses."""

    ids: set
    links: set  # of <a>
    parts: set  # images, scripts and style sheets, which a browser fetches by itself


# ---- building and serving ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason=WHAT_IT_NEEDS)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and prints nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """A function that serves a folder until the test ends, and returns the address."""
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def addresses(folder, base):
    """The address of every page in a folder."""
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    return [base + re.sub(r"(^|/)index\.html$", r"\1", page) for page in pages]


# ---- looking at pages --------------------------------------------------------------------------------------------------


@functools.cache
def fetched(url):
    """(content type, content) of an address; None if there is nothing."""
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError:
        return None


def parsed(url):
    """The page at an address, without a browser."""
    html = pytest.importorskip("lxml.html", reason=WHAT_IT_NEEDS)
    tree = html.fromstring(fetched(url)[1].decode(), base_url=url)
    tree.make_links_absolute()
    return Page(
        set(tree.xpath("//@id")),
        set(tree.xpath("//a/@href")),
        set(tree.xpath("//img/@src | //script/@src | //link[contains(@rel, 'stylesheet') or contains(@rel, 'icon')]/@href")),
    )


def broken(pages, base):
    """What is wrong with the links and the parts of pages, one line each. pages: {address: Page}."""
    found = []
    for url, page in pages.items():
        for link in page.links:
            target, fragment = urllib.parse.urldefrag(link)
            if not link.startswith(base):
                wrong = not re.match(r"https?://|mailto:", link)
            elif fetched(target) is None:
                wrong = True
            else:
                wrong = fragment and target in pages and urllib.parse.unquote(fragment) not in pages[target].ids
            found += [f"{url}: link to {link}"] if wrong else []
        for part in page.parts:
            found += [] if part.startswith("data:") or (part.startswith(base) and is_whole(part)) else [f"{url}: part {part}"]
    return found


def is_whole(part):
    """Whether there is such a part, and, if it is a picture, whether it can be decoded."""
    answer = fetched(part)
    if answer is None or not answer[1]:
        return False
    if answer[0] in ("image/png", "image/jpeg"):
        image = pytest.importorskip("PIL.Image")
        try:
            image.open(io.BytesIO(answer[1])).load()
        except OSError:
            return False
    return True


# What a browser has made of a page, when its scripts have run.
LOOK = """() => ({
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(e => e.href),
    images: [...document.images].map(e => [e.src, e.naturalWidth]),
})"""


@pytest.fixture
def browse():
    """A function (addresses, base) -> ({address: Page}, what is wrong), by headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason=WHAT_IT_NEEDS)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield functools.partial(look_at, browser)
        browser.close()


def look_at(browser, urls, base):
    """Open every address. No request to another host leaves the browser."""
    tab, pages, wrong = browser.new_page(), {}, []

    def route(call):
        if call.request.url.startswith((base, "data:", "blob:")):
            call.continue_()
        else:
            wrong.append(f"{tab.url}: request to {call.request.url}")
            call.abort()

    tab.route("**/*", route)
    tab.on("console", lambda message: wrong.append(f"{tab.url}: {message.text}") if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(f"{tab.url}: {error}"))
    for url in urls:
        tab.goto(url, wait_until="load")
        seen = tab.evaluate(LOOK)
        wrong += [f"{url}: image {source}" for source, width in seen["images"] if not width]
        pages[url] = Page(set(seen["ids"]), set(seen["links"]), set())
    return pages, wrong


# ---- tests -------------------------------------------------------------------------------------------------------------


def test_every_link_and_image(site, serve):
    base = serve(site)
    pages = {url: parsed(url) for url in addresses(site, base)}
    assert len(pages) > 50
    assert broken(pages, base) == []


def test_every_page_in_a_browser(site, serve, browse):
    base = serve(site)
    urls = addresses(site, base)
    pages, wrong = browse(urls, base)
    assert pages.keys() == set(urls) and all(page.links for page in pages.values())
    assert wrong == []
    assert broken(pages, base) == []


FAULTY = """<html><body><h1 id="top">A</h1><a href="missing/">a</a><a href="other.html#nowhere">b</a><a href="#top">c</a>
<a href="other.html#there">d</a><img src="missing.png"><img src="broken.png"><script src="http://host.invalid/x.js"></script>
</body></html>"""


@pytest.fixture
def faulty(tmp_path):
    """A folder with two pages, one of which has every fault."""
    (tmp_path / "index.html").write_text(FAULTY)
    (tmp_path / "other.html").write_text('<html><body><p id="there">B</p><a href="./">a</a></body></html>')
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_faults_are_found(faulty, serve):
    base = serve(faulty)
    found = broken({url: parsed(url) for url in addresses(faulty, base)}, base)
    links = [f"{base}: link to {base}{name}" for name in ("missing/", "other.html#nowhere")]
    parts = [f"{base}: part {url}" for url in (f"{base}missing.png", f"{base}broken.png", "http://host.invalid/x.js")]
    assert sorted(found) == sorted(links + parts)


def test_a_browser_finds_faults(faulty, serve, browse):
    base = serve(faulty)
    pages, wrong = browse(addresses(faulty, base), base)
    assert {f"{base}: image {base}missing.png", f"{base}: image {base}broken.png"} <= set(wrong)
    assert f"{base}: request to http://host.invalid/x.js" in wrong
    assert any("404" in line for line in wrong), "an error of the console"
    assert len(broken(pages, base)) == 2


def test_the_whole_interface_is_in_the_reference(site):
    html = pytest.importorskip("lxml.html", reason=WHAT_IT_NEEDS)
    ids = {id for page in (site / "docs" / "api").rglob("*.html") for id in html.parse(str(page)).xpath("//@id")}
    assert [name for name in ab.__all__ if f"absgd_fast.{name}" not in ids] == []


@pytest.mark.parametrize("source", REFERENCE, ids=lambda source: source.stem)
def test_docstrings_become_markdown(source, site):
    """>>> is an example and no quotation, and a formula stays a block of code."""
    html = pytest.importorskip("lxml.html", reason=WHAT_IT_NEEDS)
    page = html.parse(str(site / "docs" / "api" / source.stem / "index.html"))
    assert page.xpath("//article//blockquote | //article//details") == []
    assert not [text for text in page.xpath("//article//p/text()") if ">>>" in text or re.search(r"\S {3,}\S", text)]


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_a_tutorial_shows_text_code_output_and_figures(script, site):
    html = pytest.importorskip("lxml.html", reason=WHAT_IT_NEEDS)
    page = html.parse(str(site / "docs" / "tutorials" / script.stem / "index.html"))
    assert len(page.xpath("//article//p")) > 4 and len(page.xpath("//article//img")) == script.read_text().count("plt.show()") > 0
    code = len(page.xpath("//article//*[contains(@class, 'language-python')]"))
    assert code == script.read_text().count("\n# %%\n") > 3
    assert len(page.xpath("//article//pre")) > code, "nothing is printed"


# Python-Markdown, which mkdocs uses, and CommonMark differ in places: in a list without an empty line before it, and in a
# paragraph of a list that is indented by three spaces. A page that they read alike has as many elements of each kind.
KINDS = ("h1", "h2", "h3", "h4", "li", "ol", "ul", "table", "tr", "pre", "code", "img", "strong", "em", "a", "p")


def counted_by_commonmark(text):
    """{kind: how many}. A paragraph of a list does not count: whether its text has an element of its own is a matter of taste."""
    markdown = pytest.importorskip("markdown_it", reason=WHAT_IT_NEEDS)
    blocks = markdown.MarkdownIt("commonmark").enable("table").parse(text)
    tokens = blocks + [child for token in blocks for child in token.children or ()]
    count = Counter(token.tag for token in tokens if token.nesting == 1)
    count["p"], depth = 0, 0
    for token in blocks:
        depth += token.nesting * (token.tag == "li")
        count["p"] += token.type == "paragraph_open" and not depth
    count["pre"] = sum(token.type in ("fence", "code_block") for token in tokens)
    count["code"] = sum(token.type == "code_inline" for token in tokens)
    count["img"] = sum(token.type == "image" for token in tokens)
    return count


@pytest.mark.parametrize("source", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda source: source.stem)
def test_the_site_reads_a_page_as_code_hosts_do(source, site):
    html = pytest.importorskip("lxml.html", reason=WHAT_IT_NEEDS)
    name = source.relative_to(ROOT).with_suffix("").as_posix()
    (article,) = html.parse(str(site / ("" if name == "README" else name) / "index.html")).xpath("//article")
    for extra in article.xpath(".//a[contains(@class, 'headerlink')] | .//pre//* | .//code//*"):
        extra.drop_tag()
    count = Counter(element.tag for element in article.iter() if isinstance(element.tag, str))
    count["p"] = len(article.xpath(".//p[not(ancestor::li)]"))
    expected = counted_by_commonmark(source.read_text())
    assert {kind: count[kind] for kind in KINDS} == {kind: expected[kind] for kind in KINDS}
