"""The registered operators: opcheck on arguments that the public functions pass, C++ signatures against schemas, instruction sets."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import absgd_fast as ab
from absgd_fast import _backend, ops
from absgd_fast.functional import logit_loss, robust_weights, weighted_momentum_step_
from absgd_fast.meta import rectified

# the planned step reads a table of addresses, which cannot be copied, faked or traced: its tests are those of the optimizer
ADDRESSES = {"planned_step"}
CPU_ONLY = {"rule_weights", "group_weights"}  # see ops.py
native = pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")


def registered():
    """Name -> schema of every operator in the namespace."""
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("absgd_fast::")}
    return {n: getattr(torch.ops.absgd_fast, n).default._schema for n in sorted(names)}


def has_kernel(name, key="CPU"):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"absgd_fast::{name}", key)


def takes_tensors(schema):
    return any("Tensor" in str(a.type) for a in schema.arguments)


def with_tensors():
    """The operators on tensors that have a kernel of the CPU; it makes gradients in the forward pass, so not all have."""
    return [n for n, schema in registered().items() if takes_tensors(schema) and has_kernel(n)]


def kind(type_):
    """A schema's type as native_signatures writes it."""
    text = str(type_).replace("SymInt", "int")
    while "[" in text.replace("[]", ""):
        outer, inner = text[: text.index("[")], text[text.index("[") + 1 : text.rindex("]")]
        text = inner + {"Optional": "?", "List": "[]"}[outer]
    return text


def test_native_library_is_there_when_a_compiler_is():
    """Otherwise every test of the kernels would be skipped by a broken build."""
    assert _backend.available("cpu") or not shutil.which("c++"), _backend.report()["backends"]["cpu"]["reason"]


@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_signatures_match_the_schemas(library):
    """The stable ABI does not check them: an int against a double gives 0 without a word."""
    signatures, schemas = _backend.native_signatures(library), registered()
    if not signatures:
        pytest.skip(f"the {library} library: {_backend.build_info()['cuda_reason' if library == 'cuda' else 'reason']}")
    served = {n for n in schemas if has_kernel(n, library.upper())}
    assert served and served <= signatures.keys() <= schemas.keys()
    if library == "cuda":
        assert served == {n for n, schema in schemas.items() if takes_tensors(schema)} - CPU_ONLY
    for name, (arguments, returns) in signatures.items():
        schema = schemas[name]
        assert [kind(a.type) for a in schema.arguments] == list(arguments), name
        assert [kind(r.type) for r in schema.returns] == list(returns), name


class Recorder(TorchDispatchMode):
    """Keeps, for each operator of ours, copies of the arguments of its calls."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "absgd_fast":
            copies = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls.setdefault(func._schema.name.split("::")[1], []).append((func, *copies))
        return func(*args, **(kwargs or {}))


def use_everything():
    """Public calls that between them reach every operator, with every optional argument present and absent."""
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    image = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    weight, three = torch.rand(5), torch.rand(4)
    for loss in (
        logit_loss(logits, target),
        logit_loss(logits.transpose(0, 1)[:4, :4], target.int() % 4, weight=weight[:4], label_smoothing=0.1),
        logit_loss(image, torch.zeros(2, 3, dtype=torch.int64)),
    ):
        loss.backward(torch.rand_like(loss), retain_graph=True)
        loss.sum().backward()
    with torch.no_grad():
        logit_loss(logits, target)
    losses = torch.rand(7, requires_grad=True)
    for init, mask in (("first", None), ("zero", torch.arange(7) > 2)):
        weights, log_s = robust_weights(losses, 0.3, 0.7, init=init, mask=mask)
        (weights.sum() + log_s).backward()
    for mask in (None, target > 0):
        ab.weights.cvar(three, 0.4, mask=mask)
        ab.weights.chi2(three.double(), 0.4, mask=mask)
        ab.weights.GroupDRO(2)(three, target % 2, mask=mask)
    rectified(three - 0.5)
    rectified(three.double())
    arguments = {"score": three, "sample_weight": three, "mask": target > 0}
    for criterion, args in (
        (ab.ABLoss(ab.CrossEntropy(weight), lam=0.7), (logits, target)),
        (ab.ABLoss(lambda x: x * 1, lam=-0.7, mix=0.5, max_weight=2.0, normalizer="batch"), (three.clone().requires_grad_(),)),
    ):
        for keywords in ({}, arguments):
            value = criterion(*args, **keywords)
            value.backward(retain_graph=True)
            (value * 3).backward()
            criterion(*args, update=False, **keywords)
    for bits in ({}, {"mask": target > 0, "sample_weight": three, "score": three}):
        hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        for loss in (ab.CrossEntropy(), ab.CrossEntropy(weight, label_smoothing=0.1), ab.LDAM(range(1, 6))):
            ab.LinearABLoss(loss, lam=0.7)(hidden, head, target, **bits).backward()
    deferred = ab.ABLoss(lambda x: x * 1, lam=0.7, deferred=True, loss_divisor=2)
    for keywords in (arguments, {}, arguments):
        deferred(three.clone().requires_grad_(), **keywords).backward()
    deferred.settle()
    deferred = ab.ABLoss(ab.CrossEntropy(weight), lam=0.7, deferred=True)
    for keywords in ({}, {}, arguments):  # where kernels weigh late, all but the first find the reference point
        deferred(logits, target, **keywords).backward(retain_graph=True)
        deferred(logits, target, **keywords).backward()
    deferred.settle()
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (3, 20)]
    for make, options in (
        (ab.ABSGD, {}),
        (ab.ABSGD, {"nesterov": True, "weight_decay": 0.1}),
        (ab.ABSGD, {"heavy_ball": True}),
        (ab.ABAdamW, {"amsgrad": True}),
        (ab.ABRMSprop, {"momentum": 0.9, "centered": True}),
        (ab.ABAdagrad, {}),
    ):
        optimizer = make(parameters, lr=0.1, **options)
        for _ in range(2):
            for p in parameters:
                p.grad = torch.rand_like(p)
            optimizer.step()
    p, g, b, c = ([torch.rand(n) for n in (3, 20)] for _ in range(4))
    torch.ops.absgd_fast.step_(p, g, b, [], None, None, None, None, 0.1, 0.01, 0.9, 0.0, 0.0, ops.RULES.index("sgd"), 0)
    steps, lr = [torch.zeros(()) for _ in p], torch.tensor(0.1)
    torch.ops.absgd_fast.step_(
        p, g, [*b, *c], steps, lr, None, None, None, 0.0, 0.01, 0.9, 0.99, 1e-8, ops.RULES.index("adam"), 0
    )

    weighted = partial(weighted_momentum_step_, p, b, [torch.rand(4, *t.shape) for t in p], three, lam=0.7)
    log_s = weighted(-1.0, lr=0.1, weight_decay=0.1)
    weighted(log_s, lam=torch.tensor(0.7), lr=lr, momentum=0.0, mask=target > 0, sample_weight=three)


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    with Recorder() as recorder:
        use_everything()
    return recorder.calls


@native
def test_every_operator_has_a_sample(calls):
    """A new operator fails here until use_everything reaches it."""
    assert set(with_tensors()) == calls.keys()


@native
@pytest.mark.parametrize("name", [n for n in with_tensors() if n not in ADDRESSES])
def test_opcheck(calls, name):
    """Schema (what is written, what is aliased), fake against real, autograd keys, AOT dispatch with dynamic shapes."""
    seen = set()
    for func, args, kwargs in calls[name]:
        form = str([(a.dtype, a.dim()) if isinstance(a, torch.Tensor) else type(a) for a in args])
        if form not in seen:  # once for each combination of dtypes, ranks and absent arguments
            seen.add(form)
            torch.library.opcheck(func, args, kwargs)
    assert seen


@native
def test_results_are_new_memory(calls):
    """No operator returns its own input: a result is nobody else's memory."""
    for name in calls.keys() - ADDRESSES:
        for func, args, kwargs in calls[name]:
            args = tree_map_only(torch.Tensor, torch.clone, args)
            inputs = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
            results = func(*args, **kwargs)
            results = [r for r in (results if isinstance(results, tuple) else [results]) if isinstance(r, torch.Tensor)]
            places = [t.untyped_storage().data_ptr() for t in results if t.numel()]
            assert not set(places) & {t.untyped_storage().data_ptr() for t in inputs if t.numel()}, name


@native
def test_choosing_an_instruction_set():
    """Each one that is listed runs, and the choice is undone by the name that was returned."""
    names = _backend.cpu_isas()
    assert "baseline" in names and len(set(names)) == len(names)
    x, y = torch.randn(6, 37, dtype=torch.float64), torch.arange(6)
    wanted = torch.nn.functional.cross_entropy(x, y, reduction="none")
    before = _backend.set_cpu_isa("baseline")
    try:
        assert before in names
        for name, last in zip([*names, "baseline"], ["baseline", *names]):
            assert _backend.set_cpu_isa(name) == last
            np.testing.assert_allclose(logit_loss(x, y, backend="cpu"), wanted, rtol=1e-12)
        with pytest.raises(ValueError, match="(?s)abacus.*baseline"):
            _backend.set_cpu_isa("abacus")
        assert _backend.set_cpu_isa(before) == "baseline"
    finally:
        _backend.set_cpu_isa(before)


def test_report_names_every_backend():
    """`doctor` prints it: what can run, and why something cannot."""
    backends = _backend.report()["backends"]
    assert {"cpu", "reference"} <= backends.keys() and backends["reference"]["available"]
    assert all(b["available"] or b["reason"] for b in backends.values())
