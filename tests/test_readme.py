"""Every Python example of the README runs, with small stand-ins for what it takes for granted."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import absgd_fast as ab

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the examples have in common; each adds to it, as they do for a reader."""
    torch.manual_seed(0)
    batch = lambda: (torch.randn(6, 8), torch.randint(4, (6,)))  # noqa: E731
    model = torch.nn.Linear(8, 4)
    return {
        "torch": torch,
        "ab": ab,
        "model": model,
        "loader": [batch()],
        "groups": [[batch(), batch()]],
        "counts": [40, 20, 10, 5],
        "hidden": torch.randn(6, 8, requires_grad=True),
        "head": torch.nn.Linear(8, 4),
        "target": torch.randint(4, (6,)),
        "images": torch.randn(70, 8),
        "labels": torch.randint(4, (70,)),
        "backbone": torch.nn.Identity(),
        "epochs": 2,
        "clean_loader": [batch()],
    }


def test_there_are_examples():
    assert len(BLOCKS) >= 9


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(names, number):
    text = textwrap.dedent(BLOCKS[number])
    if "finish_" in text:  # the end of the loop above it, without robust=
        names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
        x, y = names["loader"][0]
        names["criterion"](names["model"](x), y).backward()
    exec(compile(text, f"README.md, example {number}", "exec"), names)
