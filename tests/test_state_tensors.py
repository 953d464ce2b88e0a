"""State tensors (log s, lambda, log q): buffers for saving, loading and moving, and for nothing else; meta device; transforms."""

import copy
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import identity
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from two_processes import needs_gloo

import absgd_fast as ab
from absgd_fast._exact import ExactState, state_tensors
from absgd_fast._scheduled import Scheduled
from absgd_fast.compat import losses as compat
from absgd_fast.compat import repository

INF, NAN = math.inf, math.nan
X = torch.tensor([[0.4, -1.0, 2.0], [3.0, 0.3, -0.7], [0.0, 0.1, 0.2], [-2.0, 1.0, 1.5]])
Y, GROUPS = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 0])
COUNTS = [40, 15, 5]

# name: (constructor, a training forward of x). Each forward moves the state.
STATEFUL = {
    "ABLoss": (lambda: ab.ABLoss(lam=0.5), lambda m, x, **k: m(x, Y, **k)),
    "RelativeLam": (lambda: ab.ABLoss(lam=ab.RelativeLam(0.5)), lambda m, x, **k: m(x, Y, **k)),
    "TargetESS": (lambda: ab.ABLoss(lam=ab.TargetESS(0.6)), lambda m, x, **k: m(x, Y, **k)),
    "callable": (lambda: ab.ABLoss(identity, lam=-0.5), lambda m, x, **k: m(x.square().sum(1), **k)),
    "LinearABLoss": (lambda: ab.LinearABLoss(lam=0.5), lambda m, x, **k: m(x, torch.eye(3), Y, **k)),
    "rule": (lambda: ab.ABLoss(rule=ab.weights.GroupDRO(2, eta=0.5)), lambda m, x, **k: m(x, Y, groups=GROUPS, **k)),
    "GroupDRO": (lambda: ab.weights.GroupDRO(2, eta=0.5), lambda m, x, **k: m(x.square().sum(1), GROUPS, **k).sum()),
    "compat": (lambda: compat.ABLoss(0.5), lambda m, x: (m.updateLambda(), m(x, Y))[1]),
}


class Stateful(NamedTuple):
    make: Callable[[], nn.Module]
    call: Callable[..., torch.Tensor]  # a training forward, call(module, x)


@pytest.fixture(params=STATEFUL)
def made(request):
    return Stateful(*STATEFUL[request.param])


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items() if isinstance(t, torch.Tensor)}


def same(a, b):
    """Equal to the bit, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7e30), b[k].nan_to_num(7e30)) for k in a)


# ---- no buffers, but saved as buffers are ---------------------------------------------------------------------------------


def test_state_tensors_are_no_buffers(made):
    """Nothing finds them among buffers and parameters; the state_dict has clones of them."""
    module, call = made.make(), made.call
    names = state_tensors(module).keys()
    assert names and not names & dict(module.named_buffers()).keys() and not list(module.parameters())
    before = state(module)
    call(module, X.clone().requires_grad_())
    saved = module.state_dict()
    assert names <= saved.keys() and not same(state(module), before)
    after = state(module)
    for name in names:
        saved[name].fill_(9.0)
    assert same(state(module), after)


def test_saved_under_the_keys_of_old_checkpoints():
    """A checkpoint in which they were buffers, in its order, loads with strict=True."""
    old = OrderedDict(lam=torch.tensor(0.5), log_s=torch.tensor(0.75), nonfinite_batches=torch.tensor(3))
    criterion = ab.ABLoss(lam=0.5)
    assert (
        criterion.state_dict().keys() == old.keys() and str(criterion.load_state_dict(old)) == "<All keys matched successfully>"
    )
    assert same(state(criterion), old)
    rule = ab.weights.GroupDRO(2)
    assert list(rule.state_dict()) == ["log_q"]


class Twin(nn.Module):
    """A module of torch's with buffers of the same names."""

    def __init__(self):
        super().__init__()
        for name, t in ab.ABLoss(lam=0.5).state_dict().items():
            self.register_buffer(name, t)


@pytest.mark.parametrize("prefix", ["", "inner."])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "changed",
    [
        {"log_s": None},
        {"lam": None, "log_s": None},
        {"other": torch.ones(2)},
        {"log_s": torch.ones(2)},
        {"lam": torch.ones(2, 1)},
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_as_torch_says_it(changed, strict, prefix):
    """Missing, unexpected and misshapen tensors, of the module and of one inside a model."""
    said = []
    for module in (ab.ABLoss(lam=0.5), Twin()):
        module = module if not prefix else nn.ModuleDict({"inner": module})
        saved = {prefix + name: t for name, t in (Twin().state_dict() | changed).items() if t is not None}
        try:
            said.append(str(module.load_state_dict(saved, strict=strict)))
        except RuntimeError as error:
            said.append(re.sub("for (ABLoss|Twin)", "", str(error)))
    ours, torchs = said
    assert ours == torchs and ("matched" in ours) == (False if strict else changed.keys() == {"nothing"})


def test_loading_writes_in_place(made):
    """A compiled graph and a captured CUDA graph keep the addresses."""
    module, call = made.make(), made.call
    call(module, X.clone().requires_grad_())
    other = made.make()
    places = {name: t.data_ptr() for name, t in state_tensors(other).items()}
    other.load_state_dict(module.state_dict())
    assert {name: t.data_ptr() for name, t in state_tensors(other).items()} == places and same(state(other), state(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_loading_by_assignment(made, dtype):
    """assign=True takes over the dtype of the checkpoint, unless that is too narrow for a moving average."""
    module, call = made.make(), made.call
    call(module, X.clone().requires_grad_())
    saved = {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and name in state_tensors(module) else t
        for name, t in module.state_dict().items()
    }
    with torch.device("meta"):
        other = made.make()
    other.load_state_dict(saved, assign=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, t in state_tensors(other).items():
        assert t.dtype == wide and torch.equal(t, saved[name].to(wide)) and not t.is_meta


# ---- averaging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [False, True])
def test_averaged_model(made, stages):
    """torch's averages of all buffers, made before the first forward and across a switch of lambda."""
    module, call = made.make(), made.call
    model = nn.ModuleDict({"head": nn.Linear(3, 3), "loss": module})
    schedule = ab.TwoStage(module, 0.5, 1) if stages and isinstance(module, ab.ABLoss) and module.rule is None else None
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
        call(module, model["head"](X))
        if schedule is not None:
            schedule.step()
    for name, t in state_tensors(averaged.module).items():
        still_open = name.endswith("lam") and getattr(averaged.module["loss"], "lam_is_open", False)
        assert still_open or not t.isnan().any(), name
    assert call(averaged.module["loss"], averaged.module["head"](X)).isfinite()
    again = nn.ModuleDict({"head": nn.Linear(3, 3), "loss": copy.deepcopy(module)})
    again.load_state_dict(averaged.module.state_dict())
    averages = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # it wants a buffer or parameter
    averages.update_parameters(module), averages.update_parameters(module)


def test_average_of_all_that_is_saved(made):
    """The loop of many scripts: in place it reaches parameters and buffers only."""
    module, call = made.make(), made.call
    ema = copy.deepcopy(module)
    before = state(ema)
    for _ in range(2):
        call(module, X.clone().requires_grad_())
        saved = module.state_dict()
        for name, t in ema.state_dict().items():
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.lerp_(saved[name], 0.1)
    assert same(state(ema), before)


@pytest.mark.parametrize("name", ["lam", "log_s"])
def test_an_average_that_is_no_state_is_refused(name):
    """lerp of -inf and a number is NaN. The error blames the average, and nothing is loaded."""
    criterion = ab.ABLoss(lam=0.5)
    before = state(criterion)
    with pytest.raises(RuntimeError, match=f"{name}.*(?s:.*)state_dicts of several steps were averaged, leave lam and log_s out"):
        criterion.load_state_dict(criterion.state_dict() | {name: torch.tensor(-INF).lerp(torch.tensor(2.0), 0.1)})
    assert same(state(criterion), before)


# ---- moving and copying -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts(made, cast):
    """float32 or float64 whatever the model has, with the same values; as part of a model too."""
    module, call = made.make(), made.call
    call(module, X.clone().requires_grad_())
    before = state(module)
    getattr(nn.Sequential(module), cast)()
    wide = torch.float64 if cast == "double" else torch.float32
    for name, t in state_tensors(module).items():
        assert t.dtype == wide
        torch.testing.assert_close(t.float(), before[name].float(), rtol=1e-7, atol=0, equal_nan=True)


def test_shared_memory(made):
    module, call = made.make(), made.call
    module.share_memory()
    tensors = state_tensors(module)
    assert all(t.is_shared() for t in tensors.values())
    call(module, X.clone().requires_grad_())
    assert all(state_tensors(module)[name] is t for name, t in tensors.items())  # written in place


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alone(made, copied):
    module, call = made.make(), made.call
    call(module, X.clone().requires_grad_())
    other = copied(module)
    assert same(state(other), state(module))
    before = state(module)
    call(other, 2 * X.clone().requires_grad_())
    assert same(state(module), before) and not same(state(other), before)
    call(module, 2 * X.clone().requires_grad_())
    assert same(state(other), state(module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_made_under_another_default_dtype(dtype):
    """Frameworks that load large models set it to half precision meanwhile."""
    torch.set_default_dtype(dtype)
    try:
        modules = [make() for make, _ in STATEFUL.values()]
    finally:
        torch.set_default_dtype(torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for m in modules for t in state_tensors(m).values()} == {wide}


@pytest.mark.parametrize("name", [n for n in STATEFUL if n not in ("rule", "compat")])
@pytest.mark.parametrize("lost", [False, True])
def test_the_state_follows_the_buffers(name, lost):
    """FSDP and DataParallel put buffers on the batch's device and know of nothing else. The meta device stands for the other.

    lost: it stands for the first, whose values nobody has; then the constructor's are taken.
    """
    make, call = STATEFUL[name]
    module = make()
    if lost:
        buffers = {key: b.clone() for key, b in module._buffers.items()}
        wanted = state(module)
        module.to("meta")
        module._buffers.update(buffers)
        module.follow_buffers(torch.device("cpu"))
        assert same(state(module), wanted)
        call(module, X.clone().requires_grad_())
        return
    replica = module._replicate_for_data_parallel()
    for key, b in replica._buffers.items():
        replica._buffers[key] = b.to("meta")
    replica.follow_buffers(torch.device("meta"))
    assert {t.device.type for t in state_tensors(replica).values()} == {"meta"}
    assert {t.device.type for t in state_tensors(module).values()} == {"cpu"}
    replica = module._replicate_for_data_parallel()
    call(replica, X.clone().requires_grad_())
    assert same(state(replica), state(module))  # that on the first device writes the module's own state, as torch's buffers


def test_functional_call_replaces_the_state(made):
    """As for buffers: the given tensors are used and written, and the module keeps its own."""
    module, call = made.make(), made.call
    call(module, X.clone().requires_grad_())
    if not isinstance(module, ExactState) or getattr(module, "rule", None) is not None:
        return
    before = state(module)
    given = {name: t.clone() for name, t in state_tensors(made.make()).items()}
    given = {name: t.nan_to_num(0.5, neginf=-INF) for name, t in given.items()}
    wanted = copy.deepcopy(module)
    wanted.load_state_dict(wanted.state_dict() | given)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return call(self.inner, x)

    got = torch.func.functional_call(
        Calls(), {f"inner.{name}": t for name, t in given.items()}, (2 * X.clone().requires_grad_(),)
    )
    assert torch.equal(got, call(wanted, 2 * X.clone().requires_grad_()))
    assert same(given, state_tensors(wanted)) and same(
        {n: t for n, t in state(module).items() if n in given}, {n: t for n, t in before.items() if n in given}
    )


def test_compiled_forwards_read_and_write_the_state():
    """In one graph, with a state loaded, cast and replaced in between."""
    eager, inner = ab.ABLoss(lam=0.5), ab.ABLoss(lam=0.5)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    for step in range(5):
        x = (X * (1 + step)).requires_grad_()
        wanted, got = eager(x, Y), compiled(x, Y)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(inner.log_s, eager.log_s, rtol=1e-6, atol=0)
        if step == 1:
            saved = eager.state_dict()
        elif step == 2:
            for criterion in (eager, inner):
                criterion.load_state_dict(saved)
        elif step == 3:
            for criterion in (eager, inner):
                criterion.set_lam(-0.5)


# ---- the meta device --------------------------------------------------------------------------------------------------------

# Every public class whose constructor makes a tensor or computes with some.
ON_META = {
    **{name: make for name, (make, _) in STATEFUL.items()},
    "zero": lambda: ab.ABLoss(lam=-0.5, init="zero", normalizer="none"),
    "DFT": lambda: ab.DFT(),
    "CrossEntropy": lambda: ab.CrossEntropy(),
    "class weights": lambda: ab.CrossEntropy(weight=ab.class_balanced_weights(COUNTS)),
    "a list of weights": lambda: ab.Focal(weight=[1.0, 2.0, 3.0]),
    "GCE": lambda: ab.GCE(weight=ab.adrw_weights(COUNTS, 0.5)),
    "SCE": lambda: ab.SCE(),
    "LDAM": lambda: ab.LDAM(COUNTS),
    "LDAM with weights": lambda: ab.ABLoss(ab.LDAM(COUNTS, weight=ab.class_balanced_weights(COUNTS)), lam=0.5),
    "VS": lambda: ab.VS(COUNTS),
    "CDT": lambda: ab.CDT(COUNTS),
    "LogitAdjusted": lambda: ab.LogitAdjusted(COUNTS),
    "vs_tla_adrw": lambda: ab.vs_tla_adrw(COUNTS, start=0)[0],
    "DRW": lambda: ab.DRW(ab.CrossEntropy(), ab.adrw_weights(COUNTS, 0.5), 1).loss,
    "DRW from the start": lambda: ab.DRW(ab.CrossEntropy(), [0.5, 1.0, 1.5], 0).loss,
    "TLA": lambda: ab.TLA(ab.VS(COUNTS), 0).loss,
    "TwoStage": lambda: ab.TwoStage(ab.ABLoss(lam=0.5), 0.25, 1).criterion,
    "TwoStage from the start": lambda: ab.TwoStage(ab.ABLoss(lam=0.5), ab.RelativeLam(0.25), 0).criterion,
    "Focal of the research code": lambda: repository.Focal(2.0, torch.tensor([1.0, 2.0, 3.0], device="cpu")),
    "research code": lambda: repository.ABLoss(300.0),
    "LabelAudit": lambda: ab.LabelAudit(5),
}


def test_every_public_module_is_in_the_table():
    kinds = {type(m) for make in ON_META.values() for m in make().modules()} | {type(x) for x in (ab.CosineClassifier(2, 2),)}
    public = {getattr(space, n) for space in (ab, ab.losses, ab.weights, compat, repository) for n in vars(space) if n[0] != "_"}
    modules = {c for c in public if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__.startswith("absgd_fast")}
    assert modules - kinds == {ab.losses.LogitLoss, Scheduled}


@pytest.mark.parametrize("name", ON_META)
@pytest.mark.parametrize("how", ["alone", "in a model", "without recursion"])
def test_materialised_from_the_meta_device(name, how):
    """`to_empty` gives the state of the constructor, as torch's modules get theirs by `reset_parameters`."""
    with torch.device("meta"):
        module = ON_META[name]()
        repr(module)
    if how == "without recursion":  # as FSDP1 goes
        for m in module.modules():
            m.to_empty(device="cpu", recurse=False)
    else:
        (module if how == "alone" else nn.Sequential(module)).to_empty(device="cpu")
    wanted = ON_META[name]()
    assert same(state(module), state(wanted)) and repr(module) == repr(wanted)
    assert getattr(module, "lam_is_open", None) == getattr(wanted, "lam_is_open", None)
    if (
        isinstance(module, (ab.ABLoss, ab.losses.LogitLoss))
        and getattr(module, "rule", None) is None
        and name not in ("LinearABLoss", "callable")
    ):
        assert torch.equal(module(X, Y), wanted(X, Y))


@pytest.mark.parametrize("name", ON_META)
def test_through_the_meta_device(name):
    """A module that was moved there and back is as its constructor left it. `to_empty` to the same device loses nothing."""
    module, wanted = ON_META[name](), ON_META[name]()
    module.to_empty(device="cpu")
    assert same(state(module), state(wanted))
    module.to("meta").double()
    module.to_empty(device="cpu")
    assert same(state(module.float()), state(wanted))


@needs_gloo
@pytest.mark.filterwarnings("ignore")  # torch's, of FSDP1 and of a mesh on the CPU
@pytest.mark.parametrize("wrapper", ["FSDP1", "FSDP2"])
def test_fsdp_makes_a_model_from_the_meta_device(wrapper, tmp_path):
    """FSDP1 calls to_empty and reset_parameters on modules with parameters or buffers; FSDP2 leaves them to the user."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.loss, self.rule = nn.Linear(3, 3), ON_META["LDAM with weights"](), ON_META["rule"]()

        def forward(self, x, y):
            return self.loss(self.net(x), y) + self.rule(self.net(x), y, groups=GROUPS)

    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = Model()
    wanted = [state(model.loss), state(model.rule)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Model()
        if wrapper == "FSDP1":
            call = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            call = fsdp.fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
            model.to_empty(device="cpu")
        assert all(same(state(m), before) for m, before in zip((model.loss, model.rule), wanted))
        call(X, Y).backward()
    finally:
        dist.destroy_process_group()


def test_reset_parameters(made):
    """Everything as after the constructor, and a RelativeLam is open again."""
    module, call = made.make(), made.call
    before = state(module)
    call(module, (X * NAN).requires_grad_()), call(module, X.clone().requires_grad_())
    assert not same(state(module), before)
    for m in module.modules():
        if isinstance(m, ExactState) and not isinstance(module, compat.ABLoss):
            m.reset_parameters()
    assert isinstance(module, compat.ABLoss) or same(state(module), before)
    assert getattr(module, "lam_is_open", None) == getattr(made.make(), "lam_is_open", None)


def test_the_layer_draws_new_weights():
    """As torch.nn.Linear."""
    layer = ab.CosineClassifier(8, 3)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before) and layer.weight.abs().max() <= 8**-0.5
    with torch.device("meta"):
        layer = ab.CosineClassifier(8, 3)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.abs().max() <= 8**-0.5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ab.ABLoss(lam=torch.tensor(0.5)), "lam: got a tensor on the meta device, which has no value"),
        (lambda: ab.CrossEntropy(weight=torch.ones(3)), "weight: got a tensor on the meta device, which has no values"),
        (lambda: ab.DRW(ab.CrossEntropy(), torch.ones(3), 1), "weight: got a tensor on the meta device"),
        (lambda: ab.LDAM(torch.tensor([3, 1])), "cls_num_list: got a tensor on the meta device"),
    ],
    ids=["lam", "weight", "DRW", "counts"],
)
def test_numbers_without_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        make()


# ---- transforms -------------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X)[0],
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, -X])),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, -X])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [n for n in STATEFUL if n != "compat"])
def test_a_transform_cannot_update_the_state(name, transform):
    """The error names what can: update=False and eval(). Both then compute, and leave the state."""
    make, call = STATEFUL[name]
    module = make()
    before = state(module)
    with pytest.raises(RuntimeError, match=rf"{type(module).__name__}: .*transform.*update=False.*eval\(\)"):
        TRANSFORMS[transform](partial(call, module))
    assert same(state(module), before) and getattr(module, "lam_is_open", None) == getattr(make(), "lam_is_open", None)
    by_update = TRANSFORMS[transform](partial(call, module, update=False))
    torch.testing.assert_close(TRANSFORMS[transform](partial(call, module.eval())), by_update)
    assert same(state(module), before)


def test_group_weights_of_several_batches():
    """vmap over batches is a loop over batches."""
    rule = ab.weights.GroupDRO(2, eta=0.5)
    losses = torch.rand(3, 4)
    got = torch.vmap(lambda x: rule(x, GROUPS, update=False))(losses)
    torch.testing.assert_close(got, torch.stack([rule(x, GROUPS, update=False) for x in losses]))
