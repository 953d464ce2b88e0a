"""What a small batch costs, counted and not timed: the functions of the package that a forward enters, and its instructions."""

import json
import sys
from pathlib import Path

import pytest
import torch

import absgd_fast as ab
from absgd_fast import _backend
from benchmarks import instructions

RECORD = json.loads(instructions.RECORD.read_text())
TOLERANCE = 0.03


@pytest.mark.skipif(_backend.eager() is None, reason=f"no eager module: {_backend.why_not_eager()}")
def test_a_repeated_forward_enters_few_functions():
    """Each function of Python costs 500 to 1000 of the 170,000 instructions of a forward and backward."""
    package, entered = Path(ab.__file__).parent, []
    criterion, logits, target = ab.ABLoss(lam=0.5), torch.randn(128, 10, requires_grad=True), torch.zeros(128, dtype=torch.long)
    criterion(logits, target).backward()

    def profile(frame, event, argument):
        if event == "call" and package in Path(frame.f_code.co_filename).parents:
            entered.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        criterion(logits, target).backward()
    finally:
        sys.setprofile(before)
    assert entered == ["forward", "weighed_again", "conclude", "remember"]


def test_the_record_names_every_case():
    assert RECORD["instructions"].keys() == {*instructions.CASES, instructions.STEP}
    assert all(value > 10_000 for of_peers in RECORD["instructions"].values() for value in of_peers.values())


def test_a_count_says_what_went_wrong(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.why_not() == "valgrind and callgrind_control not found; install valgrind"
    assert instructions.main([]) == 2


@pytest.mark.deep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["128 x 10", "128 x 100", instructions.STEP])
def test_instructions(case):
    """The committed number, within 3 %."""
    if reason := instructions.why_not():
        pytest.skip(reason)
    if instructions.made_with() != RECORD["made with"]:
        pytest.skip(f"the record was made with {RECORD['made with']}, and this is {instructions.made_with()}")
    found, expected = instructions.count(case, "absgd_fast"), RECORD["instructions"][case]["absgd_fast"]
    assert abs(found / expected - 1) <= TOLERANCE, f"{case}: {found:,} instructions, the record has {expected:,}"
