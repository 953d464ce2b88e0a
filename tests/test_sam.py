"""SAM: the step is that of the formula, with every kind of criterion; the parameters come back; errors leave everything alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import absgd_fast as ab
from absgd_fast.experiments.sam import SAM, running_statistics_kept

RHO, LR, MOMENTUM, DECAY, LAM, GAMMA = 0.3, 0.1, 0.9, 0.01, 0.7, 0.6

OPTIMIZERS = {
    "torch": lambda params, **more: torch.optim.SGD(params, LR, MOMENTUM, weight_decay=DECAY),
    "ours": lambda params, **more: ab.ABSGD(params, LR, MOMENTUM, weight_decay=DECAY, **more),
}


def random(*size, seed, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(dtype=torch.float64):
    """Two layers, so that the gradient differs from place to place."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=k))
    return model


def batch(step, rows=7, dtype=torch.float64):
    return random(rows, 4, seed=100 + step, dtype=dtype), torch.arange(rows) % 3


def logits_at(weights, x):
    w1, b1, w2, b2 = weights
    return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def gradient(weights, loss_of):
    leaves = [w.clone().requires_grad_() for w in weights]
    return torch.autograd.grad(loss_of(leaves), leaves)


def uphill(weights, grads, rho=RHO):
    """w + rho g / ||g||, by Eq. 2 with p = 2."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
    return [w + rho * g / norm for w, g in zip(weights, grads)]


class Formula:
    """SAM with momentum SGD by hand. loss_at(weights, x, y, second) is the loss whose gradient counts."""

    def __init__(self, model, rho=RHO):
        self.weights, self.rho = [p.detach().clone() for p in model.parameters()], rho
        self.momenta = None

    def step(self, loss_at, x, y):
        first = gradient(self.weights, lambda w: loss_at(w, x, y, False))
        second = gradient(uphill(self.weights, first, self.rho), lambda w: loss_at(w, x, y, True))
        grads = [g + DECAY * w for g, w in zip(second, self.weights)]  # the decay is that of w
        old = self.momenta
        self.momenta = grads if old is None else [MOMENTUM * m + g for m, g in zip(old, grads)]
        self.weights = [w - LR * m for w, m in zip(self.weights, self.momenta)]


class Robust:
    """ABSGD's loss by hand, with log s that the second pass alone moves."""

    def __init__(self):
        self.log_s = None

    def __call__(self, weights, x, y, second):
        losses = F.cross_entropy(logits_at(weights, x), y, reduction="none")
        z = losses.detach() / LAM
        log_g = torch.logsumexp(z, 0) - math.log(len(z))
        log_s = log_g if self.log_s is None else torch.logaddexp(math.log(1 - GAMMA) + self.log_s, math.log(GAMMA) + log_g)
        if second:
            self.log_s = log_s
        return (torch.exp(z - log_s) * losses).mean()


def close(model, weights, **tolerance):
    for p, w in zip(model.parameters(), weights):
        torch.testing.assert_close(p.detach(), w, **tolerance)


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, weights):
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


# ---- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_step_is_that_of_the_formula(kind):
    model = network()
    formula, sam = Formula(model), SAM(OPTIMIZERS[kind](model.parameters()), RHO)
    for step in range(3):
        x, y = batch(step)
        at_w = F.cross_entropy(logits_at(formula.weights, x), y)
        formula.step(lambda w, x, y, second: F.cross_entropy(logits_at(w, x), y), x, y)
        seen = []

        def closure(first):
            seen.append((first, bits(model)))
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        torch.testing.assert_close(sam.step(closure).detach(), at_w)
        close(model, formula.weights)
        assert [first for first, _ in seen] == [True, False]
        distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(seen[0][1], seen[1][1])))
        assert distance == pytest.approx(RHO)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_log_s_moves_once_with_the_losses_of_the_second_pass(kind):
    model, criterion = network(), ab.ABLoss(lam=LAM, gamma=GAMMA).double()
    formula, robust, sam = Formula(model), Robust(), SAM(OPTIMIZERS[kind](model.parameters()), RHO, criterion)
    for step in range(3):
        x, y = batch(step)
        formula.step(robust, x, y)
        logs = []

        def closure(first):
            criterion(model(x), y, update=not first).backward()
            logs.append(criterion.log_s.clone())

        before = criterion.log_s.clone()
        sam.step(closure)
        close(model, formula.weights)
        assert torch.equal(logs[0], before) and not torch.equal(logs[1], before)
        torch.testing.assert_close(criterion.log_s, robust.log_s)


def robust_pair(form, model, deferred):
    """The SAM of a model and its criterion, by one of the ways to end a deferred step."""
    criterion = ab.ABLoss(lam=LAM, gamma=GAMMA, deferred=deferred).double()
    robust = {"robust": criterion} if form == "robust" and deferred else {}
    optimizer = OPTIMIZERS["torch" if form == "finish, torch" else "ours"](model.parameters(), **robust)
    return SAM(optimizer, RHO, None if form == "robust" else criterion), criterion


@pytest.mark.parametrize("form", ["robust", "finish, ours", "finish, torch"])
@pytest.mark.parametrize("cuts", [(7,), (3, 4), (1, 2, 4)], ids=str)
def test_deferred_micro_batches_make_the_step_of_one_batch(form, cuts):
    model = network()
    formula, robust = Formula(model), Robust()
    sam, criterion = robust_pair(form, model, deferred=True)
    for step in range(4):
        x, y = batch(step)
        formula.step(robust, x, y)

        def closure(first):
            for part, labels in zip(x.split(cuts), y.split(cuts)):
                criterion(model(part), labels).backward()

        sam.step(closure)
        close(model, formula.weights)
        torch.testing.assert_close(criterion.log_s, robust.log_s)
    assert criterion.nonfinite_batches == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rho_0_is_the_plain_step_bit_for_bit(kind, dtype):
    model = network(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0  # + 0.0 would be another number
    twin = copy.deepcopy(model)
    sam, plain = SAM(OPTIMIZERS[kind](model.parameters()), 0), OPTIMIZERS[kind](twin.parameters())
    for step in range(3):
        x, y = batch(step, dtype=dtype)
        signs = [torch.signbit(p) for p in model.parameters()]

        def closure(first):
            assert all(torch.equal(torch.signbit(p), sign) for p, sign in zip(model.parameters(), signs))
            F.cross_entropy(model(x), y).backward()

        sam.step(closure)
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
        assert same(model, bits(twin))


# ---- parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_parameters_come_back_to_the_last_bit(dtype):
    """Without a step of the optimizer nothing else moves them; w + e - e would be another number."""
    model = network(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[0] = -0.0
    before = bits(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), RHO)
    x, y = batch(0, dtype=dtype)
    moved, there = [], []

    def closure(first):
        F.cross_entropy(model(x), y).backward()
        moved.append([not torch.equal(p, w) for p, w in zip(model.parameters(), before)])
        if first:
            grads = [p.grad.double() for p in model.parameters()]
            there.extend(w.to(dtype) for w in uphill([w.double() for w in before], grads))
        elif dtype == torch.float64:
            close(model, there, rtol=0, atol=1e-15)
        else:
            assert same(model, there)  # rounded once

    sam.step(closure, step=lambda: None)
    assert moved == [[False] * 4, [True] * 4]
    assert same(model, before) and all(torch.signbit(p.view(-1)[0]) for p in model.parameters())


def test_parameters_without_a_gradient_stay_and_count_for_nothing():
    model = network()
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    late = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))  # has a gradient in the second pass alone
    formula = Formula(model)
    sam = SAM(OPTIMIZERS["torch"]([*model.parameters(), unused, late]), RHO)
    x, y = batch(0)
    formula.step(lambda w, x, y, second: F.cross_entropy(logits_at(w, x), y), x, y)

    def closure(first):
        assert torch.equal(late, torch.ones(2))
        (F.cross_entropy(model(x), y) + (0 if first else late.sum())).backward()

    sam.step(closure)
    close(model, formula.weights)
    assert torch.equal(unused, torch.ones(3)) and unused.grad is None
    torch.testing.assert_close(late.detach(), torch.full((2,), 1 - LR * (1 + DECAY), dtype=torch.float64))


def test_the_norm_is_that_of_all_groups():
    model = network()
    first, second = model[0], model[2]
    optimizer = OPTIMIZERS["torch"](first.parameters())
    sam, formula = SAM(optimizer, RHO), Formula(model)
    sam.add_param_group({"params": list(second.parameters())})
    x, y = batch(0)
    formula.step(lambda w, x, y, second: F.cross_entropy(logits_at(w, x), y), x, y)
    sam.step(lambda first: F.cross_entropy(model(x), y).backward())
    close(model, formula.weights)
    assert sam.param_groups is optimizer.param_groups and len(sam.param_groups) == 2


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_direction_does_not_depend_on_the_size_of_the_gradient(size):
    """The squares of these float32 gradients are 0 or infinite in float32."""
    w, there = torch.nn.Parameter(torch.tensor([3.0, 4.0])), []
    sam = SAM(torch.optim.SGD([w], lr=0.0), rho=0.5)

    def closure(first):
        there.append(w.detach().clone())
        (size * w.square().sum() / 2).backward()

    sam.step(closure)
    torch.testing.assert_close(there[1], torch.tensor([3.3, 4.4]))


# ---- bad gradients, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_first_gradient_without_a_direction_makes_the_plain_step(kind, bad):
    model = network()
    twin = copy.deepcopy(model)
    sam, plain = SAM(OPTIMIZERS[kind](model.parameters()), RHO), OPTIMIZERS[kind](twin.parameters())
    before, (x, y) = bits(model), batch(0)

    def closure(first):
        assert same(model, before)  # also in the second pass
        F.cross_entropy(model(x), y).backward()
        if first:
            for p in model.parameters():
                p.grad.mul_(0)
            model[2].bias.grad[1] = bad

    sam.step(closure)
    F.cross_entropy(twin(x), y).backward()
    plain.step()
    assert same(model, bits(twin))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["robust", "finish, ours", "finish, torch"])
def test_a_bad_row_in_a_deferred_step_changes_nothing(form):
    model = network()
    sam, criterion = robust_pair(form, model, deferred=True)
    states = []
    for step, spoilt in enumerate([False, True, False]):
        x, y = batch(step)
        x[2] = math.nan if spoilt else x[2]

        def closure(first):
            for part, labels in zip(x.split(4), y.split(4)):
                criterion(model(part), labels).backward()

        sam.step(closure)
        states.append((bits(model), criterion.log_s.clone()))
    (one, log_one), (two, log_two), (three, log_three) = states
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and torch.equal(log_one, log_two)
    assert not any(torch.equal(a, b) for a, b in zip(two, three)) and not torch.equal(log_two, log_three)
    assert criterion.nonfinite_batches == 1


@pytest.mark.parametrize("at", [True, False])
def test_a_closure_that_raises_leaves_the_parameters_and_log_s(at):
    model = network()
    sam, criterion = robust_pair("finish, torch", model, deferred=True)
    before, (x, y) = bits(model), batch(0)

    def closure(first, raises=True):
        criterion(model(x), y).backward()
        if raises and first is at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert same(model, before) and criterion.log_s == -math.inf
    criterion.set_lam(LAM)  # which an unfinished step would refuse
    formula, robust = Formula(model), Robust()  # the next step knows nothing of it
    formula.step(robust, x, y)
    sam.step(lambda first: closure(first, raises=False))
    close(model, formula.weights)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "rho: got -0.1, expected a finite number >= 0", lambda o: SAM(o, -0.1)),
        (ValueError, "rho: got inf", lambda o: SAM(o, math.inf)),
        (ValueError, "rho: got '1'", lambda o: SAM(o, "1")),
        (TypeError, "criterion: got CrossEntropyLoss, expected an ABLoss", lambda o: SAM(o, 0.1, torch.nn.CrossEntropyLoss())),
        (
            ValueError,
            "got step= and a deferred criterion",
            lambda o: SAM(o, 0.1, ab.ABLoss(lam=1.0, deferred=True)).step(lambda first: None, step=lambda: None),
        ),
    ],
)
def test_what_is_refused(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call(OPTIMIZERS["torch"](network().parameters()))
    assert "\n" not in str(caught.value)


def test_a_sparse_gradient_is_refused_and_nothing_moves():
    table = torch.nn.Embedding(4, 2, sparse=True)
    before = bits(table)
    with pytest.raises(ValueError, match="sparse=False"):
        SAM(torch.optim.SGD(table.parameters(), lr=0.1)).step(lambda first: table(torch.tensor([1])).sum().backward())
    assert same(table, before)


# ---- around it -----------------------------------------------------------------------------------------------------------


def test_a_schedule_of_the_inner_optimizer_and_checkpoints():
    """The learning rate falls where it should, and a new SAM goes on from a state to the same bits."""
    runs = []
    for stop in (None, 3):
        model = network()

        def made():
            optimizer = OPTIMIZERS["ours"](model.parameters())
            return SAM(optimizer, RHO), torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)

        sam, decay = made()
        rates = []
        for step in range(5):
            if step == stop:
                saved, saved_decay = copy.deepcopy(sam.state_dict()), decay.state_dict()
                sam, decay = made()
                sam.load_state_dict(saved)
                decay.load_state_dict(saved_decay)
                assert len(sam.state) == 4
            x, y = batch(step)
            sam.step(lambda first: F.cross_entropy(model(x), y).backward())
            rates.append(sam.param_groups[0]["lr"])
            decay.step()
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
        runs.append(bits(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_grad_scaler_steps_instead():
    """SAM with a scaled loss is SAM, because only the direction of the first gradient counts; an overflow skips the step."""
    model = network(torch.float32)
    twin, (x, y) = copy.deepcopy(model), batch(0, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sam, plain = SAM(OPTIMIZERS["torch"](model.parameters()), RHO), SAM(OPTIMIZERS["torch"](twin.parameters()), RHO)

    def step(factor):
        sam.step(lambda first: scaler.scale(factor * F.cross_entropy(model(x), y)).backward(), lambda: scaler.step(sam.optimizer))
        scaler.update()

    step(1.0)
    plain.step(lambda first: F.cross_entropy(twin(x), y).backward())
    close(model, bits(twin))
    before = bits(model)
    step(math.inf)
    assert same(model, before) and scaler.get_scale() == 2.0**9


def test_running_statistics_are_those_of_the_first_pass():
    layer = torch.nn.BatchNorm1d(4, dtype=torch.float64)
    model = torch.nn.Sequential(network()[0], torch.nn.Linear(5, 4, dtype=torch.float64), layer)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), RHO)
    x, y = batch(0)
    means = []

    def closure(first, keep):
        with running_statistics_kept(model, keep and not first):
            F.cross_entropy(model(x), y).backward()
        means.append(layer.running_mean.clone())

    for keep, tracked in ((True, 1), (False, 3)):
        means.clear()
        sam.step(lambda first: closure(first, keep))
        assert torch.equal(*means) is keep
        assert layer.num_batches_tracked == tracked
    with pytest.raises(KeyError), running_statistics_kept(model):
        model(x)
        raise KeyError
    assert torch.equal(layer.running_mean, means[-1])
