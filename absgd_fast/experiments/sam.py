"""Sharpness-aware minimisation (SAM) around any torch optimizer, ours with a deferred criterion included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _numbers
from ..robust.base import RobustLoss


class SAM:
    r"""Steps with the gradient at the worst point near the parameters, and not with that at the parameters.

        g    = gradient of the loss at w
        e    = rho g / ||g||_2                    the norm is that of all parameters together
        step = of the optimizer, at w, with the gradient at w + e

    Weight decay is the optimizer's, so it is that of w. A parameter without a gradient at w keeps its value in w + e.

    Args:
        optimizer: any torch optimizer. It keeps the parameters and all states, so a learning rate schedule is made for it, and
            not for this object.
        rho: the distance >= 0 of the point. 0 gives the optimizer's own step, bit for bit.
        criterion: the ABLoss or LinearABLoss that makes the gradients, if it is deferred. None: that of the optimizer's
            ``robust=``, if it has one. A criterion that is not deferred may be given too; then nothing is done with it.

    Which pass moves log s
        The step uses the gradient at w + e, whose weights are W_i = exp(z_i(w + e) - log s'). So s' has to be the moving average
        of exp(z) at the points w + e, and the second pass moves it. The first pass gives a direction only: every factor of g,
        s' too, drops out of g / ||g||. If it moved log s as well, the batch would count twice, and once at the wrong point.

        not deferred    ``criterion(model(x), y, update=not first)``
        deferred        ``criterion(model(x), y)`` in both passes, for each micro-batch. With update=False every micro-batch would
                        be normalised by itself, and the sum would be another direction than that of one big batch. SAM calls
                        ``criterion.discard()`` after the first pass, so log s stays. After the second one the optimizer ends the
                        step if it has ``robust=criterion``; otherwise SAM calls ``criterion.finish_``.

    A first gradient of norm 0, infinity or NaN gives no direction, so the second pass is at w. The step is then the optimizer's
    own, and what becomes of a NaN is what becomes of it without SAM. The host does not wait for a GPU to know.

    Batch normalisation moves its running statistics in every forward. `running_statistics_kept` keeps the second pass out of
    them, so that they are those of w.

    Attributes:
        optimizer, rho, criterion: as given. They may be replaced between two steps.

    Raises:
        ValueError: rho is no finite number >= 0. TypeError: a criterion that is no ABLoss or LinearABLoss.

    >>> import absgd_fast as ab
    >>> from absgd_fast.experiments.sam import SAM
    >>> model, criterion = torch.nn.Linear(3, 2), ab.ABLoss(lam=0.5)
    >>> sam = SAM(ab.ABSGD(model.parameters(), lr=0.1), rho=0.05)
    >>> x, y = torch.ones(4, 3), torch.tensor([0, 1, 1, 1])
    >>> def closure(first):
    ...     loss = criterion(model(x), y, update=not first)
    ...     loss.backward()
    ...     return loss
    >>> bool(sam.step(closure) > 0)
    True

    With a deferred criterion and two micro-batches:

    >>> criterion = ab.ABLoss(lam=0.5, deferred=True)
    >>> sam = SAM(ab.ABSGD(model.parameters(), lr=0.1, robust=criterion), rho=0.05)
    >>> def closure(first):
    ...     for rows in (slice(2), slice(2, 4)):
    ...         criterion(model(x[rows]), y[rows]).backward()
    >>> sam.step(closure)
    >>> bool(criterion.log_s.isfinite())
    True

    Source: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization", Eq. 2 (p = 2) and Alg. 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float = 0.05, criterion: RobustLoss | None = None) -> None:
        number = _numbers.real(rho)
        if number is None or not 0 <= number < float("inf"):
            raise ValueError(f"rho: got {rho!r}, expected a finite number >= 0, such as 0.05")
        if criterion is not None and not isinstance(criterion, RobustLoss):
            raise TypeError(
                f"criterion: got {type(criterion).__name__}, expected an ABLoss or LinearABLoss; leave it out for others"
            )
        self.optimizer, self.rho, self.criterion = optimizer, number, criterion

    def step(self, closure: Callable[[bool], Any], step: Callable[[], object] | None = None) -> Any:
        """One step of the optimizer with the gradient at w + e.

        The gradients are set to None before each pass. Afterwards ``.grad`` has what the second pass and the optimizer left.

        Args:
            closure: closure(first) computes the loss and calls backward, once or for each micro-batch. first: True at w, False at
                w + e. It zeroes no gradients, and both passes use the same samples.
            step: called instead of ``optimizer.step``, such as ``lambda: scaler.step(sam.optimizer)`` of a GradScaler. With a
                deferred criterion the optimizer needs ``robust=`` then, because `finish_` has to come after unscale_.

        Returns:
            what the closure returned at w.

        Raises:
            ValueError: a sparse gradient; a `step` of one's own with a deferred criterion that the optimizer does not finish.
                If the closure raises, the parameters are as before.
        """
        of_optimizer: RobustLoss | None = getattr(self.optimizer, "robust", None)
        criterion = of_optimizer if self.criterion is None else self.criterion
        deferred = criterion if criterion is not None and criterion.deferred else None
        finishes = deferred is not None and deferred is not of_optimizer
        if finishes and step is not None:
            raise ValueError("SAM: got step= and a deferred criterion; expected an optimizer that has it as robust=, or no step=")
        before: list[tuple[Tensor, Tensor]] = []
        try:
            loss = self._pass(closure, True)
            if deferred is not None:
                deferred.discard()  # its sums have the direction of the normalised gradient
            self._perturb(before)
            self._pass(closure, False)
        except BaseException:
            if deferred is not None:
                deferred.discard()
            raise
        finally:
            with torch.no_grad():
                for p, w in before:
                    p.copy_(w)
        # On the CPU the gradients of a bad step are None by now. On a GPU they are NaN, and only the result says so.
        if not finishes or deferred is None or deferred.finish_(self._params()):
            (step or self.optimizer.step)()
        return loss

    def _pass(self, closure: Callable[[bool], Any], first: bool) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            return closure(first)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _perturb(self, before: list[tuple[Tensor, Tensor]]) -> None:
        """Moves the parameters to w + e. before: gets each parameter that moves and a copy of its w, before any moves."""
        moved = [(p, p.grad) for p in self._params() if p.grad is not None]
        if any(g.layout != torch.strided for _, g in moved):
            raise ValueError("SAM: got a sparse gradient, expected dense ones; make the embedding with sparse=False")
        if not moved or self.rho == 0:
            return
        # The sums of a deferred criterion may be so large that their squares leave the range of float32.
        norms = [torch.linalg.vector_norm(_wide(g)).to(moved[0][1].device) for _, g in moved]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        has_direction = norm.isfinite() & (norm > 0)
        before += [(p, p.clone()) for p, _ in moved]
        for p, g in moved:
            there = _wide(p) + self.rho * (_wide(g) / norm.to(g.device))  # rounded once, by copy_
            p.copy_(torch.where(has_direction.to(p.device), there, _wide(p)))

    # ---- what belongs to the optimizer ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The states of the optimizer, by parameter."""
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer's."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer: SAM has no state between two steps."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's."""
        self.optimizer.load_state_dict(state_dict)


def _wide(x: Tensor) -> Tensor:
    """The numbers in float64, or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


@contextmanager
def running_statistics_kept(model: nn.Module, keep: bool = True) -> Iterator[None]:
    """Puts the running statistics of batch normalisation back at the end, to the last bit.

    Args:
        model: any module.
        keep: False does nothing. So ``with running_statistics_kept(model, not first)`` serves both passes of a `SAM` step.

    >>> from absgd_fast.experiments.sam import running_statistics_kept
    >>> model = torch.nn.BatchNorm1d(2)
    >>> with running_statistics_kept(model):
    ...     output = model(torch.ones(3, 2))
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)] if keep else []
    kept = [(buffer, buffer.clone()) for m in norms for buffer in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
