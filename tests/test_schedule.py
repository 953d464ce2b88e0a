"""DRW, TLA and the recipe of both: what is on in which epoch, resuming in any stage and order, copies, casts."""

import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch

import absgd_fast as ab

COUNTS = [40, 15, 5]
WEIGHT = torch.tensor([0.25, 1.25, 1.5])
X = torch.tensor([[0.4, -1.0, 2.0], [3.0, 0.3, -0.7], [0.0, 0.1, 0.2], [-2.0, 1.0, 1.5]], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 2])  # every class, so that every weight and scale enters


def drw(start, **options):
    loss = ab.VS(COUNTS, **options)
    return loss, ab.DRW(loss, WEIGHT, start)


def tla(start, **options):
    loss = ab.VS(COUNTS, **options)
    return loss, ab.TLA(loss, start)


def recipe(start, **options):
    return ab.vs_tla_adrw(COUNTS, start=start, nu=0.7, **options)


MADE = {"drw": drw, "tla": tla, "recipe": recipe}


def exact(name, on):
    """The losses before and from `start` on."""
    options = oracle.vs(COUNTS)
    if on and name != "drw":
        options["scale"] = [1.0] * 3
    if on and name != "tla":
        options["weight"] = WEIGHT if name == "drw" else torch.tensor(oracle.adrw_weights(COUNTS, 0.7))
    return oracle.logit_loss(X, Y, **options)[0]


@pytest.fixture(params=MADE)
def name(request):
    return request.param


def test_stages_differ(name):
    """Otherwise nothing below is tested."""
    assert np.abs(exact(name, True) - exact(name, False)).min() > 1e-3


@pytest.mark.parametrize("start", [0, 1, 3])
def test_start_is_the_first_epoch_that_has_it(one_backend, name, start):
    """Epochs counted from 0, step() at the end of each; alone and inside ABLoss; 0 = from the beginning."""
    loss, schedule = MADE[name](start, backend=one_backend)
    criterion, robust = ab.ABLoss(loss, lam=0.5, backend=one_backend).double(), oracle.ABLoss(0.5)
    for epoch in range(5):
        wanted = exact(name, epoch >= start)
        np.testing.assert_allclose(loss(X, Y), wanted, rtol=1e-6)  # class weights are fp32 when given
        assert float(criterion(X, Y)) == pytest.approx(robust(wanted).loss, rel=1e-6)
        schedule.step()


@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("saved_at", [0, 1, 2, 3])
@pytest.mark.parametrize("used_for", [0, 1, 2, 4])
def test_resumes_in_any_order_and_stage(name, schedule_first, saved_at, used_for):
    """Saved before, at and after the switch (start = 2), loaded by objects that are fresh or were stepped to any stage."""
    loss, schedule = MADE[name](2)
    for _ in range(saved_at):
        schedule.step()
    file = io.BytesIO()
    torch.save((loss.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed, resumed_schedule = MADE[name](2)
    for _ in range(used_for):
        resumed_schedule.step()
    pairs = list(zip((resumed, resumed_schedule), states))
    for target, state in reversed(pairs) if schedule_first else pairs:
        target.load_state_dict(state)
    for epoch in range(saved_at, 5):
        np.testing.assert_allclose(resumed(X, Y), exact(name, epoch >= 2), rtol=1e-6)
        assert torch.equal(resumed(X, Y), loss(X, Y))
        schedule.step(), resumed_schedule.step()


@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("saved_at", [0, 2])
def test_resumes_inside_abloss(name, schedule_first, saved_at):
    """The loss's state travels in the criterion's, log s beside it."""
    runs = []
    for _ in range(2):
        loss, schedule = MADE[name](1)
        runs.append((ab.ABLoss(loss, lam=0.5).double(), schedule))
    (criterion, schedule), (resumed, resumed_schedule) = runs
    for _ in range(saved_at):
        criterion(X, Y), schedule.step()
    criterion(X, Y)
    pairs = [(resumed, criterion.state_dict()), (resumed_schedule, schedule.state_dict())]
    for target, state in reversed(pairs) if schedule_first else pairs:
        target.load_state_dict(copy.deepcopy(state))
    for _ in range(3):
        assert torch.equal(criterion(X, Y), resumed(X, Y)) and torch.equal(criterion.log_s, resumed.log_s)
        schedule.step(), resumed_schedule.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [0, 2])
def test_copies(name, copied, at):
    """A copy of loss and schedule together goes on alone."""
    loss, schedule = MADE[name](2)
    for _ in range(at):
        schedule.step()
    loss(X, Y)
    other, other_schedule = copied((loss, schedule))
    for _ in range(2):
        other_schedule.step()
    np.testing.assert_allclose(other(X, Y), exact(name, True), rtol=1e-6)
    np.testing.assert_allclose(loss(X, Y), exact(name, at >= 2), rtol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_of_every_loss(case, copied, used):
    """Before and after a first call, which may keep class vectors for the next."""
    loss = case.module(3)
    if used:
        loss(X, Y)
    other = copied(loss)
    assert torch.equal(other(X, Y), loss(X, Y)) and other.state_dict().keys() == loss.state_dict().keys()
    again = case.module(3)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(X, Y), loss(X, Y))


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16", "float"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_casts(name, cast, when):
    """A model that holds the loss is cast before or after the switch: class weights follow as they do in torch, results stay."""
    loss, schedule = MADE[name](1)
    if when == "before":
        getattr(loss, cast)()
    schedule.step()
    if when == "after":
        getattr(loss, cast)()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # whatever the loss was used with before
        # a half class weight has 8 or 11 bits, X is rounded to 8
        rtol = 2**-8 if "half" in cast or "16" in cast else 1e-6
        got = loss(X.to(dtype), Y)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(
            got, exact(name, True), rtol=max(rtol, 8 * torch.finfo(dtype).eps), atol=torch.finfo(dtype).eps
        )


def test_double_class_vectors_are_double(case):
    """fp64 logits meet class vectors in fp64 even if an fp32 batch came first."""
    loss = case.module(3)
    loss(X.float(), Y)
    np.testing.assert_allclose(loss(X, Y), case.exact(X, Y, **case.options(3))[0], rtol=1e-12, atol=1e-14)


def test_drw_keeps_all_ones_before(one_backend):
    """As in the paper: class weights are 1, whatever the loss had; a buffer of the loss, in its state."""
    loss = ab.CrossEntropy(weight=torch.tensor([3.0, 4.0, 5.0]), backend=one_backend)
    schedule = ab.DRW(loss, ab.class_balanced_weights(COUNTS), start=1)
    torch.testing.assert_close(loss(X, Y), ab.CrossEntropy()(X, Y))
    assert torch.equal(loss.state_dict()["weight"], torch.ones(3))
    schedule.step()
    assert torch.equal(loss.state_dict()["weight"], ab.class_balanced_weights(COUNTS))


def test_drw_does_not_alias_the_given_weight():
    given = WEIGHT.clone()
    loss = ab.CrossEntropy()
    schedule = ab.DRW(loss, given, start=1)
    given.zero_()
    schedule.step()
    assert torch.equal(loss.weight, WEIGHT)


def test_drw_calls_set_weight_when_something_changes():
    """A subclass may have its own, which hears of each stage once, and again if somebody else has set other weights."""
    heard = []

    class Own(ab.CrossEntropy):
        def set_weight(self, weight):
            heard.append(None if weight is None else weight.tolist())
            super().set_weight(weight)

    loss, ones, given = Own(), [1.0] * len(WEIGHT), WEIGHT.tolist()
    schedule = ab.DRW(loss, WEIGHT, start=2)
    for _ in range(4):
        schedule.step()
    assert heard == [None, ones, given]
    loss.weight.fill_(3.0)
    schedule.step()
    assert heard == [None, ones, given, given] and torch.equal(loss.weight, WEIGHT)
    fresh = Own()
    again = ab.DRW(fresh, WEIGHT, start=2)
    fresh.load_state_dict(loss.state_dict())
    fresh.reset_parameters()  # as after to_empty
    assert again.count == 5 and torch.equal(fresh.weight, WEIGHT)


def test_recipe_options_reach_the_loss(one_backend):
    loss, _ = ab.vs_tla_adrw(COUNTS, start=0, gamma=0.2, tau=0.5, nu=1.5, reduction="mean", ignore_index=1, backend=one_backend)
    weight = oracle.adrw_weights(COUNTS, 1.5)
    vectors = oracle.vs(COUNTS, 0.2, 0.5) | {"scale": [1.0] * 3}
    losses, _ = oracle.logit_loss(X, Y, weight=weight, ignore_index=1, **vectors)
    assert float(loss(X, Y)) == pytest.approx(losses.sum() / weight[[0, 2, 2]].sum(), rel=1e-6)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: ab.DRW(ab.CrossEntropy(), WEIGHT, -1), ValueError, "start.*-1.*0"),
        (lambda: ab.DRW(ab.CrossEntropy(), WEIGHT, 1.5), ValueError, r"start.*1\.5.*integer >= 0, such as int\(1\.5\)"),
        (lambda: ab.TwoStage(ab.ABLoss(lam=0.5), 0.5, 0.3 * 120), ValueError, r"start: got 36\.0, .*such as int\(36\.0\)"),
        (lambda: ab.TwoStage(ab.ABLoss(lam=0.5), 0.5, float("nan")), ValueError, "start: got nan, expected an integer >= 0$"),
        (lambda: ab.TwoStage(ab.ABLoss(lam=0.5), 0.5, -1.5), ValueError, r"start: got -1\.5, expected an integer >= 0$"),
        (lambda: ab.DRW(ab.CrossEntropy(), torch.ones(3, 1), 1), ValueError, r"weight.*\(3, 1\)"),
        (lambda: ab.DRW(ab.CrossEntropy(), torch.tensor([1, 2, 3]), 1), ValueError, "weight.*int"),
        (lambda: ab.DRW(torch.nn.CrossEntropyLoss(), WEIGHT, 1), TypeError, "loss.*CrossEntropyLoss"),
        (lambda: ab.TLA(ab.CDT(COUNTS), -1), ValueError, "start.*-1.*0"),
        (lambda: ab.TLA(ab.CrossEntropy(), 1), TypeError, "loss.*CrossEntropy.*VS"),
        (lambda: ab.TLA(ab.LDAM(COUNTS), 1), TypeError, "loss.*LDAM.*VS"),
        (lambda: ab.vs_tla_adrw(COUNTS, start=-1), ValueError, "start.*-1.*0"),
        (lambda: ab.vs_tla_adrw(COUNTS, start=1, nu=-1.0), ValueError, "nu.*-1.*0"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        make()


def test_weights_of_another_length_are_found_at_the_first_batch(one_backend):
    """The number of classes is the logits': found before the switch, not at it."""
    loss = ab.CrossEntropy(backend=one_backend)
    ab.DRW(loss, torch.ones(4), start=5)
    with pytest.raises(ValueError, match=r"(?s)weight.*4.*3"):
        loss(X, Y)
