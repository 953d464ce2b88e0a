"""The wheel that `make wheel` has left in dist/, and the Pythons that it serves."""

import json
import os
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHONS = os.environ.get("ABSGD_FAST_PYTHONS", "python3.10 python3.11 python3.12 python3.13").split()


@pytest.fixture(scope="session")
def wheel():
    found = sorted(ROOT.glob("dist/*.whl"))
    assert len(found) == 1, f"expected one wheel in dist/, found {[path.name for path in found]}; run `make wheel`"
    return found[0]


@pytest.fixture(scope="session")
def info(wheel):
    """What the build has noted (CMakeLists.txt)."""
    with zipfile.ZipFile(wheel) as file:
        return json.loads(file.read("absgd_fast/_build_info.json"))
