"""`absgd-fast doctor --selftest`: its stored vectors are the oracle's, every backend passes, and a wrong number fails."""

import copy
import json

import pytest
import selftest_vectors
import torch

from absgd_fast import _backend, selftest
from absgd_fast.__main__ import main

PLACES = {str(where): where for where in selftest.places()}


def test_the_stored_vectors_are_what_the_oracle_computes():
    """Up to the last digits, in which exp and log differ between machines. `python tests/selftest_vectors.py` writes them."""
    made, stored = selftest_vectors.all_checks(), selftest.vectors()
    assert [check["name"] for check in made] == [check["name"] for check in stored]
    for one, other in zip(made, stored):
        inputs, expected = ({k: v for k, v in check.items() if k != "expected"} for check in (one, other))
        assert json.loads(json.dumps(inputs)) == expected, one["name"]
        assert one["expected"].keys() == other["expected"].keys()
        for name, values in one["expected"].items():
            deviation = selftest.deviation(torch.tensor(values, dtype=torch.float64), other["expected"][name])
            assert deviation <= 1e-13, (one["name"], name, deviation)


def test_inputs_are_exact_in_every_dtype():
    """Otherwise a narrow dtype would be blamed for the rounding of its input."""
    places = "logits", "losses", "hidden", "weight", "params", "gradients", "per_sample_grads", "products"
    seen = 0
    for check in selftest.vectors():
        for holder in [check, *check.get("batches", []), check.get("given", {})]:
            for name in places:
                for x in selftest_vectors.numbers(holder.get(name, [])):
                    assert all(float(torch.tensor(x, dtype=dtype)) == x for dtype in selftest.ALL), (check["name"], name, x)
                    seen += 1
    assert seen > 10_000


@pytest.mark.parametrize("dtype", selftest.ALL, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_every_backend_passes(where, dtype):
    outcome = selftest.run_in(PLACES[where], dtype)
    assert not outcome.failures and outcome.worst <= 1
    assert outcome.checks == sum(dtype in selftest.KINDS[check["kind"]][1] for check in selftest.vectors()) > 50


def test_every_cpu_backend_is_tried():
    """The reference, and the CPU kernels with each instruction set that this machine has; afterwards the one of before serves."""
    before = _backend.cpu_isa()
    assert [str(where) for where in selftest.places() if where.device == "cpu" and where.backend != "triton"] == [
        "reference, cpu",
        *(f"cpu, {isa}" for isa in _backend.cpu_isas()),
    ]
    used = set()
    for where in selftest.places():
        with where.chosen():
            used.add(_backend.cpu_isa())
    assert used == set(_backend.cpu_isas()) | {before} and _backend.cpu_isa() == before


FIRST_OF_KIND = {check["kind"]: check for check in reversed(selftest.vectors())}


@pytest.mark.parametrize("kind", FIRST_OF_KIND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_wrong_number_is_found(kind, dtype):
    """The largest element of any result, wrong by three times the tolerance: as an error of a formula would be, or more."""
    right = FIRST_OF_KIND[kind]
    for name in right["expected"]:
        wrong = copy.deepcopy(right)
        values = torch.tensor(wrong["expected"][name], dtype=torch.float64)
        values.view(-1)[values.abs().argmax()] *= 1 + 3 * selftest.TOLERANCES[dtype]
        wrong["expected"][name] = values.tolist()
        outcome = selftest.run_in(selftest.Where("reference", "cpu"), dtype, [right, wrong])
        assert outcome.checks == 2 and outcome.worst > 1
        assert len(outcome.failures) == 1 and f"{right['name']}: {name} deviates" in outcome.failures[0]


def test_what_a_backend_raises_is_a_failure(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a kernel is broken")

    monkeypatch.setitem(selftest.KINDS, "rectified", (broken, selftest.REAL))
    outcome = selftest.run_in(selftest.Where("reference", "cpu"), torch.float32)
    assert [failure for failure in outcome.failures if "ZeroDivisionError: a kernel is broken" in failure] == outcome.failures
    assert len(outcome.failures) == 1 and outcome.worst == float("inf")


@pytest.mark.parametrize(
    "got, expected",
    [([1.0, float("nan")], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, float("inf")], [1.0, 2.0])],
    ids=["NaN", "another shape", "infinite"],
)
def test_no_number_deviates_infinitely(got, expected):
    assert selftest.deviation(torch.tensor(got), expected) == float("inf")


def test_small_numbers_of_a_narrow_dtype_have_fewer_digits():
    smallest = torch.finfo(torch.float16).tiny
    assert selftest.deviation(torch.tensor([1e-7], dtype=torch.float16), [1.2e-7]) < 1e-3
    assert selftest.deviation(torch.tensor([smallest]), [1.1 * smallest]) > 0.09


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_the_command(form, capsys, monkeypatch):
    """Exit code 0 and a line for each backend and dtype; with a wrong vector exit code 1, and the failures on stderr."""
    monkeypatch.setattr(selftest, "places", lambda: [selftest.Where("reference", "cpu")])
    assert main(["doctor", "--selftest", *form]) == 0
    out, err = capsys.readouterr()
    assert not err
    if form:
        assert [(o["where"], o["dtype"], o["failures"]) for o in json.loads(out)["selftest"]] == [
            ("reference, cpu", str(dtype).removeprefix("torch."), []) for dtype in selftest.ALL
        ]
    else:
        assert out.count("reference, cpu") == len(selftest.ALL) and "worst deviation" in out
    wrong = copy.deepcopy(FIRST_OF_KIND["rectified"])
    wrong["expected"]["weights"][0] = 7.0
    monkeypatch.setattr(selftest, "vectors", lambda: [wrong])
    assert main(["doctor", "--selftest", *form]) == 1
    out, err = capsys.readouterr()
    assert err.count(f"{wrong['name']}: weights deviates by") == 2  # in float64 and in float32
