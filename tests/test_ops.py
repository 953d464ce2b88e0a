"""The registered operators: opcheck on the public functions' arguments, C++ signatures against schemas, instruction sets."""

import copy
import pickle
import re
import shutil
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import absgd_fast as ab
from absgd_fast import _backend, ops, reference
from absgd_fast.functional import logit_loss, loss_spec, robust_weights, weighted_momentum_step_
from absgd_fast.meta import rectified

# These read a table of addresses, which cannot be copied, faked or traced. Their tests are those of the optimizer.
ADDRESSES = {"planned_step", "planned_squares"}
CSRC = Path(__file__).resolve().parent.parent / "csrc"
native = pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")


def registered():
    """Name -> schema of every operator in the namespace."""
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("absgd_fast::")}
    return {n: getattr(torch.ops.absgd_fast, n).default._schema for n in sorted(names)}


def of(backend):
    """The operators that the records give to a backend's native library."""
    return {name for name, record in ops.RECORDS.items() if backend in record.native}


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
    served = {n for n in schemas if takes_tensors(schemas[n]) and has_kernel(n, library.upper())}
    assert served == of(library) and served <= signatures.keys() <= schemas.keys()
    for name, (arguments, returns) in signatures.items():
        schema = schemas[name]
        assert [kind(a.type) for a in schema.arguments] == list(arguments), name
        assert [kind(r.type) for r in schema.returns] == list(returns), name


def test_every_operator_is_a_record():
    """What is registered, and nothing else: the other schemas take no tensors."""
    assert ops.RECORDS.keys() == {n for n, schema in registered().items() if takes_tensors(schema)}
    assert all(name == record.name for name, record in ops.RECORDS.items())


def test_lists_in_cpp_are_those_of_the_records():
    """What csrc registers one by one or by a list for its macros: for both libraries, or for the one that the file is part of."""
    lists = {"both": set(), "cpu": set(), "cuda": set()}
    for path in filter(Path.is_file, CSRC.rglob("*")):
        where = next((b for b in ("cpu", "cuda") if b in str(path.relative_to(CSRC))), "both")
        text = path.read_text()
        bodies = re.findall(r"#define \w+\(OP\)((?:.*\\\n)*.*\n)", text)
        names = re.findall(r"OP\((\w+)\)", "".join(bodies)) + re.findall(r"ABSGD_IMPL\((\w+)\)", text)
        lists[where] |= set(names) & ops.RECORDS.keys()
    cpu, cuda = of("cpu"), of("cuda")
    assert lists == {"both": cpu & cuda, "cpu": cpu - cuda, "cuda": cuda - cpu}


def test_backends_have_the_operators_of_their_records():
    """Plain torch has what it is written for, Triton that or a function of its own."""
    attributes = {name: vars(operators).keys() & ops.RECORDS.keys() for name, operators in ops.OPERATORS.items()}
    in_torch = {name for name, record in ops.RECORDS.items() if record.in_torch is not None}
    twins = {name for name, record in ops.RECORDS.items() if record.triton is not None}
    assert attributes == {"cpu": of("cpu"), "cuda": of("cuda"), "triton": twins | in_torch, "reference": in_torch}
    assert [name for name, operators in ops.OPERATORS.items() if not operators.has_kernels] == ["reference"]


@pytest.mark.parametrize("backend", list(ops.OPERATORS))
def test_copies_of_operators(backend):
    """A deep copy and a pickle are the same operators; a copy is other ones, so a change of it is nobody else's."""
    operators = ops.OPERATORS[backend]
    assert copy.deepcopy(operators) is operators and pickle.loads(pickle.dumps(operators)) is operators
    copied = copy.copy(operators)
    copied.changed = True
    assert copied.robust_loss is operators.robust_loss and not hasattr(operators, "changed")


def test_operators_are_declared_as_their_schemas_say():
    """The annotations of `Operators`, which are for the type checker: every operator, and how many results it has."""
    declared = {name: get_args(hint)[1] for name, hint in get_type_hints(ops.Operators).items()}
    assert declared.keys() == ops.RECORDS.keys()
    for name, result in declared.items():
        results = get_args(result) or (() if result in (None, type(None)) else (result,))
        assert [torch.Tensor] * len(registered()[name].returns) == list(results), name


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
        (ab.ABSGD, {"heavy_ball": True, "max_norm": 1.0}),
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
@pytest.mark.parametrize("name", sorted(vars(ops.REFERENCE).keys() & set(with_tensors())))
def test_plain_torch_does_what_the_kernels_do(calls, name):
    """Results, and what is written in place; what is saved for backward is the kernels' own affair."""
    for func, args, kwargs in calls[name]:
        ours, plain = (tree_map_only(torch.Tensor, torch.clone, args) for _ in range(2))
        got = getattr(ops.REFERENCE, name)(*plain, **kwargs)
        wanted = func(*ours, **kwargs)
        got, wanted = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (got, wanted))
        names = [r.name for r in func._schema.returns]
        compared = [i for i, returned in enumerate(names) if returned not in ("saved", "grad", "dlog_s")]
        assert compared and len(got) == len(wanted)
        pairs = [(got[i].detach(), wanted[i]) for i in compared] + list(zip(tree_flatten(plain)[0], tree_flatten(ours)[0]))
        for a, b in pairs:
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("update", [0, ops.UPDATE])
@pytest.mark.parametrize("kind", ["ce", "gce"])
def test_robust_loss_of_plain_torch_is_that_of_its_losses(kind, update):
    """Bit for bit, with a gradient by autograd; a label out of range may stand where a row is masked."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, -100, 2, 99, 1])
    mask = torch.tensor([True, True, True, False, False, True])
    score, weight = torch.rand(6), torch.rand(6)
    spec = loss_spec(kind, torch.rand(5), None, 0.0, -100, 2.0, 0.7, 0.3, True, 0.1, 1.0)
    state = [torch.tensor(0.3), torch.tensor(0), torch.tensor(0.7)]
    before = [t.clone() for t in state]
    numbers = (0.6, 0.5, 0.25, 3.0, ops.flags("moving", "zero") | update | spec.bits)
    loss, stats, saved = ops.REFERENCE.robust_logit_loss(logits, target, *spec[:5], score, weight, mask, *state, *numbers, None)
    losses = spec.recompute(logits, target.where(mask, -100))
    counts = spec.valid(target, losses) & mask
    wanted, weights, log_s, _ = reference.robust_loss(
        losses,
        *before[::2],
        score=score,
        mask=counts,
        mix=0.25,
        max_weight=3.0,
        sample_weight=weight,
        gamma=0.6,
        alpha=0.5,
        init="zero",
    )
    assert torch.equal(loss, wanted) and torch.equal(stats[1], weights) and torch.equal(stats[2] > 0, counts) and saved is None
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (loss, wanted)))
    assert torch.equal(state[0], log_s if update else before[0]) and state[1] == 0
    assert (
        ops.REFERENCE.backward_mode(logits)
        == ops.REFERENCE.losses_backward_mode(logits)
        == ops.REFERENCE.vector_backward_mode
        == 0
    )


@pytest.mark.parametrize("update", [0, ops.UPDATE])
def test_a_nonfinite_loss_in_plain_torch(update):
    """Is counted, and leaves log s."""
    losses, log_s, nonfinite = torch.tensor([1.0, float("nan")]), torch.tensor(0.3), torch.tensor(2)
    flags = ops.flags("moving", "first") | update
    _, stats, _ = ops.REFERENCE.robust_loss(
        losses, None, None, None, log_s, nonfinite, torch.tensor(1.0), 0.9, 1.0, 0.0, float("inf"), flags
    )
    assert stats[1].isnan().tolist() == [False, True] and log_s == torch.tensor(0.3) and nonfinite == 2 + (update > 0)


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
