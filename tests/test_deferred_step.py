"""The deferred step as a machine: every phase, every event, and what becomes of it (robust/step.py TRANSITIONS)."""

import pytest
import torch

import absgd_fast as ab
from absgd_fast.robust.step import TRANSITIONS, Phase

IDLE, OPEN, SETTLED, FINISHED, LOST = Phase


class Training:
    """A criterion, one parameter and its optimizer, whose step can be brought into any phase by public calls."""

    def __init__(self, backend):
        self.weight = torch.ones(3, 4, requires_grad=True)
        self.criterion = ab.ABLoss(lam=0.5, deferred=True, backend=backend)
        self.optimizer = ab.ABSGD([self.weight], lr=0.1, robust=self.criterion, backend=backend)
        self.saved = self.criterion.state_dict()

    def forward(self):
        self.criterion(torch.arange(8.0).reshape(2, 4) @ self.weight.T, torch.tensor([0, 2])).backward()

    def step(self):
        self.optimizer.step()

    def unfinished(self):
        self.criterion.deferred_step.move("unfinished")  # tests/test_deferred_unfinished.py has the ways to it

    def finish_(self):
        self.criterion.finish_(self.weight)

    def set_lam(self):
        self.criterion.set_lam(0.7)

    def load(self):
        self.criterion.load_state_dict(self.saved)

    def discard(self):
        self.criterion.discard()

    @property
    def phase(self):
        return self.criterion.deferred_step.phase

    def bring_to(self, phase):
        ways = {
            IDLE: [],
            OPEN: ["forward"],
            SETTLED: ["forward", "step"],
            FINISHED: ["forward", "finish_"],
            LOST: ["forward", "load"],
        }
        for event in ways[phase]:
            getattr(self, event)()
        assert self.phase is phase
        return self

    def everything(self):
        step = self.criterion.deferred_step
        tensors = (
            self.weight,
            self.weight.grad,
            self.criterion.log_s,
            self.criterion.lam,
            step.partial_stats,
            step.reference,
            step.settled,
        )
        return [None if t is None else t.detach().clone() for t in tensors]


NOT_ALLOWED = {
    ("step", FINISHED): "step: criterion.finish_ has normalised the gradients already; expected an optimizer without robust=",
    ("step", LOST): "step: a state was loaded after the micro-batches, so their gradients can no longer be normalised;",
    ("unfinished", OPEN): "step: got a second step of an optimizer with gradients of a deferred criterion, and nothing has",
    ("finish_", IDLE): "finish_: got no forward in training mode since the last step, expected at least one micro-batch",
    ("finish_", SETTLED): "finish_: got no forward in training mode since the last step, expected at least one micro-batch",
    (
        "finish_",
        FINISHED,
    ): "finish_: it has normalised the gradients of this step already; expected one call per step, with the parameters",
    ("finish_", LOST): "finish_: a state was loaded after the micro-batches, so their gradients can no longer be normalised",
    ("set_lam", OPEN): "set_lam: got another lambda in the middle of a deferred step, expected it after the optimizer's step",
}
NEXT = {
    ("forward", IDLE): OPEN,
    ("forward", OPEN): OPEN,
    ("forward", SETTLED): OPEN,
    ("forward", FINISHED): OPEN,
    ("forward", LOST): OPEN,
    ("step", IDLE): IDLE,
    ("step", OPEN): SETTLED,
    ("step", SETTLED): SETTLED,
    ("unfinished", IDLE): IDLE,
    ("unfinished", SETTLED): SETTLED,
    ("unfinished", FINISHED): FINISHED,
    ("unfinished", LOST): LOST,
    ("finish_", OPEN): FINISHED,
    ("set_lam", IDLE): IDLE,
    ("set_lam", SETTLED): SETTLED,
    ("set_lam", FINISHED): FINISHED,
    ("set_lam", LOST): LOST,
    ("load", IDLE): IDLE,
    ("load", OPEN): LOST,
    ("load", SETTLED): IDLE,
    ("load", FINISHED): IDLE,
    ("load", LOST): LOST,
    ("discard", IDLE): IDLE,
    ("discard", OPEN): IDLE,
    ("discard", SETTLED): IDLE,
    ("discard", FINISHED): IDLE,
    ("discard", LOST): IDLE,
}


def test_the_table_is_whole():
    every = {(event, phase) for event in TRANSITIONS for phase in Phase}
    assert {(event, phase) for event, row in TRANSITIONS.items() for phase in row} == every
    assert NEXT.keys() | NOT_ALLOWED.keys() == every and not NEXT.keys() & NOT_ALLOWED.keys()


@pytest.mark.parametrize("event, phase", NEXT, ids=lambda x: getattr(x, "name", x))
def test_allowed(one_backend, event, phase):
    training = Training(one_backend).bring_to(phase)
    getattr(training, event)()
    assert training.phase is NEXT[event, phase]
    step = training.criterion.deferred_step
    assert (step.partial_stats is not None) == (step.reference is not None) == (training.phase is OPEN)
    assert (step.settled is not None) == (training.phase in (SETTLED, FINISHED))


@pytest.mark.parametrize("event, phase", NOT_ALLOWED, ids=lambda x: getattr(x, "name", x))
def test_not_allowed(one_backend, event, phase):
    """The message says what is wrong, and nothing has changed."""
    training = Training(one_backend).bring_to(phase)
    before = training.everything()
    with pytest.raises(RuntimeError) as caught:
        getattr(training, event)()
    assert str(caught.value).startswith(NOT_ALLOWED[event, phase])
    assert training.phase is phase
    for now, then in zip(training.everything(), before):
        assert (now is None) == (then is None) and (now is None or torch.equal(now, then))


def test_another_lambda_after_the_step_leaves_the_last_weights(one_backend):
    """They are relative to log s' as soon as the step is settled, and stay so."""
    training = Training(one_backend).bring_to(SETTLED)
    before = training.criterion.last.weights
    training.set_lam()
    torch.testing.assert_close(training.criterion.last.weights, before, rtol=0, atol=0)


def test_a_second_load_does_not_bring_lost_gradients_back(one_backend):
    training = Training(one_backend).bring_to(LOST)
    training.load()
    with pytest.raises(RuntimeError, match="a state was loaded"):
        training.step()


@pytest.mark.parametrize("event", ["discard", "load"])
def test_what_follows_a_settled_step_leaves_the_last_weights(one_backend, event):
    training = Training(one_backend).bring_to(SETTLED)
    before = training.criterion.last.weights
    getattr(training, event)()
    torch.testing.assert_close(training.criterion.last.weights, before, rtol=0, atol=0)


def test_deferred_mode_can_be_switched(one_backend):
    """Off and on again, with the process group and the divisor that the criterion had; what cannot be deferred is refused."""
    criterion = ab.ABLoss(lam=0.5, deferred=True, loss_divisor=3, process_group=None, backend=one_backend)
    criterion.deferred = False
    assert criterion.deferred_step is None and criterion.loss_divisor == 3 and criterion.process_group is None
    criterion.deferred = True
    assert criterion.deferred_step.phase is IDLE and criterion.loss_divisor == 3
    mixed = ab.ABLoss(lam=0.5, mix=1.0, backend=one_backend)
    with pytest.raises(ValueError, match="mix: got 1 with deferred=True"):
        mixed.deferred = True
    assert not mixed.deferred
