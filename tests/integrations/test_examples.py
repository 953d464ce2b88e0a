"""Every script of examples/ runs as its first lines say, and is short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import two_processes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMAND = re.compile(r"Run it with: (.+)")
LAUNCHERS = {"python": [sys.executable], "torchrun": two_processes.TORCHRUN}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    launcher, *arguments = shlex.split(COMMAND.search(text)[1])
    assert arguments[-1] == path.relative_to(ROOT).as_posix()
    command = [*LAUNCHERS[launcher], *arguments[:-1], str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2, result.stdout
    accuracies = [float(found) for found in re.findall(r"accuracy ([\d.]+)", result.stdout)]
    assert not accuracies or accuracies[0] < accuracies[-1], result.stdout  # the plain loss is the first, the robust one the last
