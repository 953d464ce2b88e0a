"""A deferred step that nobody finishes is an error at the second step; a loop that is right never hears of it."""

import copy
import gc
import io
import itertools
import pickle
import time
import warnings
from functools import partial

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab
from absgd_fast.robust.unfinished import leaves

pytestmark = pytest.mark.usefixtures("one_thread")
UNFINISHED = "nothing has normalised them or moved log s"


@pytest.fixture(autouse=True)
def no_hook_stays():
    yield
    if _global_optimizer_post_hooks:
        gc.collect()
    assert not _global_optimizer_post_hooks


def deferred(**options):
    return ab.ABLoss(lam=0.5, deferred=True, **options)


def network(out=3):
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, out))


def batch(rows=6, classes=3):
    return torch.randn(rows, 4), torch.randint(classes, (rows,))


def loss_of(criterion, model, x, y):
    if isinstance(criterion, ab.LinearABLoss):
        return criterion(model[:-1](x), model[-1].weight, y, model[-1].bias)
    return criterion(model(x), y)


def backward(criterion, model, wrap=lambda loss: loss):
    wrap(loss_of(criterion, model, *batch())).backward()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization in the form of its well-known implementations, for two forwards in each step."""

    def __init__(self, params, base, **options):
        super().__init__(params, dict(rho=0.05, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p += p.grad * 0.05 / norm
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


# ---- loops that never finish ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "ABSGD": lambda params: ab.ABSGD(params, lr=0.1),
    "ABAdam": lambda params: ab.ABAdam(params, lr=0.1, backend="reference"),
}


def zero_before(criterion, model, optimizer, step):
    optimizer.zero_grad()
    backward(criterion, model)
    optimizer.step()


def zero_after(criterion, model, optimizer, step):
    backward(criterion, model)
    optimizer.step()
    optimizer.zero_grad()


def zero_in_place(criterion, model, optimizer, step):
    optimizer.zero_grad(set_to_none=False)
    backward(criterion, model)
    optimizer.step()


def zero_never(criterion, model, optimizer, step):
    backward(criterion, model)
    optimizer.step()


def no_new_gradient(criterion, model, optimizer, step):
    if step == 0:
        backward(criterion, model)
    optimizer.step()


def four_micro_batches(criterion, model, optimizer, step):
    optimizer.zero_grad()
    for _ in range(4):
        backward(criterion, model)
    optimizer.step()


def clipped(criterion, model, optimizer, step):
    optimizer.zero_grad()
    backward(criterion, model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def with_another_loss(criterion, model, optimizer, step):
    optimizer.zero_grad()
    backward(criterion, model)
    model(batch()[0]).square().mean().backward()
    optimizer.step()


def unfrozen_later(criterion, model, optimizer, step):
    """The graph of the first forward does not hold what the optimizer steps."""
    if step == 0:
        for frozen in (True, False):
            model[0].requires_grad_(not frozen)
            model[2].requires_grad_(frozen)
            backward(criterion, model)
    zero_before(criterion, model, optimizer, step)


def checkpointed(criterion, model, optimizer, step):
    """The forward runs again in backward, which is no micro-batch."""
    optimizer.zero_grad()
    x, y = batch()
    checkpoint(lambda x: loss_of(criterion, model, x, y), x, use_reentrant=False).backward()
    optimizer.step()


LOOPS = (
    checkpointed,
    zero_before,
    zero_after,
    zero_in_place,
    zero_never,
    no_new_gradient,
    four_micro_batches,
    clipped,
    with_another_loss,
    unfrozen_later,
)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("entry", [ab.ABLoss, ab.LinearABLoss], ids=["logits", "linear"])
def test_the_second_step_is_an_error(entry, make, loop):
    criterion, model = entry(lam=0.5, deferred=True), network()
    optimizer = make(model[:1].parameters() if loop is unfrozen_later else model.parameters())
    loop(criterion, model, optimizer, 0)
    for step in (1, 2):
        with pytest.raises(RuntimeError, match=UNFINISHED):
            loop(criterion, model, optimizer, step)
    criterion.discard()
    loop(criterion, model, optimizer, 0)  # a new step
    criterion.discard()


def test_it_says_what_to_do():
    criterion, model = deferred(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero_before(criterion, model, optimizer, 0)
    with pytest.raises(
        RuntimeError, match=r"criterion.finish_\(params\).*robust=criterion.*deferred=False.*criterion.discard\(\)"
    ):
        zero_before(criterion, model, optimizer, 1)
    criterion.discard()


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler(fused):
    criterion, model = deferred(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step():
        optimizer.zero_grad()
        backward(criterion, model, scaler.scale)
        scaler.step(optimizer)
        scaler.update()

    step()
    with pytest.raises(RuntimeError, match=UNFINISHED):
        step()
    criterion.discard()


@pytest.mark.parametrize("make", [lambda p: SAM(p, torch.optim.SGD, lr=0.1), torch.optim.LBFGS], ids=["SAM", "LBFGS"])
def test_closures_that_never_finish(make):
    criterion, model = deferred(), network()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        x, y = batch()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    closure()  # SAM steps from these gradients
    optimizer.step(closure)
    closure()
    with pytest.raises(RuntimeError, match=UNFINISHED):
        optimizer.step(closure)
    criterion.discard()


def test_another_model_with_the_same_criterion():
    """As in cross-validation, where only the last fold is wrong."""
    criterion = deferred()
    for finished in (True, True, False):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            backward(criterion, model)
            if finished:
                criterion.finish_(model.parameters())
            elif step == 1:
                with pytest.raises(RuntimeError, match=UNFINISHED):
                    optimizer.step()
                continue
            optimizer.step()
    criterion.discard()


def test_an_optimizer_that_is_gone_finishes_nothing():
    criterion, model = deferred(), network()
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)
    for step in range(2):
        zero_before(criterion, model, optimizer, step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero_before(criterion, model, optimizer, 0)
    with pytest.raises(RuntimeError, match=UNFINISHED):
        zero_before(criterion, model, optimizer, 1)
    criterion.discard()
    optimizer = ab.ABSGD(model.parameters(), lr=0.1)
    optimizer.robust = criterion  # as an attribute it serves as well
    for step in range(3):
        zero_before(criterion, model, optimizer, step)
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)
    optimizer.robust = None
    zero_before(criterion, model, optimizer, 0)
    with pytest.raises(RuntimeError, match=UNFINISHED):
        zero_before(criterion, model, optimizer, 1)
    criterion.discard()


# ---- loops that are right ------------------------------------------------------------------------------------------------


def adversaries(finish):
    """Generator and discriminator: networks, criteria, optimizers, and what each optimizer's turn ends with."""
    nets = network(4), network(2)
    criteria = deferred(), deferred()
    if finish == "robust":
        optimizers = [ab.ABSGD(net.parameters(), lr=0.1, robust=c) for net, c in zip(nets, criteria)]
    else:
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]

    def end(which):
        if finish == "finish_":
            criteria[which].finish_(nets[which].parameters())
        optimizers[which].step()

    return nets, criteria, optimizers, end


def losses_of(nets, criteria):
    """Of the generator, whose graph holds the discriminator, and of the discriminator."""
    generator, discriminator = nets
    fake = generator(torch.randn(5, 4))
    yield lambda: criteria[0](discriminator(fake), torch.ones(5, dtype=torch.int64)).backward()
    both = torch.cat([fake.detach(), torch.randn(5, 4)])
    yield lambda: criteria[1](discriminator(both), torch.arange(2).repeat_interleave(5)).backward()


@pytest.mark.parametrize("finish", ["robust", "finish_"])
@pytest.mark.parametrize("order", ["in turn", "both, then both", "four to one"])
def test_two_criteria_and_two_optimizers(finish, order):
    nets, criteria, optimizers, end = adversaries(finish)
    for _ in range(4):
        if order == "in turn":
            for which in (1, 0):
                optimizers[which].zero_grad()
                list(losses_of(nets, criteria))[which]()
                end(which)
        elif order == "both, then both":
            for optimizer in optimizers:
                optimizer.zero_grad()
            of_generator, of_discriminator = losses_of(nets, criteria)
            of_generator()
            optimizers[1].zero_grad()
            of_discriminator()
            end(1)
            end(0)
        else:  # the discriminator steps in every micro-batch of the generator
            optimizers[0].zero_grad()
            for _ in range(4):
                of_generator, of_discriminator = losses_of(nets, criteria)
                optimizers[1].zero_grad()
                of_discriminator()
                end(1)
                of_generator()
            end(0)


def test_the_generator_that_is_never_finished():
    """Its own optimizer gets the error, and not the one that steps in between."""
    nets, criteria, optimizers, _ = adversaries("finish_")
    for step in range(2):
        optimizers[0].zero_grad()
        for _ in range(4):
            of_generator, of_discriminator = losses_of(nets, criteria)
            optimizers[1].zero_grad()
            of_discriminator()
            criteria[1].finish_(nets[1].parameters())
            optimizers[1].step()
            of_generator()
        if step == 0:
            optimizers[0].step()
    with pytest.raises(RuntimeError, match=UNFINISHED):
        optimizers[0].step()
    criteria[0].discard()


@pytest.mark.parametrize("shared", [False, True], ids=["its own", "shared"])
def test_a_second_optimizer_in_every_micro_batch(shared):
    """It steps its own parameters, with another loss; or those that the deferred loss reaches too, after its own zero_grad."""
    criterion, model, head = deferred(), network(), torch.nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model[2].parameters() if shared else model.parameters(), lr=0.1)
    second = torch.optim.Adam([*head.parameters(), *(model[0].parameters() if shared else ())], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            second.zero_grad()
            features = model[:2](batch()[0])
            head(features if shared else features.detach()).square().mean().backward()
            second.step()
            backward(criterion, model)
        criterion.finish_(model.parameters())
        optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, ab.ABSGD])
@pytest.mark.parametrize("form", ["two calls", "closure", "second forward without update"])
def test_sam(base, form):
    criterion, model = deferred(), network()
    optimizer = SAM(model.parameters(), base, lr=0.1)

    def closure():
        optimizer.zero_grad()
        backward(criterion, model)
        criterion.finish_(model.parameters())

    for _ in range(4):
        closure()
        if form == "closure":
            optimizer.step(closure)
            continue
        optimizer.first_step()
        if form == "two calls":
            closure()
        else:
            x, y = batch()
            criterion(model(x), y, update=False).backward()
        optimizer.second_step()


def test_lbfgs():
    criterion, model = deferred(), network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        x, y = batch()
        loss = criterion(model(x), y)
        loss.backward()
        criterion.finish_(model.parameters())
        return loss

    for _ in range(3):
        optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("entry", [ab.ABLoss, ab.LinearABLoss], ids=["logits", "linear"])
def test_accumulation_with_skipped_steps(entry, make):
    """GradScaler leaves steps out, in a row too."""
    criterion, model = entry(lam=0.5, deferred=True), network()
    optimizer, scaler = make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        optimizer.zero_grad()
        for _ in range(4):
            backward(criterion, model, scaler.scale)
        if step in (1, 2, 4):
            model[0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        criterion.finish_(model.parameters())
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_rest_of_an_epoch(set_to_none):
    """Micro-batches that were too few for a step stay open, while another loss trains the same parameters."""
    criterion, model = deferred(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(criterion, model)
        criterion.finish_(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    backward(criterion, model)  # and no step
    for _ in range(4):
        optimizer.zero_grad(set_to_none)
        model(batch()[0]).square().mean().backward()
        optimizer.step()
    criterion.discard()


@pytest.mark.parametrize(
    "forward", ["without update", "in evaluation", "without gradient", "for logging", "of a frozen model", "for autograd.grad"]
)
def test_forwards_that_are_no_micro_batch(forward):
    """Or whose backward leaves no gradient in a parameter."""
    criterion, model, frozen = deferred(), network(), network().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x, y = batch()
        if forward == "without update":
            criterion(model(x), y, update=False).backward()
        elif forward == "in evaluation":
            criterion.eval()(model(x), y).backward()
        elif forward == "for autograd.grad":
            model(x).square().mean().backward()
            torch.autograd.grad(criterion(model(x), y), model[0].weight)
        else:
            with torch.set_grad_enabled(forward != "without gradient"):
                criterion((frozen if "frozen" in forward else model)(x), y)
            model(x).square().mean().backward()
        optimizer.step()


# ---- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["second step", "second step of ours", "model", "criterion"])
def test_compiled(what):
    """A compiled step neither sees the hook nor is compiled anew when it comes and goes."""
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    criterion, model, other = deferred(), network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    second = (ab.ABSGD if "ours" in what else torch.optim.SGD)(other.parameters(), lr=torch.tensor(0.1))
    step = torch.compile(second.step, backend=backend, fullgraph="ours" in what) if "step" in what else second.step
    run = torch.compile(model, backend=backend) if what == "model" else model
    loss = torch.compile(criterion, backend=backend, fullgraph=True) if what == "criterion" else criterion
    counts = []
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = batch()
            loss(run(x), y).backward()
            second.zero_grad()
            other(x).sum().backward()
            step()
        criterion.finish_(model.parameters())
        optimizer.step()
        counts.append(len(compiled))
    assert counts[-1] == counts[2] and compiled
    if what == "criterion":  # which is not watched then
        return
    x, y = batch()
    loss(run(x), y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=UNFINISHED):
        optimizer.step()
    criterion.discard()


# ---- what it costs -------------------------------------------------------------------------------------------------------


def test_with_robust_there_is_no_hook():
    """Our own step stays without torch's wrapper, from the first step on; a copied pair too."""
    criterion, model = deferred(), network()
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)
    for pair in ((model, criterion, optimizer), copy.deepcopy((model, criterion, optimizer))):
        model, criterion, optimizer = pair
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                backward(criterion, model)
                assert not _global_optimizer_post_hooks
            optimizer.step()


def test_the_hook_is_there_while_the_step_is_open():
    criterion, model = deferred(), network()
    for end in (partial(criterion.finish_, model.parameters()), criterion.discard, criterion.settle):
        assert not _global_optimizer_post_hooks
        for _ in range(2):
            backward(criterion, model)
            assert len(_global_optimizer_post_hooks) == 1
        end()
    backward(criterion, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion.load_state_dict(criterion.state_dict())
    assert not _global_optimizer_post_hooks
    backward(criterion, model)
    others = [deferred() for _ in range(2)]
    for other in others:
        backward(other, model)
    del criterion, other, end
    others.pop()
    assert len(_global_optimizer_post_hooks) == 1  # of the one that is left
    others[0].discard()
    assert not _global_optimizer_post_hooks


def test_leaves():
    """Each once, also where ways meet; of a graph of 3000 nodes within milliseconds."""
    model = network()
    x = torch.randn(2, 4)
    loss = (model(x) * model(x)).sum() + model[0].weight.sum()
    found = list(leaves(loss.grad_fn))
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
    weight = torch.ones((), requires_grad=True)
    loss = weight
    for _ in range(3000):
        loss = loss * 1.0 + weight
    begin = time.perf_counter()
    assert [p is weight for p in leaves(loss.grad_fn)] == [True]
    assert time.perf_counter() - begin < 0.5


def test_the_graph_is_walked_once(monkeypatch):
    """Not in each step, and not in each micro-batch; once more for an optimizer whose parameters it does not hold."""
    walks = []
    monkeypatch.setattr("absgd_fast.robust.unfinished.leaves", lambda node: walks.append(node) or leaves(node))
    criterion, model, other = deferred(), network(), network()
    optimizer, second = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, other))
    for step in range(5):
        optimizer.zero_grad()
        for _ in range(3):
            backward(criterion, model)
            if step >= 2:
                second.zero_grad()
                other(batch()[0]).sum().backward()
                second.step()
        criterion.finish_(model.parameters())
        optimizer.step()
        assert len(walks) == (1 if step < 2 else 2)


# ---- saved in the middle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "loss."])
def test_state_dict_in_the_middle_warns_once(prefix):
    criterion, model = deferred(), network()
    saved = torch.nn.ModuleDict({"loss": criterion}) if prefix else criterion
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.state_dict()
    backward(criterion, model)
    with pytest.warns(UserWarning, match=f"^{prefix}state_dict.*in the middle of a deferred step") as caught:
        saved.state_dict()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.state_dict()
        criterion.finish_(model.parameters())
        saved.state_dict()


# ---- criterion and optimizer, copied ---------------------------------------------------------------------------------------


def untrained():
    torch.manual_seed(0)
    criterion, model = deferred(), network()
    return model, criterion, ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)


def trained():
    model, criterion, optimizer = untrained()
    for step in range(3):
        zero_before(criterion, model, optimizer, step)
    return model, criterion, optimizer


def through_torch(parts):
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda parts: pickle.loads(pickle.dumps(parts)), "torch.save": through_torch}


@pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps", [0, 3])
def test_copied_together_they_stay_a_pair(duplicate, steps):
    pair = trained() if steps else untrained()
    model, criterion, _ = pair
    copied = duplicate(pair)
    assert copied[2].robust is copied[1] and copied[1] is not criterion
    for parts in (pair, copied):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                zero_before(parts[1], parts[0], parts[2], step)
    for a, b in zip(model.parameters(), copied[0].parameters()):
        assert torch.equal(a, b)
    assert torch.equal(criterion.log_s, copied[1].log_s)


@pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("new", [True, False], ids=["made", "trained"])
@pytest.mark.parametrize("called", ["its copy", "the original"])
def test_copied_separately_they_break_visibly(duplicate, new, called):
    """The optimizer has a criterion of its own, which nobody calls. It warns in its first step, and steps with the gradients as
    they are, not with the scale of a step long ago. The criterion that is called gets an error in the second step, unless it is
    the original, whose optimizer finishes its steps."""
    model, criterion, optimizer = untrained() if new else trained()
    model, copied = duplicate((model, optimizer))
    criterion = duplicate(criterion) if called == "its copy" else criterion
    copied.zero_grad()
    backward(criterion, model)
    expected = [p - 0.1 * p.grad for p in model.parameters()] if new else None
    with pytest.warns(UserWarning, match=r"copy.deepcopy\(\(model, criterion, optimizer\)\)") as caught:
        copied.step()
    assert len(caught) == 1
    if new:
        for p, e in zip(model.parameters(), expected):
            torch.testing.assert_close(p, e)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if called == "its copy":
            with pytest.raises(RuntimeError, match=UNFINISHED):
                zero_before(criterion, model, copied, 1)
        else:
            zero_before(criterion, model, copied, 1)
        criterion.discard()
        copied.robust = criterion  # what the warning advises
        for step in range(2):
            zero_before(criterion, model, copied, step)


def test_no_warning_without_gradients():
    """Such a step makes the states, before a checkpoint is loaded."""
    criterion, model = deferred(), network()
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        for step in range(2):
            zero_before(criterion, model, optimizer, step)
        model(batch()[0]).sum().backward()
        optimizer.step()  # another loss, in between


def test_two_optimizers_of_one_criterion():
    """Two optimizers share one step, in both orders: the first ends it, and the second takes the same scale."""
    for which in itertools.permutations(range(2)):
        criterion, model = deferred(), network()
        optimizers = [ab.ABSGD(part.parameters(), lr=0.1, robust=criterion) for part in (model[0], model[2])]
        for _ in range(3):
            backward(criterion, model)
            for i in which:
                optimizers[i].step()
                optimizers[i].zero_grad()


# ---- ends and copies in the middle of a step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["discard", "dropped"])
def test_a_step_that_ends_inside_a_hook_of_an_optimizer(end):
    """torch walks over the hooks at that time, so ours must not be removed."""
    held = [ab.ABLoss(lam=0.5, deferred=True)]
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def hook(*args):
        held[0].discard() if end == "discard" else held.clear()
        gc.collect()

    handle = register_optimizer_step_post_hook(hook)
    try:
        held[0](layer(torch.ones(2, 3)), torch.tensor([0, 1])).backward()
        optimizer.step()
    finally:
        handle.remove()
    other = ab.ABLoss(lam=0.5, deferred=True)
    other(layer(torch.ones(2, 3)), torch.tensor([0, 1])).backward()
    other.finish_(layer.parameters())
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_a_step(copied):
    """torch copies no gradients, so it warns; after discard() the copy does not count the rows that made them."""
    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    model, criterion = torch.nn.Linear(6, 5), ab.ABLoss(lam=0.5, deferred=True)
    optimizer = ab.ABSGD(model.parameters(), lr=1.0, momentum=0.0, robust=criterion)
    fresh = copied((model, criterion, optimizer))
    criterion(model(x), y).backward()
    with pytest.warns(UserWarning, match="in the middle of a deferred step"):
        late = copied((model, criterion, optimizer))
    late[1].discard()
    steps = []
    for copied_model, copied_criterion, copied_optimizer in (fresh, late):
        before = copied_model.weight.detach().clone()
        copied_criterion(copied_model(x), y).backward()
        copied_optimizer.step()
        steps.append(copied_model.weight.detach() - before)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-6, atol=0)
