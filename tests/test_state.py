"""The state rules (MATH §1.4): what moves, resets, saves and restores log s and the counters; schedules; errors."""

import copy
import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from conftest import identity

import absgd_fast as ab

INF, NAN = math.inf, math.nan
A = torch.tensor([0.3, 1.0, 2.5, 0.7], dtype=torch.float64)
B = torch.tensor([1.5, 0.2, 0.9, 3.0], dtype=torch.float64)


def state(criterion):
    return {k: v.clone() for k, v in criterion.state_dict().items()}


def same(a, b):
    """Equal to the bit, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7e30), b[k].nan_to_num(7e30)) for k in a)


def module(entry, backend, lam=0.5, **options):
    return ab.ABLoss(entry.criterion(backend), lam=lam, backend=backend, **options).double()


def call(criterion, entry, losses, valid=None, **keywords):
    """Value and d loss / d L."""
    leaf, args, more = entry.inputs(losses, valid)
    value = criterion(*args, **more, **keywords)
    value.backward()
    return value.detach(), entry.slope(leaf, losses)


# ---- start and averaging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, start",
    [({}, -INF), ({"init": "zero"}, -INF), ({"normalizer": "batch"}, -INF), ({"normalizer": "none"}, 0.0)],
    ids=str,
)
def test_start(options, start):
    criterion = ab.ABLoss(lam=0.5, **options)
    assert criterion.log_s.shape == criterion.lam.shape == () and float(criterion.log_s) == start
    assert float(criterion.lam) == 0.5 and int(criterion.nonfinite_batches) == 0
    buffers = dict(criterion.named_buffers())
    assert buffers.keys() == {"nonfinite_batches"}  # which may be averaged and broadcast
    assert criterion.state_dict().keys() == {"log_s", "lam", "nonfinite_batches"}
    assert not criterion.nonfinite_batches.is_floating_point()


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, [1.0, (1 - 0.75) * 1 + 0.75 * 4]),
        ({"init": "zero"}, [0.75, 0.25 * 0.75 + 0.75 * 4]),
        ({"normalizer": "batch"}, [1.0, 4.0]),
        ({"normalizer": "none"}, [1.0, 1.0]),
        ({"alpha": 0.5}, [0.5, 0.25 * 0.5 + 0.75 * 0.5 * 4]),
        ({"alpha": 0.5, "init": "zero"}, [0.375, 0.25 * 0.375 + 0.375 * 4]),
        ({"alpha": 0.5, "normalizer": "batch"}, [0.5, 2.0]),
    ],
    ids=str,
)
def test_moving_average_by_hand(backend, options, wanted):
    """lam = 1, gamma = 3/4; batch means of exp(L) of 1 and 4."""
    criterion = ab.ABLoss(lambda x: x, lam=1.0, gamma=0.75, backend=backend, **options).double()
    for batch, s in zip(([0.5, 1.5], [2.0, 6.0]), wanted):
        criterion(torch.tensor(batch, dtype=torch.float64).log())
        assert float(criterion.log_s.exp()) == pytest.approx(s, rel=1e-12)


def test_first_step_has_no_spike(backend, entry):
    for init, mean in (("first", 1.0), ("zero", 1 / 0.9)):
        criterion = module(entry, backend, init=init)
        call(criterion, entry, A)
        assert float(criterion.last.weights.mean()) == pytest.approx(mean)


# ---- what leaves it alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "update=False"])
@pytest.mark.parametrize("warm", [False, True])
def test_evaluation_computes_and_does_not_write(backend, entry, mode, warm):
    """The same value as a training step would return, bit for bit, from the start and from the middle of a run."""
    criterion = module(entry, backend)
    if warm:
        call(criterion, entry, B)
    before = state(criterion)
    _, args, _ = entry.inputs(A)
    if mode == "eval":
        value = criterion.eval()(*args)
        criterion.train()
    elif mode == "update=False":
        value = criterion(*args, update=False)
    else:
        with getattr(torch, mode)():
            value = criterion(*args)
    assert same(state(criterion), before)
    weights = criterion.last.weights.clone()
    assert torch.equal(criterion(*args).detach(), value.detach().clone())
    assert torch.equal(criterion.last.weights, weights) and not same(state(criterion), before)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "update=False"])
def test_nonfinite_batches_of_evaluation_are_not_counted(one_backend, entry, mode):
    criterion = module(entry, one_backend)
    _, args, _ = entry.inputs(torch.tensor([1.0, NAN], dtype=torch.float64))
    if mode == "eval":
        criterion.eval()
    with torch.set_grad_enabled(mode != "no_grad"):
        value = criterion(*args, **({"update": False} if mode == "update=False" else {}))
    assert value.isnan() and int(criterion.nonfinite_batches) == 0


@pytest.mark.parametrize("lam", [INF, -INF])
def test_infinite_lam_is_the_plain_mean(backend, entry, lam):
    """No mix, no normaliser, log s as it was; masked rows and sample weights count as ever."""
    criterion = module(entry, backend, lam=lam, mix=1.0)
    criterion.log_s.fill_(0.75)
    valid = [True, True, False, True]
    value, slope = call(criterion, entry, A, valid)
    assert value.item() == pytest.approx(2 / 3) and float(criterion.log_s) == 0.75
    np.testing.assert_allclose(slope, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-12)
    assert criterion.last.weights.tolist() == [1, 1, 0, 1]
    assert float(criterion.objective) == pytest.approx(2 / 3)
    value, _ = call(criterion, entry, A, sample_weight=torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    assert value.item() == pytest.approx((0.3 + 2.0) / 4)


@pytest.mark.parametrize("lam", [0.5, -0.5, INF])
@pytest.mark.parametrize(
    "options", [{}, {"normalizer": "batch"}, {"normalizer": "none"}, {"mix": 1.0}, {"init": "zero"}], ids=str
)
@pytest.mark.parametrize("warm", [False, True])
def test_no_valid_row(backend, entry, lam, options, warm):
    """An empty batch and an all-ignored one: loss 0, gradient 0, state as it was."""
    criterion = module(entry, backend, lam, **options)
    if warm:
        call(criterion, entry, B)
    before = state(criterion)
    for losses, valid in ((A[:0], None), (A, [False] * 4)):
        leaf, args, more = entry.inputs(losses, valid)
        value = criterion(*args, **more)
        value.backward()
        assert value.item() == 0 and value.shape == () and leaf.grad.abs().sum() == 0
        assert same(state(criterion), before) and criterion.last.weights.tolist() == [0.0] * len(losses)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("lam", [0.5, -0.5])
@pytest.mark.parametrize("options", [{}, {"normalizer": "batch"}, {"mix": 1.0}, {"max_weight": 1.1}], ids=str)
def test_nonfinite_row(backend, entry, bad, lam, options):
    """The loss and the bad row are NaN, the others are as without it, log s stays, it is counted, and the next step is right."""
    criterion, exact = module(entry, backend, lam, **options), oracle.ABLoss(lam, **options)
    call(criterion, entry, B), exact(B)
    before = criterion.log_s.clone()
    for count in (1, 2):
        broken = A.clone()
        broken[count] = bad
        value, slope = call(criterion, entry, broken)
        forward = exact(broken)
        assert math.isnan(value) and torch.equal(criterion.log_s, before)
        assert int(criterion.nonfinite_batches) == count == exact.nonfinite_batches
        np.testing.assert_allclose(slope, forward.grad, rtol=1e-11)
        np.testing.assert_allclose(criterion.last.weights, forward.weights, rtol=1e-11)
    value, slope = call(criterion, entry, A)
    np.testing.assert_allclose([value.item(), *slope], [(f := exact(A)).loss, *f.grad], rtol=1e-11)
    assert float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-11)


def test_nonfinite_row_under_a_mask_is_nothing(backend, entry):
    """Ignored rows may hold anything."""
    valid = [True, False, True, True]
    broken = A.clone()
    broken[1] = NAN
    criterion, exact = module(entry, backend), oracle.ABLoss(0.5)
    value, slope = call(criterion, entry, broken, valid)
    forward = exact(A, mask=valid)
    np.testing.assert_allclose([value.item(), *slope[[0, 2, 3]]], [forward.loss, *forward.grad[[0, 2, 3]]], rtol=1e-11)
    assert float(criterion.log_s) == pytest.approx(exact.log_s) and int(criterion.nonfinite_batches) == 0
    leaf, args, more = entry.inputs(broken, valid)
    criterion(*args, **more).backward()
    if entry.zeroes_ignored:
        assert leaf.grad[1].abs().sum() == 0


def test_all_rows_nonfinite(backend, entry):
    criterion = module(entry, backend)
    call(criterion, entry, B)
    before = criterion.log_s.clone()
    value, slope = call(criterion, entry, torch.full((3,), NAN, dtype=torch.float64))
    assert math.isnan(value) and torch.isnan(slope).all() and torch.equal(criterion.log_s, before)
    assert int(criterion.nonfinite_batches) == 1


def test_overflow_of_the_exponent_is_nonfinite(one_backend):
    """A finite loss whose L/lam is infinite in the state's precision."""
    criterion = ab.ABLoss(lambda x: x, lam=1e-10, backend=one_backend)
    criterion(torch.tensor([1e-10, 2e-10]))
    before = criterion.log_s.clone()
    leaf = torch.tensor([1e30, 1e-10], requires_grad=True)
    value = criterion(leaf)
    value.backward()
    assert not math.isfinite(value) and torch.equal(criterion.log_s, before) and int(criterion.nonfinite_batches) == 1
    assert math.isnan(leaf.grad[0]) and math.isfinite(leaf.grad[1])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nonfinite_row_at_infinite_lam(backend, entry, bad):
    """The plain mean of a batch with a bad row is not finite either, and nothing is written."""
    criterion = module(entry, backend, lam=INF)
    broken = A.clone()
    broken[1] = bad
    value, _ = call(criterion, entry, broken)
    assert not math.isfinite(value) and float(criterion.log_s) == -INF


# ---- lam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("options, start", [({}, -INF), ({"init": "zero"}, -INF), ({"normalizer": "none"}, 0.0)], ids=str)
def test_set_lam(backend, entry, reset, options, start):
    """A new lam is a new scale: log s starts again, unless told otherwise; the next step uses the new lam."""
    criterion, exact = module(entry, backend, **options), oracle.ABLoss(0.5, **options)
    call(criterion, entry, A), exact(A)
    criterion.set_lam(-0.8, **({} if reset else {"reset": False}))
    exact.lam, exact.log_s = -0.8, start if reset else exact.log_s
    assert float(criterion.lam) == -0.8 and float(criterion.log_s) == pytest.approx(exact.log_s)
    value, slope = call(criterion, entry, B)
    forward = exact(B)
    np.testing.assert_allclose([value.item(), *slope], [forward.loss, *forward.grad], rtol=1e-11)
    assert float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-11)


def test_set_lam_to_infinity_and_back(one_backend, entry):
    criterion = module(entry, one_backend)
    call(criterion, entry, A)
    criterion.set_lam(INF)
    assert float(call(criterion, entry, B)[0]) == pytest.approx(float(B.mean()))
    criterion.set_lam(0.5)
    assert float(call(criterion, entry, B)[0]) == pytest.approx(oracle.ABLoss(0.5)(B).loss)


@pytest.mark.parametrize("r", [-0.5, 2.0])
def test_relative_lam(backend, entry, r):
    """lam = r x the plain mean of the valid rows of the first training batch, which already uses it; then fixed."""
    criterion = module(entry, backend, ab.RelativeLam(r))
    assert math.isnan(criterion.lam)
    with torch.no_grad():
        _, args, _ = entry.inputs(B)
        assert float(criterion(*args)) == pytest.approx(float(B.mean()))  # not fixed yet: the plain mean
    assert math.isnan(criterion.lam) and float(criterion.log_s) == -INF
    valid = [True, False, True, True]
    exact = oracle.ABLoss(r * float(A[valid].mean()))
    for losses, rows in ((A, valid), (B, None), (A, None)):
        value, slope = call(criterion, entry, losses, rows)
        forward = exact(losses, mask=rows)
        assert float(criterion.lam) == pytest.approx(exact.lam, rel=1e-12)
        np.testing.assert_allclose([value.item(), *slope], [forward.loss, *forward.grad], rtol=1e-10)
        assert float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-10)


@pytest.mark.parametrize("unfit", [[NAN, 1.0], [0.0, 0.0], []], ids=["nan", "zero", "empty"])
def test_relative_lam_waits_for_a_fit_batch(one_backend, unfit):
    """A mean that is 0 or not finite cannot be a scale; till then the loss is the plain mean and lam stays open."""
    criterion = ab.ABLoss(lambda x: x, lam=ab.RelativeLam(-0.5), backend=one_backend).double()
    value = criterion(torch.tensor(unfit, dtype=torch.float64))
    assert math.isnan(criterion.lam) and float(criterion.log_s) == -INF
    assert math.isnan(value) if NAN in unfit else value.item() == 0
    criterion(A)
    assert float(criterion.lam) == pytest.approx(-0.5 * float(A.mean()))


def test_relative_lam_is_saved(one_backend):
    """Open or fixed, it comes back as it was, into a module made with another share."""
    source, target = (ab.ABLoss(lambda x: x, lam=ab.RelativeLam(r), backend=one_backend).double() for r in (-0.5, -0.9))
    source(A)
    target.load_state_dict(source.state_dict())
    assert float(target.lam) == float(source.lam)
    assert torch.equal(target(B), source(B)) and float(target.lam) == pytest.approx(-0.5 * float(A.mean()))
    still_open = ab.ABLoss(lambda x: x, lam=ab.RelativeLam(-0.5), backend=one_backend).double()
    target.load_state_dict(still_open.state_dict())
    assert math.isnan(target.lam)


def test_set_lam_takes_a_relative_one(one_backend):
    criterion = ab.ABLoss(lambda x: x, lam=INF, backend=one_backend).double()
    criterion(A)
    criterion.set_lam(ab.RelativeLam(-0.5))
    criterion(B)
    assert float(criterion.lam) == pytest.approx(-0.5 * float(B.mean()))


# ---- saving, casting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.3, "init": "zero"}, {"normalizer": "batch"}, {"normalizer": "none"}], ids=str
)
def test_state_dict_continues_identically(one_backend, entry, options, tmp_path):
    """Through a file, after a bad batch too: the same values and the same state, to the bit."""
    first = module(entry, one_backend, **options)
    for losses in (A, torch.tensor([1.0, NAN], dtype=torch.float64), B):
        call(first, entry, losses)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = module(entry, one_backend, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(state(first), state(second)) and int(second.nonfinite_batches) == 1
    for losses in (A, B):
        ours, theirs = call(first, entry, losses), call(second, entry, losses)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and same(state(first), state(second))


@pytest.mark.filterwarnings("ignore:.*the loaded state has lam")  # tests/test_resume.py has the warning
def test_saved_lam_wins(one_backend):
    """A run resumed with another lam on the command line goes on as it was."""
    saved = ab.ABLoss(lam=-0.7, backend=one_backend).state_dict()
    criterion = ab.ABLoss(lam=0.5, backend=one_backend)
    criterion.load_state_dict(saved)
    assert float(criterion.lam) == pytest.approx(-0.7)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_state_stays_single_when_the_module_is_cast_to_half(one_backend, cast):
    """fp32 whatever the dtype of the model: an average in 8 bits would not move."""
    criterion = getattr(ab.ABLoss(lam=0.3, backend=one_backend), cast)()
    assert criterion.log_s.dtype == criterion.lam.dtype == torch.float32
    assert float(criterion.lam) == pytest.approx(0.3, rel=1e-7)
    assert criterion.to(torch.float64).log_s.dtype == torch.float64


def test_double_is_double(one_backend):
    """1e-12 relative: out of reach of an fp32 state. (lam is one: 0.25 is exact in it.)"""
    criterion = ab.ABLoss(lambda x: x, lam=0.25, backend=one_backend).double()
    exact = oracle.ABLoss(0.25)
    for losses in (A, B, A):
        assert float(criterion(losses)) == pytest.approx(exact(losses).loss, rel=1e-12)
    assert criterion.log_s.dtype == torch.float64 and float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-12)


def test_state_of_a_parent_module(one_backend):
    """As part of a model: its buffers travel with the model's state_dict, and it has no parameters."""
    model = torch.nn.ModuleDict({"loss": ab.ABLoss(lambda x: x, lam=0.3, backend=one_backend)})
    model["loss"](A)
    assert "loss.log_s" in model.state_dict() and not list(model.parameters())


# ---- TwoStage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_two_stage(one_backend, start, unit):
    """lam = inf when made, `lam` once `start` calls of step() were made; log s begins there, and is not reset later."""
    criterion = ab.ABLoss(lambda x: x, lam=9.0, backend=one_backend).double()
    schedule = ab.TwoStage(criterion, -0.5, start, unit=unit)
    exact = oracle.ABLoss(INF)
    for calls in range(5):
        exact.lam = -0.5 if calls >= start else INF
        assert float(criterion.lam) == exact.lam
        for losses in (A, B):
            assert float(criterion(losses)) == pytest.approx(exact(losses).loss, rel=1e-12)
        schedule.step()
    assert float(criterion.log_s) == pytest.approx(exact.log_s)


def test_two_stage_resumes(one_backend):
    """Saved before, at and after the switch: the copy switches when the original does and keeps log s."""
    for calls in range(4):
        runs = []
        for _ in range(2):
            criterion = ab.ABLoss(lambda x: x, lam=9.0, backend=one_backend).double()
            runs.append((criterion, ab.TwoStage(criterion, 0.5, 2)))
        (criterion, schedule), (resumed, resumed_schedule) = runs
        for _ in range(calls):
            criterion(A), schedule.step()
        criterion(A)
        resumed.load_state_dict(copy.deepcopy(criterion.state_dict()))
        resumed_schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
        for _ in range(3):
            assert float(resumed.lam) == float(criterion.lam)
            assert torch.equal(criterion(B), resumed(B)) and torch.equal(criterion.log_s, resumed.log_s)
            schedule.step(), resumed_schedule.step()
        assert float(criterion.lam) == 0.5


def test_two_stage_takes_a_relative_lam(one_backend):
    """The share is of the first batch of the second stage."""
    criterion = ab.ABLoss(lambda x: x, lam=1.0, backend=one_backend).double()
    schedule = ab.TwoStage(criterion, ab.RelativeLam(-0.5), 1)
    assert float(criterion(A)) == pytest.approx(float(A.mean()))
    schedule.step()
    criterion(B)
    assert float(criterion.lam) == pytest.approx(-0.5 * float(B.mean()))


@pytest.mark.parametrize("bad", [{"lam": 0.0}, {"lam": NAN}, {"unit": "minute"}, {"start": -1}], ids=str)
def test_two_stage_errors(bad):
    criterion = ab.ABLoss(lam=0.5)
    with pytest.raises(ValueError, match=next(iter(bad))):
        ab.TwoStage(criterion, **({"lam": 1.0, "start": 2} | bad))
    assert float(criterion.lam) == 0.5


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lam": 0.0}, "lam.*0"),
        ({"lam": 0}, "lam.*0"),
        ({"lam": NAN}, "lam.*nan"),
        ({"lam": 1e-50}, "lam.*1e-50"),  # 0 in the state's fp32
        ({"gamma": 0.0}, "gamma.*0"),
        ({"gamma": 1.1}, r"gamma.*1\.1"),
        ({"gamma": NAN}, "gamma.*nan"),
        ({"alpha": 0.0}, "alpha.*0"),
        ({"alpha": 1.1}, r"alpha.*1\.1"),
        ({"init": "ones"}, "init.*ones.*first"),
        ({"normalizer": "layer"}, "normalizer.*layer.*moving"),
        ({"backend": "abacus"}, "backend.*abacus"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=f"(?is){words}"):
        ab.ABLoss(**({"lam": 1.0} | options))


def test_lam_is_required():
    with pytest.raises((TypeError, ValueError), match="lam"):
        ab.ABLoss()


@pytest.mark.parametrize(
    "kind, criterion, words",
    [
        ("ABLoss", -0.5, r"criterion: got the float -0\.5, .*; lambda is a keyword: ABLoss\(lam=-0\.5\)$"),
        ("LinearABLoss", 2, r"criterion: got the int 2, .*: LinearABLoss\(lam=2\)$"),
        ("ABLoss", ab.RelativeLam(-0.5), r"ABLoss\(lam=RelativeLam\(-0\.5\)\)$"),
        ("ABLoss", ab.TargetESS(0.6), r"ABLoss\(lam=TargetESS\(0\.6\)\)$"),
        ("ABLoss", "ce", "criterion: got str, expected a callable that returns per-sample losses$"),
        ("ABLoss", True, "criterion: got bool, expected a callable that returns per-sample losses$"),
    ],
)
def test_lam_in_place_of_the_criterion(kind, criterion, words):
    with pytest.raises(TypeError, match=words):
        getattr(ab, kind)(criterion)


@pytest.mark.parametrize("r", [0.0, NAN])
def test_bad_relative_lam(r):
    with pytest.raises(ValueError, match="r: got"):
        ab.ABLoss(lam=ab.RelativeLam(r))


LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "inner, args, keywords, error, words",
    [
        (torch.nn.CrossEntropyLoss(), (LOGITS, TARGET), {}, ValueError, 'reduction="none"'),
        (lambda x, y: x.sum(), (LOGITS, TARGET), {}, ValueError, r'shape \(\).*\(B,\).*reduction="none"'),
        (None, (LOGITS, TARGET.float()), {}, TypeError, "float32"),
        (None, (LOGITS, torch.tensor([0, 1, 5, 3])), {}, IndexError, r"\b5\b.*\b2\b|\b2\b.*\b5\b"),
        (None, (LOGITS, torch.tensor([0, -7, 5, 0])), {}, IndexError, r"-7\b.*\b1\b|\b1\b.*-7\b"),
        (None, (LOGITS, TARGET[:3]), {}, ValueError, "3"),
        (None, (LOGITS, TARGET), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask.*3.*4"),
        (None, (LOGITS, TARGET), {"sample_weight": torch.ones(5)}, ValueError, "sample_weight.*5.*4"),
        (None, (LOGITS, TARGET), {"score": torch.ones(2, 2)}, ValueError, "score.*2, 2.*4"),
    ],
    ids=["mean", "scalar", "float labels", "label 5", "label -7", "3 labels", "mask", "sample_weight", "score"],
)
@pytest.mark.parametrize("lam", [0.5, ab.RelativeLam(-0.5)], ids=["fixed", "open"])
def test_bad_calls_leave_the_state(one_backend, inner, args, keywords, error, words, lam):
    """From the middle of a run (fixed lam) and before lam is known."""
    criterion = ab.ABLoss(inner, lam=lam, backend=one_backend)
    if lam == 0.5:
        criterion.log_s.fill_(0.25)
    before = state(criterion)
    with pytest.raises(error, match=f"(?is){words}"):
        criterion(*args, **keywords)
    assert same(state(criterion), before)


def test_reduced_fused_loss_is_refused():
    with pytest.raises(ValueError, match='reduction="none"'):
        ab.ABLoss(ab.CrossEntropy(reduction="mean"), lam=1.0)(LOGITS, TARGET)


@pytest.mark.parametrize("lam", [0.0, NAN])
def test_bad_set_lam_leaves_the_state(one_backend, lam):
    criterion = ab.ABLoss(lam=0.5, backend=one_backend)
    criterion(LOGITS.clone().requires_grad_(), TARGET)
    before = state(criterion)
    with pytest.raises(ValueError, match="lam"):
        criterion.set_lam(lam)
    assert same(state(criterion), before) and math.isfinite(criterion.log_s)


def test_batch_on_another_device_than_the_state(one_backend, entry):
    """A meta tensor stands for the other device."""
    criterion = ab.ABLoss(entry.criterion(one_backend), lam=0.5, backend=one_backend)
    before = state(criterion)
    _, args, _ = entry.inputs(A)
    with pytest.raises((ValueError, RuntimeError), match="(?s)meta.*cpu|cpu.*meta"):
        criterion(*(a.to("meta") for a in args))
    assert same(state(criterion), before)


def test_error_in_the_criterion_passes_through(one_backend):
    def broken(x):
        raise KeyError("mine")

    criterion = ab.ABLoss(broken, lam=0.5, backend=one_backend)
    with pytest.raises(KeyError, match="mine"):
        criterion(A)
    assert float(criterion.log_s) == -INF


def test_lambda_is_exact_in_float64():
    """float32 makes 0.1000000015 of it; whoever writes the buffer afterwards means what is written."""
    assert float(ab.ABLoss(lam=0.1).double().lam) == 0.1
    assert float(ab.ABLoss(rule=partial(ab.weights.term, t=3.0)).double().lam) == 1 / 3
    criterion = ab.ABLoss(lam=0.1)
    criterion.lam.fill_(0.7)
    assert float(criterion.double().lam) == pytest.approx(0.7, rel=1e-7) and float(criterion.lam) != 0.7
    assert float(criterion.float().lam) == pytest.approx(0.7, rel=1e-7)


# ---- copies, and what a user replaces afterwards ------------------------------------------------------------------------


def test_a_rule_can_be_replaced(one_backend):
    """The criterion weighs by the rule that it shows."""
    criterion = ab.ABLoss(identity, rule=Constant(1.0), backend=one_backend)
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    assert float(criterion(losses).detach()) == pytest.approx(2.0)
    criterion.rule = Constant(3.0)
    assert float(criterion(losses).detach()) == pytest.approx(6.0)


class Constant(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, losses):
        return torch.full_like(losses, self.weight)


@pytest.mark.parametrize("copied", [copy.copy, lambda c: c._replicate_for_data_parallel()], ids=["copy", "replica"])
def test_a_shallow_copy_remembers_its_own_forward(one_backend, copied):
    criterion = ab.ABLoss(identity, lam=0.5, backend=one_backend)
    criterion(torch.ones(3, requires_grad=True))
    other = copied(criterion)
    assert float(other.last.mean_loss) == 1.0
    other(torch.full((3,), 5.0, requires_grad=True))
    assert float(criterion.last.mean_loss) == 1.0 and float(other.last.mean_loss) == 5.0


@pytest.mark.parametrize("options", [{"deferred": True}, {"loss_divisor": 2.0}], ids=str)
def test_what_is_shared_goes_through_no_transform(one_backend, options):
    """Said before an open RelativeLam looks into the losses."""
    criterion = ab.ABLoss(identity, lam=ab.RelativeLam(0.5), process_group=None, backend=one_backend, **options)
    with pytest.raises(RuntimeError, match="do not go through torch.func transforms"):
        torch.func.vmap(criterion)(torch.ones(2, 3, requires_grad=True))
