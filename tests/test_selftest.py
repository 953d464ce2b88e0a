"""`absgd-fast doctor --selftest`: its stored vectors are the oracle's, every backend passes, and a wrong number fails."""

import copy
import json
import re

import pytest
import selftest_vectors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
            stored_values = other["expected"][name]
            if isinstance(values, dict):
                assert values["every"] == stored_values["every"]
                values, stored_values = values["values"], stored_values["values"]
            deviation = selftest.deviation(name, torch.tensor(values, dtype=torch.float64), stored_values)
            assert deviation <= 1e-13, (one["name"], name, deviation)


def test_inputs_are_exact_in_every_dtype():
    """Otherwise a narrow dtype would be blamed for the rounding of its input."""
    places = "logits", "losses", "hidden", "weight", "params", "gradients", "per_sample_grads", "products", "upstream"
    seen = 0
    for check in selftest.vectors():
        for holder in [check, *check.get("batches", []), check.get("given", {})]:
            for name in places:
                values = holder.get(name, [])
                if isinstance(values, dict):
                    x = selftest.large(**values)
                else:
                    x = torch.tensor(list(selftest_vectors.numbers(values)), dtype=torch.float64)
                assert all(torch.equal(x.to(dtype).double(), x.double()) for dtype in selftest.ALL), (check["name"], name)
                seen += x.numel()
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
LARGE = [check for check in selftest.vectors() if any(isinstance(x, dict) for x in check["expected"].values())]
CHECKS = {check["name"]: check for check in [*FIRST_OF_KIND.values(), *LARGE]}


def damaged(values, how, tolerance):
    """The expected values with one fault."""
    x = torch.tensor(values, dtype=torch.float64)
    if how == "a row" and x.dim() > 1:
        x[int(x.abs().sum(tuple(range(1, x.dim()))).ne(0).nonzero()[0])] = 0
    else:
        flat = x.view(-1)
        flat[flat.abs().argmax()] *= 1 + 3 * tolerance
    return x.tolist()


@pytest.mark.parametrize("how", ["the largest", "a row"])
@pytest.mark.parametrize("name", CHECKS)
def test_a_wrong_number_is_found(name, how):
    """The largest element of any result, wrong by three times the tolerance; or a row that is missing.

    Rows of logits are measured by themselves, so a missing one is found in the coarsest dtype too, whatever its weight.
    """
    right = CHECKS[name]
    by_rows = right["kind"] in ("logits", "robust logits", "deferred") and right not in LARGE
    dtype = torch.float64 if how == "the largest" else selftest.KINDS[right["kind"]][1][-1] if by_rows else torch.float32
    for result, values in right["expected"].items():
        wrong = copy.deepcopy(right)
        if isinstance(values, dict):
            wrong["expected"][result]["values"] = damaged(values["values"], how, selftest.TOLERANCES[dtype])
        else:
            wrong["expected"][result] = damaged(values, how, selftest.TOLERANCES[dtype])
        outcome = selftest.run_in(selftest.Where("reference", "cpu"), dtype, [right, wrong])
        assert outcome.checks == 2 and outcome.worst > 1, result
        assert len(outcome.failures) == 1 and f"{right['name']}: {result} deviates" in outcome.failures[0]


class Called(TorchDispatchMode):
    """The operators of the package that are called while it is active. (Then the eager module leaves all to the dispatcher.)"""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "absgd_fast":
            self.names.add(function._schema.name.removeprefix("absgd_fast::"))
        return function(*args, **kwargs or {})


# what has no result of its own: it is asked by `doctor`, plans a step, or marks what a graph has
AROUND = {"isas", "use_isa", "native_signatures", "cuda_signatures", "cuda_unbound", "cuda_versions"}


def test_every_operator_is_called():
    """Otherwise a kernel would be broken somewhere, and the self-test would not know it."""
    with Called() as called:
        for dtype in (torch.float32, torch.bfloat16):
            assert not selftest.run_in(selftest.Where("cpu", "cpu", _backend.cpu_isa()), dtype).failures
    missing = set(_backend.native_signatures("cpu")) - called.names - AROUND
    assert not missing, missing


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
    assert selftest.deviation("value", torch.tensor(got), expected) == float("inf")


def test_small_numbers_of_a_narrow_dtype_have_fewer_digits():
    smallest = torch.finfo(torch.float16).tiny
    assert selftest.deviation("value", torch.tensor([1e-7], dtype=torch.float16), [1.2e-7]) < 1e-3
    assert selftest.deviation("value", torch.tensor([smallest]), [1.1 * smallest]) > 0.09


def test_what_does_not_run_is_said(monkeypatch):
    """A backend that cannot run, a device without a dtype, and a device that stops answering."""
    found = {o.where: o.not_run for o in selftest.run() if o.not_run}
    assert found == {name: _backend.why_not(name) for name in _backend.NAMES if _backend.why_not(name)}
    assert not selftest.Where("reference", "cpu").why_not(torch.float64)
    reason = selftest.Where("cuda", "cuda:0").why_not(torch.float64)
    assert torch.cuda.is_available() or reason

    device = selftest.Where("reference", "cpu")
    answers = iter([None, "it is lost"])
    monkeypatch.setattr(selftest, "places", lambda: [device, device])
    monkeypatch.setattr(selftest.Where, "why_not", lambda self, dtype: next(answers))
    wrong = copy.deepcopy(FIRST_OF_KIND["rectified"])
    wrong["expected"]["weights"][0] = 7.0
    monkeypatch.setattr(selftest, "vectors", lambda: [wrong])
    outcomes = [o for o in selftest.run() if o.where == str(device)]
    assert [(len(o.failures), o.not_run) for o in outcomes] == [(1, None), (0, "the device does not answer any more: it is lost")]


def test_a_wrong_setting_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("ABSGD_FAST_ISA", "bogus")
    monkeypatch.setattr(_backend, "_load", _backend._load.__wrapped__)
    assert main(["doctor"]) == 2
    assert "instruction set: got 'bogus'" in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_the_command(form, capsys, monkeypatch):
    """Exit code 0 and a line for each backend and dtype; with a wrong vector exit code 1, and the failures on stderr."""
    monkeypatch.setattr(selftest, "places", lambda: [selftest.Where("reference", "cpu")])
    assert main(["doctor", "--selftest", *form]) == 0
    out, err = capsys.readouterr()
    verdict = r"All \d{3} checks passed\.\n"
    assert re.fullmatch(verdict if form else "", err)  # stdout is JSON then, and nothing else
    if form:
        assert [(o["where"], o["dtype"], o["failures"]) for o in json.loads(out)["selftest"] if not o["not_run"]] == [
            ("reference, cpu", str(dtype).removeprefix("torch."), []) for dtype in selftest.ALL
        ]
    else:
        assert out.count("reference, cpu") == len(selftest.ALL) and "worst deviation" in out and re.search(verdict + "$", out)
        assert out.count("not run: ") == sum(_backend.why_not(name) is not None for name in _backend.NAMES)
    wrong = copy.deepcopy(FIRST_OF_KIND["rectified"])
    wrong["expected"]["weights"][0] = 7.0
    monkeypatch.setattr(selftest, "vectors", lambda: [wrong])
    assert main(["doctor", "--selftest", *form]) == 1
    out, err = capsys.readouterr()
    assert err.count(f"{wrong['name']}: weights deviates by") == 2  # in float64 and in float32
    assert (err if form else out).endswith("2 of 2 checks failed.\n")
