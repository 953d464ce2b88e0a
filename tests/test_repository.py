"""What stands around the code holds together: one version everywhere, workflows that call the Makefile, and forms."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# .PHONY, because `make docs` would otherwise find the folder docs and do nothing
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE)) & set(
    " ".join(re.findall(r"^\.PHONY:(.+)$", MAKEFILE, re.MULTILINE)).split()
)
# Who may write, and why: everything else reads the contents of the repository or nothing.
WRITERS = {
    ("docs.yml", "deploy"): {"pages": "write", "id-token": "write"},  # the site, and a proof of which workflow it comes from
    ("release.yml", "publish"): {"id-token": "write"},  # trusted publishing
    ("release.yml", "github"): {"contents": "write"},  # the release
}
ACTION = re.compile(r"uses: ([\w-]+/[\w./-]+)@[0-9a-f]{40} # v\d+\.\d+\.\d+$")  # dependabot keeps both the commit and the version


@pytest.fixture
def release():
    """The script of the releases."""
    spec = importlib.util.spec_from_file_location("release", GITHUB / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(release, tmp_path):
    """A folder with a copy of the files that have the version."""
    for name in release.FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def change(path, old, new):
    """Replaces the text that stands once in a file."""
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


# ---- the version ---------------------------------------------------------------------------------------------------------


def newest(release):
    """(version, date, text) of the newest section of CHANGELOG.md that has a version."""
    return release.RELEASED.search((ROOT / "CHANGELOG.md").read_text()).groups()


def test_every_file_has_the_version(release):
    assert release.faults(ROOT) == []
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version, date, _ = newest(release)
    assert (citation["version"], str(citation["date-released"])) == (version, date)


def test_documents_name_no_other_version(release):
    """Beside the changelog, a document may name the version of this package alone."""
    named = re.compile(r"absgd[_-]fast(?:==|[ -]v?)(\d+\.\d+(?:\.\d+)?\w*)")
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "mkdocs.yml"]
    found = {(path.name, version) for path in documents if path.exists() for version in named.findall(path.read_text())}
    assert {version for _, version in found} <= {newest(release)[0]}, found


@pytest.mark.parametrize(
    "file, of_version, other, why",
    [
        ("pyproject.toml", 'version = "{}"', 'version = "9.9.9"', "CITATION.cff"),
        ("pyproject.toml", 'version = "{}"', 'version = "next"', "is no version"),
        ("CITATION.cff", "version: {}", "version: 9.9.9", "CITATION.cff"),
        ("CITATION.cff", "date-released: ", "date-released: 1", "CHANGELOG.md"),
        ("CHANGELOG.md", "## {} — ", "## 9.9.9 — ", "newest section"),
        ("CHANGELOG.md", "## {} — ", "## {} - ", "newest section"),
        ("CHANGELOG.md", "## Unreleased\n", "", "Unreleased"),
        ("CHANGELOG.md", "# Changelog\n", "# Changelog\n\n## 9.9.9 — 2030-01-01\n- More\n", "does not come first"),
        ("CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n- An entry\n", "would leave out"),
    ],
)
def test_a_file_that_disagrees_is_named(release, copy, file, of_version, other, why):
    version = newest(release)[0]
    change(copy / file, of_version.format(version), other.format(version))
    assert any(why in fault for fault in release.faults(copy, f"v{version}"))


def test_a_tag_that_is_not_the_version_is_named(release, copy):
    assert "'v9.9.9'" in release.faults(copy, "v9.9.9")[0]


def test_a_release_is_prepared_in_every_file(release, copy):
    change(copy / "CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n### Features\n- An entry\n")
    release.prepare(copy, "9.10.0rc1", "2030-01-02")
    assert release.faults(copy, "v9.10.0rc1") == []
    assert release.notes(copy, "v9.10.0rc1") == "### Features\n- An entry\n"
    assert release.notes(copy, f"v{newest(release)[0]}") == newest(release)[2].strip() + "\n", "the section before stays"
    assert "date-released: 2030-01-02\n" in (copy / "CITATION.cff").read_text()
    with pytest.raises(SystemExit, match="no section"):
        release.notes(copy, "v9.9.9")
    with pytest.raises(SystemExit, match="no version"):
        release.prepare(copy, "9.10", "2030-01-02")
    with pytest.raises(SystemExit, match="nothing under"):
        release.prepare(copy, "9.11.0", "2030-01-03")
    assert release.faults(copy, "v9.10.0rc1") == [], "nothing was written"


# ---- the workflows -------------------------------------------------------------------------------------------------------


def faults_of_job(file, name, job):
    """Sentences about what is wrong with a job."""
    out = []
    if job.get("permissions") != WRITERS.get((file, name), {"contents": "read"}):
        out.append(f"{name}: permissions {job.get('permissions')}")
    if "uses" in job:  # a workflow of this repository, which has its own limits
        return out if (ROOT / job["uses"]).is_file() else [*out, f"{name}: there is no {job['uses']}"]
    if not 0 < job.get("timeout-minutes", 0) <= 120:
        out.append(f"{name}: timeout-minutes {job.get('timeout-minutes')}")
    for step in job["steps"]:
        if not re.fullmatch(r"make [\w-]+", step.get("run", "make test")):
            out.append(f"{name}: {step['run']!r} is more than a target of the Makefile")
        if step.get("uses", "").startswith("actions/checkout@") and step.get("with", {}).get("persist-credentials") is not False:
            out.append(f"{name}: the checkout keeps its credentials")
    called = [word for step in job["steps"] for word in step.get("run", "").split()[1:2]]
    return out + [f"{name}: the Makefile has no phony target {target}" for target in called if target not in TARGETS]


def faults_of_workflow(file, text):
    """Sentences about what is wrong with a workflow."""
    workflow = yaml.safe_load(text)
    out = [] if workflow.get("permissions") == {} else ["a job without permissions would have those of the repository"]
    group = workflow.get("concurrency", {}).get("group", "")
    if group != f"{file.removesuffix('.yml')}-${{{{ github.ref }}}}":
        out.append(f"concurrency: {group!r} is not the workflow's own group")
    used = re.findall(r"uses: [^.\n].*$", text, re.MULTILINE)
    out += [f"{line}: no commit with its version" for line in used if not ACTION.match(line)]
    return out + [fault for name, job in workflow["jobs"].items() for fault in faults_of_job(file, name, job)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path):
    assert faults_of_workflow(path.name, path.read_text()) == []


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("permissions: {}\n", "", "a job without permissions"),
        ("contents: read", "contents: write", "test: permissions"),
        ("    permissions:\n      contents: read\n", "", "test: permissions None"),
        ("timeout-minutes: 75", "timeout-minutes: 900", "test: timeout-minutes 900"),
        ("    timeout-minutes: 75", "    continue-on-error: true", "test: timeout-minutes None"),
        ("run: make test\n", "run: make testing\n", "no phony target testing"),
        ("run: make test\n", "run: make test PYTHON=${{ matrix.python }}\n", "more than a target"),
        ("persist-credentials: false", "fetch-depth: 0", "keeps its credentials"),
        (" # v7.0.1\n", "\n", "no commit with its version"),
        ("actions/setup-python@", "actions/setup-python@v7 #", "no commit with its version"),
        ("group: test-", "group: ${{ github.workflow }}-", "own group"),
    ],
)
def test_a_broken_workflow_is_found(old, new, why):
    text = (GITHUB / "workflows" / "test.yml").read_text()
    assert old in text
    assert any(why in fault for fault in faults_of_workflow("test.yml", text.replace(old, new, 1)))


def test_a_release_waits_for_the_tests_and_the_wheels():
    jobs = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())["jobs"]
    assert set(jobs["publish"]["needs"]) == {"test", "wheels"} and {jobs[n]["needs"] for n in ("test", "wheels")} == {"check"}
    assert jobs["publish"]["environment"] == "release" and jobs["github"]["needs"] == "publish"


def test_pythons_are_the_same_everywhere():
    def job(file, name):
        return yaml.safe_load((GITHUB / "workflows" / file).read_text())["jobs"][name]

    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    (set_up,) = [step for step in job("wheels.yml", "wheel")["steps"] if "setup-python" in step.get("uses", "")]
    assert set_up["with"]["python-version"].split() == promised
    assert re.findall(r"^PYTHONS \?= (.+)$", MAKEFILE, re.MULTILINE) == [" ".join(f"python{python}" for python in promised)]
    assert job("test.yml", "test")["strategy"]["matrix"]["python"] == [promised[0], promised[-1]]
    assert f'requires-python = ">={promised[0]}"' in PROJECT


# ---- forms and policies --------------------------------------------------------------------------------------------------


def commands_named(text):
    """(command, option or "") of every `absgd-fast ...` in a text."""
    return set(re.findall(r"`absgd-fast ([a-z]+)(?: (--[\w-]+))?", text))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["labels"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_issue_forms_ask_for_the_doctor():
    texts = {path.stem: path.read_text() for path in FORMS}
    assert texts.keys() == {"bug", "feature", "wrong-number"}
    for name in ("bug", "wrong-number"):
        assert commands_named(texts[name]) >= {("doctor", ""), ("doctor", "--selftest")}
    for command, option in set.union(*map(commands_named, texts.values())):
        assert option in (ROOT / "absgd_fast" / "commands" / f"{command}.py").read_text()
    assert isinstance(yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text())["blank_issues_enabled"], bool)


def test_pull_requests_are_asked_for_what_a_change_needs():
    text = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()
    assert all(word in text for word in ("test that fails", "costs", "CHANGELOG.md"))


def unsafe_loads(source):
    """The lines with a `torch.load` that could run code of the file."""
    calls = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    return [call.lineno for call in calls if "weights_only=True" not in [ast.unparse(word) for word in call.keywords]]


def test_the_security_policy_says_what_is_true():
    policy = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in policy and "weights_only=True" in policy
    sources = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "absgd_fast").rglob("*.py")}
    assert sum("torch.load(" in source for source in sources.values()) >= 3, "the package loads files in another way"
    assert {name: lines for name, source in sources.items() if (lines := unsafe_loads(source))} == {}
    assert unsafe_loads("torch.load(path)\ntorch.load(path, weights_only=False)\ntorch.load(path, weights_only=True)") == [1, 2]
    networks = re.compile(r"^ *(?:import|from) (?:urllib|http|socket|ftplib|requests)\b", re.MULTILINE)
    assert not [name for name, source in sources.items() if networks.search(source)], "SECURITY.md: nothing is downloaded"


def test_dependabot_looks_where_the_versions_stand():
    updates = {entry["package-ecosystem"]: entry for entry in yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]}
    assert updates.keys() == {"github-actions", "pip"}
    pinned = {
        path.parent.relative_to(ROOT).as_posix()
        for path in [ROOT / "pyproject.toml", *ROOT.glob("docs/requirements*.txt"), *ROOT.glob("tests/**/requirements*.txt")]
    }
    assert {folder.strip("/") or "." for folder in updates["pip"]["directories"]} == pinned
