"""The examples of docs/integrations.md and of the docstrings of absgd_fast.integrations, and the errors where a framework is
missing."""

import json
import math
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import document_examples
import language_cases
import pytest
import transformers_cases
import truth
from test_layers import EXAMPLES, FRAMEWORKS, run_docstring_examples
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "integrations.md"
MODULES = sorted(path.stem for path in (ROOT / "absgd_fast" / "integrations").glob("[a-z]*.py"))


def test_there_is_something_to_check():
    assert set(MODULES) <= FRAMEWORKS.keys()


@pytest.mark.parametrize("name", [name for name in sorted(EXAMPLES) if name.startswith("integrations.")])
def test_docstring_examples(name):
    result = run_docstring_examples(name)
    assert result.failed == 0 and result.attempted > 0


WITHOUT_FRAMEWORKS = """
import importlib, json, sys
import absgd_fast, absgd_fast.schedule, absgd_fast.integrations
loaded, errors = list(sys.modules), {}
for name in sys.argv[1:]:
    sys.modules[name] = None  # as if it were not installed
    try:
        importlib.import_module(f"absgd_fast.integrations.{name}")
    except ImportError as error:
        errors[name] = str(error)
print(json.dumps([loaded, errors]))
"""


def test_without_frameworks():
    """The package imports none of them, and each module names the one that it misses and what to install."""
    command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, *MODULES]
    loaded, errors = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    assert not set(loaded) & {*set().union(*FRAMEWORKS.values()), "skorch", "pytorch_lightning"}
    assert errors.keys() == set(MODULES)
    for name, error in errors.items():
        assert error.startswith(f"absgd_fast.integrations.{name}: {name} cannot be imported") and "pip install" in error


# ---- docs/integrations.md ----------------------------------------------------------------------------------------------------


def reader():
    """What the page calls the reader's own: those of the other pages, and models and data of Transformers."""
    names = document_examples.stand_ins()
    x, y = names["images"], names["labels"]
    names["data"] = DataLoader(TensorDataset(x, y), batch_size=6)
    names["classifier"] = transformers_cases.Classifier()
    names["examples"] = transformers_cases.Rows(*truth.samples(20))
    names["language_model"] = language_cases.language_model()
    names["sequences"] = language_cases.dataset(8)
    names["tokenizer"] = language_cases.tokenizer()
    return names


def test_examples_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trainers write into the current folder
    names = reader()
    document_examples.run(PAGE, names)
    assert math.isfinite(names["criterion"].log_s) and math.isfinite(names["net"].criterion_.log_s)
    assert names["module"].criterion.two_stage_count == names["epochs"]
    assert names["net"].predict_proba(names["images"].numpy()).sum(1) == pytest.approx(1, rel=1e-5)


def test_the_versions_are_those_of_the_tests():
    """What the page says was tested is what requirements.txt installs, and what runs here; the extra asks for no less."""
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (Path(__file__).parent / "requirements.txt").read_text(), re.MULTILINE))
    rows = re.findall(r"^\| ([^|]+) \| ([\d., ]+) \|", PAGE.read_text(), re.MULTILINE)
    named = {}
    for packages, versions in rows:
        packages = re.sub(r" \(.*?\)", "", packages).lower().split(", ")
        named |= dict(zip(packages, versions.split(", "), strict=True))
    assert len(named) == 6 and named.items() <= pinned.items()
    assert {name: metadata.version(name) for name in named} == named
    extra = re.search(r"^integrations = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', extra))
    assert least.keys() == named.keys() and all(named[name].startswith(version) for name, version in least.items())
