"""The Python examples of a page, and what the pages call the reader's own."""

import re

import torch


def examples(page):
    """(line of the page, text) of each Python example."""
    text = page.read_text()
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text.count("\n", 0, example.start(1)) + 1, example[1]) for example in found]


def run(page, names):
    """Run the examples in their order, as a reader meets them. names: what they take for granted."""
    for line, text in examples(page):
        # the empty lines before it give a traceback the page's own numbers
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)


def stand_ins():
    """What the pages call the reader's own."""
    torch.manual_seed(0)
    batch = lambda: (torch.randn(6, 8), torch.randint(4, (6,)))  # noqa: E731
    x, y = batch()
    return {
        "model": torch.nn.Linear(8, 4),
        "make_model": lambda: torch.nn.Linear(8, 4),
        "loader": [batch()],
        "val_x": x,
        "val_y": y,
        "held_out": batch(),
        "groups": [[batch(), batch()]],
        "clean_loader": [batch()],
        "images": torch.randn(70, 8),
        "labels": torch.randint(4, (70,)),
        "backbone": torch.nn.Identity(),
        "head": torch.nn.Linear(8, 4),
        "epochs": 2,
    }
