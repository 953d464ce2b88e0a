"""Gradients of a deferred step that are clipped before an optimizer with robust= has finished them: it warns once."""

import copy
import warnings

import pytest
import torch
from optim_cases import each_optimizer
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")
WRITTEN = "gradients that were changed in place after backward"


class Loop:
    """A deferred training with an optimizer that finishes its steps."""

    def __init__(self, cls=ab.ABSGD, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.criterion = ab.ABLoss(lam=0.5, deferred=True)
        self.optimizer = cls(self.model.parameters(), lr=0.1, robust=self.criterion, **options)

    def accumulate(self, wrap=lambda loss: loss):
        for rows in (5, 2, 7):
            wrap(self.criterion(self.model(torch.randn(rows, 4)), torch.randint(3, (rows,)))).backward()

    def run(self, spoil=lambda params: None, steps=4, **zero):
        """The warnings of a few steps."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(steps):
                self.optimizer.zero_grad(**zero)
                self.accumulate()
                spoil(list(self.model.parameters()))
                self.optimizer.step()
        return [str(w.message) for w in found if WRITTEN in str(w.message)]


SPOIL = {
    "clip_grad_norm_": lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params: torch.nn.utils.clip_grad_value_(params, 0.01),
    "by hand": lambda params: [p.grad.mul_(0.5) for p in params],
}


@each_optimizer
@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_clipping_before_the_step_warns_once(case, spoil):
    (message,) = Loop(case.ours).run(spoil)
    assert f"{case.ours.__name__}(..., robust=criterion, max_norm=1.0)" in message and "criterion.finish_(params)" in message


@each_optimizer
def test_loops_that_are_right_hear_nothing(case):
    for zero in (dict(), dict(set_to_none=False)):
        assert Loop(case.ours).run(**zero) == []
        assert Loop(case.ours, max_norm=0.1).run(**zero) == []


def test_clipping_that_begins_later_is_not_looked_for():
    """The first steps show how a loop clips; later steps cost nothing."""
    loop = Loop()
    assert loop.run(steps=2) == [] and loop.run(SPOIL["by hand"]) == []
    loop.criterion(loop.model(torch.randn(2, 4)), torch.tensor([0, 1]))
    assert loop.criterion.deferred_step.watch.quiet


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_no_clipping(unscale):
    loop, scaler = Loop(), torch.amp.GradScaler("cpu", init_scale=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.accumulate(scaler.scale)
            if unscale:
                scaler.unscale_(loop.optimizer)
            scaler.step(loop.optimizer)
            scaler.update()


def test_two_optimizers_of_one_criterion():
    """Each is looked at, and one warning suffices."""
    loop = Loop()
    weight, bias = loop.model.parameters()
    loop.optimizer = ab.ABSGD([weight], lr=0.1, robust=loop.criterion)
    other = ab.ABSGD([bias], lr=0.1, robust=loop.criterion)
    loop.accumulate()
    bias.grad.mul_(0.5)
    loop.optimizer.step()
    with pytest.warns(UserWarning, match=WRITTEN):
        other.step()


def finishing(loop, optimizer=torch.optim.SGD):
    """The same loop with `finish_` and an optimizer of torch."""
    loop.optimizer = optimizer(loop.model.parameters(), lr=0.1)
    return loop


def finished(params, criterion, *calls):
    """Warnings of steps in which these calls are made in this order; "finish" stands for `finish_`."""
    return lambda _: [criterion.finish_(params) if call == "finish" else call(params) for call in calls]


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_clipping_before_finish_warns_once(spoil):
    loop = finishing(Loop())
    params = list(loop.model.parameters())
    (message,) = loop.run(finished(params, loop.criterion, spoil, "finish"))
    assert "finish_: got" in message and "expected finish_ first, and clip_grad_norm_ after it" in message
    assert finishing(Loop()).criterion is not loop.criterion


@pytest.mark.parametrize("zero", [dict(), dict(set_to_none=False)], ids=str)
def test_clipping_after_finish_is_right(zero):
    loop = finishing(Loop())
    params = list(loop.model.parameters())
    assert loop.run(finished(params, loop.criterion, "finish", SPOIL["clip_grad_norm_"]), **zero) == []


def test_finish_after_unscale_is_right():
    """The order of the documents: unscale_, finish_, clip, step."""
    loop, scaler = finishing(Loop()), torch.amp.GradScaler("cpu", init_scale=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.accumulate(scaler.scale)
            scaler.unscale_(loop.optimizer)
            loop.criterion.finish_(loop.model.parameters())
            torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
            scaler.step(loop.optimizer)
            scaler.update()


def test_a_step_before_finish_is_an_error():
    loop = finishing(Loop())
    before = copy.deepcopy(loop.criterion.state_dict())
    loop.accumulate()
    loop.optimizer.step()
    with pytest.raises(RuntimeError, match=r"finish_: an optimizer has stepped.*expected criterion.finish_\(params\) before"):
        loop.criterion.finish_(loop.model.parameters())
    assert str(loop.criterion.state_dict()) == str(before)


def test_another_optimizer_may_step_before_finish():
    """That of a discriminator, whose parameters the loss reaches too, and which finish_ is not given."""
    loop, other = finishing(Loop()), torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        loop.optimizer.zero_grad()
        for _ in range(2):
            optimizer.zero_grad()
            other(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            loop.criterion(other(loop.model(torch.randn(5, 4))), torch.arange(5) % 3).backward()
        loop.criterion.finish_(loop.model.parameters())
        loop.optimizer.step()


@pytest.mark.parametrize("robust", [True, False], ids=["robust", "finish"])
def test_a_reentrant_checkpoint_is_no_clipping(robust):
    """Its inner backward ends before the outer one has written the gradients."""
    loop = Loop() if robust else finishing(Loop())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loop.optimizer.zero_grad()
            for rows in (5, 2, 7):
                y = torch.randint(3, (rows,))
                loss_of = lambda h, y=y: loop.criterion(h, y)  # noqa: E731
                checkpoint(loss_of, loop.model(torch.randn(rows, 4)), use_reentrant=True).backward()
            if not robust:
                loop.criterion.finish_(loop.model.parameters())
            loop.optimizer.step()


def test_a_step_that_was_given_up_is_forgotten():
    loop = Loop()
    loop.accumulate()
    loop.optimizer.zero_grad(set_to_none=False)
    loop.criterion.discard()
    loop.model(torch.randn(2, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.optimizer.robust, robust = None, loop.optimizer.robust
        loop.optimizer.step()
        loop.optimizer.robust = robust
        loop.optimizer.zero_grad()
        loop.accumulate()
        loop.optimizer.step()


def test_gradients_that_nobody_wrote_are_told_from_new_ones():
    """A gradient that was replaced, as by an average over processes, is another tensor."""
    loop = Loop()
    assert loop.run(lambda params: [setattr(p, "grad", p.grad * 0.5) for p in params]) == []


def test_copies_look_for_themselves():
    loop = Loop()
    loop.run(steps=2)
    copied = copy.deepcopy(loop)
    assert len(copied.run(SPOIL["by hand"])) == 1
