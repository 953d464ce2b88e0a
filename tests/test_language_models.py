"""DFT and causal_lm_loss, on models written here. tests/integrations/test_causal_lm.py has those of transformers."""

import copy
import math
from functools import partial

import pytest
import torch
from test_linear import native
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, D, LAM = 30, 6, -0.5
BACKENDS = ["reference", pytest.param("cpu", marks=native)]


class Model(nn.Module):
    """A causal language model as of transformers: its outputs are a mapping, a tuple or the logits."""

    def __init__(self, form="mapping", bias=True, tied=False, after=lambda logits: logits):
        super().__init__()
        self.body, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, D)
        self.lm_head = nn.Linear(D, VOCAB, bias=bias)
        if tied:
            self.lm_head.weight = self.body.weight
        self.form, self.after = form, after

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None):
        hidden = self.mix(self.body(input_ids)).cumsum(1).tanh()
        logits = self.after(self.lm_head(hidden))
        return {"mapping": {"logits": logits, "hidden": hidden}, "tuple": (logits, hidden), "tensor": logits}[self.form]


def made(**options):
    torch.manual_seed(0)
    return Model(**options).double()


def batch(rows=slice(None)):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (5, 9), generator=draw)
    labels = ids.clone()
    for row in range(5):
        labels[row, :row] = -100
    return {"input_ids": ids[rows], "labels": labels[rows]}


def losses_of(model, inputs):
    """(B, T - 1) from stored logits, and which of them count."""
    logits = F.linear(model.mix(model.body(inputs["input_ids"])).cumsum(1).tanh(), model.lm_head.weight, model.lm_head.bias)
    labels = inputs["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none"), labels != -100


def truth(model, inputs, log_s=None, lam=LAM):
    losses, counts = losses_of(model, inputs)
    z = losses.detach()[counts] / lam
    log_s = z.logsumexp(0) - math.log(len(z)) if log_s is None else log_s
    return ((z - log_s).exp() * losses[counts]).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def linear(**options):
    return ab.LinearABLoss(lam=LAM, **options).double()


FORMS = {
    "mapping": {},
    "tuple": dict(form="tuple"),
    "tensor": dict(form="tensor"),
    "no bias": dict(bias=False),
    "tied": dict(tied=True, bias=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_formula(form, backend):
    model, inputs, one = made(**FORMS[form]), batch(), linear(backend=backend, chunk=7)
    wanted = truth(model, inputs)
    loss, outputs = ab.causal_lm_loss(one, model, dict(inputs, labels_of_another_model=1), return_outputs=True)
    assert_same(loss, wanted)
    assert_same(gradients(model, loss), gradients(model, wanted))
    losses, counts = losses_of(model, inputs)
    assert_same(one.last.losses, F.pad(losses, (0, 1)).detach())
    assert_same(one.last.weights[:, :-1] != 0, counts)
    if model.form == "mapping":
        assert outputs["loss"] is loss and outputs["logits"] is None and outputs["hidden"].shape == (5, 9, D)
    else:
        assert loss is (outputs[0] if model.form == "tuple" else outputs)
    assert "forward" not in vars(model.lm_head) and not model._forward_hooks


def test_shifted_labels_and_what_is_ignored():
    """shift_labels count before labels; -100 is ignored, whatever else the criterion ignores."""
    model, inputs = made(), batch()
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    wanted = truth(model, inputs)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": shifted.clone().fill_(3)}):
        assert_same(ab.causal_lm_loss(linear(), model, {"input_ids": inputs["input_ids"], **given}), wanted)
    one = ab.LinearABLoss(ab.CrossEntropy(ignore_index=13), lam=LAM).double()
    fewer = {**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == 13, -100)}
    assert_same(ab.causal_lm_loss(one, model, inputs), truth(model, fewer))
    assert_same(ab.causal_lm_loss(linear(), model, {**inputs, "attention_mask": torch.zeros(5, 9)}), wanted)


def test_evaluation_leaves_the_state():
    model, inputs, one = made(), batch(), linear()
    ab.causal_lm_loss(one, model, inputs)
    before = one.log_s.clone()
    with torch.no_grad():
        assert not ab.causal_lm_loss(one, model, inputs).requires_grad
    assert_same(ab.causal_lm_loss(one.eval(), model.eval(), inputs), truth(model, inputs))
    assert torch.equal(one.log_s, before)


@native
def test_micro_batches():
    model, one = made(), linear(deferred=True)
    wanted = gradients(model, truth(model, batch()))
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 5)):
        ab.causal_lm_loss(one, model, batch(rows)).backward()
    assert one.finish_(model.parameters())
    assert_same([p.grad for p in model.parameters()], wanted)


@native
def test_under_autocast():
    model, inputs, one = made().float(), batch(), ab.LinearABLoss(lam=LAM)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ab.causal_lm_loss(one, model, inputs)
    torch.testing.assert_close(loss, truth(model, inputs), rtol=2e-2, atol=0)
    assert all(g.dtype == torch.float32 for g in gradients(model, loss))


class Largest(TorchDispatchMode):
    """The largest memory of a tensor that an operation of torch makes, in numbers of 8 bytes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // 8 for t in tensors)])
        return out


@native
def test_logits_are_not_stored():
    """A chunk of them is, and a gradient as large as the head."""
    model, ids = made(), torch.arange(20 * 60).view(20, 60) % VOCAB
    one, inputs = linear(chunk=40), {"input_ids": ids, "labels": ids}
    with Largest() as seen:
        ab.causal_lm_loss(one, model, inputs).backward()
    assert seen.numbers == ids.numel() * D < 40 * VOCAB * 8 < ids.numel() * VOCAB / 3
    with Largest() as seen:
        model(ids)
    assert seen.numbers == ids.numel() * VOCAB


def averaged(rank):
    """Two processes with uneven batches: the gradient of one batch, and the same parameters afterwards.

    A model that is called round its wrapper fails here: nobody averages its gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, mesh, ddp = made(), init_device_mesh("cpu", (RANKS,)), nn.parallel.DistributedDataParallel
    wanted = gradients(whole, truth(whole, batch()))
    for wrap in (
        ddp,
        partial(ddp, find_unused_parameters=True),
        partial(ddp, static_graph=True),
        partial(fully_shard, mesh=mesh),
        lambda model: fully_shard(model.lm_head, mesh=mesh) and fully_shard(model, mesh=mesh),
    ):
        model = wrap(copy.deepcopy(whole))
        loss = ab.causal_lm_loss(linear(), model, batch([slice(0, 4), slice(4, 5)][rank]))
        got = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model, loss)]
        assert_same(got, wanted)
        torch.distributed.all_reduce(loss := loss.detach())
        assert_same(loss / RANKS, truth(whole, batch()).detach())


@native
@needs_gloo
def test_two_processes(tmp_path):
    run(averaged, tmp_path)


@native
def test_compiled():
    """What is compiled for logits is not used for the loss, nor the other way round."""
    model, inputs = made(), batch()
    wanted = truth(model, inputs)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert_same(ab.causal_lm_loss(linear(), compiled, inputs), wanted)
        assert compiled(inputs["input_ids"])["logits"].shape == (5, 9, VOCAB)


class Conv(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_head(head):
    model = made()
    model.lm_head = head
    return model


def without(*names):
    return {name: value for name, value in batch().items() if name not in names}


def scaled_in_place(logits):
    with torch.no_grad():
        return logits.mul_(2)


def twice():
    model = made()
    model.after = lambda logits: model.lm_head(torch.zeros(5, 9, D))
    return model


class TinyForMaskedLM(Model):
    """Its class name says what it is, as in transformers."""


def masked():
    return TinyForMaskedLM().double()


class Peft(nn.Module):
    """Hands out the attributes of its base, as PEFT's wrapper does."""

    def __init__(self, base):
        super().__init__()
        self.get_base_model, self.get_output_embeddings = (lambda: base), base.get_output_embeddings


class NoHead(Model):
    def forward(self, input_ids):
        return F.linear(self.body(input_ids), self.lm_head.weight)


NOT_LINEAR = "expected a LinearABLoss"
BAD = {
    "criterion": (lambda: (ab.ABLoss(lam=1.0), made(), batch()), TypeError, rf"criterion: got ABLoss, {NOT_LINEAR}"),
    "inputs": (lambda: (linear(), made(), torch.ones(2, 3)), TypeError, "inputs: got Tensor, expected a mapping"),
    "no labels": (
        lambda: (linear(), made(), without("labels")),
        ValueError,
        r"got \['input_ids'\], expected labels \(B, T\) too",
    ),
    "a list of labels": (
        lambda: (linear(), made(), {**batch(), "labels": batch()["labels"].tolist()}),
        TypeError,
        r"labels: got list, expected a tensor \(B, T\)",
    ),
    "a list of shifted labels": (
        lambda: (linear(), made(), {**batch(), "shift_labels": batch()["labels"].tolist()}),
        TypeError,
        r"shift_labels: got list, expected a tensor \(B, T\)",
    ),
    "masked language model": (lambda: (linear(), masked(), batch()), TypeError, "got TinyForMaskedLM, a masked language model"),
    "masked, wrapped": (
        lambda: (linear(), nn.ModuleDict({"module": masked()}), batch()),
        TypeError,
        "got TinyForMaskedLM, a masked language model, whose labels are not shifted",
    ),
    "masked, PEFT": (lambda: (linear(), Peft(masked()), batch()), TypeError, "got TinyForMaskedLM, a masked language model"),
    "no head": (lambda: (linear(), nn.Linear(2, 3), batch()), TypeError, "got Linear, in which no module has get_output_emb"),
    "another head": (
        lambda: (linear(), with_head(Conv(D, VOCAB)), batch()),
        TypeError,
        r"got Model with Conv as get_output_embeddings\(\), expected a torch.nn.Linear",
    ),
    "none": (lambda: (linear(), with_head(None), batch()), TypeError, "got Model with NoneType as get_output_embeddings"),
    "scaled": (lambda: (linear(), made(after=lambda x: 2 * x), batch()), RuntimeError, "Model changes its logits after the head"),
    "scaled in place": (
        lambda: (linear(), made(after=scaled_in_place), batch()),
        RuntimeError,
        "changes its logits after the head",
    ),
    "sliced": (lambda: (linear(), made(after=lambda x: x[:, -3:]), batch()), RuntimeError, "changes its logits after the head"),
    "not called": (lambda: (linear(), NoHead().double(), batch()), RuntimeError, "NoHead did not call its head"),
    "called twice": (lambda: (linear(), twice(), batch()), RuntimeError, "called its head twice"),
    "short labels": (
        lambda: (linear(), made(), {**batch(), "labels": torch.zeros(5, 8, dtype=torch.int64)}),
        ValueError,
        r"labels: got shape \(5, 8\) with hidden states \(5, 9, 6\), expected \(5, 9\)",
    ),
    "label": (lambda: (linear(), made(), {**batch(), "labels": torch.full((5, 9), VOCAB)}), IndexError, "label 30"),
    "dtype": (lambda: (linear(), made().half(), batch()), TypeError, "hidden: got torch.float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    criterion, model, inputs = make()
    head = getattr(model, "lm_head", None)
    with pytest.raises(error, match=message):
        ab.causal_lm_loss(criterion, model, inputs)
    assert "forward" not in vars(head or model) and not model._forward_hooks


# ---- DFT ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
def test_dft_by_its_formula(linear):
    model, inputs = made(), batch()
    losses, counts = losses_of(model, inputs)
    wanted = (losses.detach().neg().exp() * losses)[counts].mean()
    criterion = ab.DFT(linear=linear, deferred=True, process_group=None, backend="reference").double()
    assert criterion.deferred and criterion.process_group is None and criterion.backend == "reference"
    if linear:
        loss = ab.causal_lm_loss(criterion, model, inputs)
    else:
        logits = model(inputs["input_ids"])["logits"][:, :-1]
        loss = criterion(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    assert criterion.finish_(model.parameters())
    got = [p.grad.clone() for p in model.parameters()]
    assert_same(got, gradients(model, wanted))


def test_what_dft_is_made_of():
    focal = ab.Focal()
    assert type(ab.DFT(focal)) is ab.ABLoss and ab.DFT(focal).criterion is focal
    assert type(ab.DFT(focal, linear=True, chunk=3)) is ab.LinearABLoss and ab.DFT(linear=True, chunk=3).chunk == 3
    assert ab.DFT(loss_divisor=4, max_weight=0.5).max_weight == 0.5


@pytest.mark.parametrize("name, value", [("lam", -2.0), ("normalizer", "moving"), ("rule", None)])
@pytest.mark.parametrize("linear", [False, True])
def test_what_dft_refuses(name, value, linear):
    with pytest.raises(
        ValueError, match=f"{name}: got .*, but DFT .*{name}.*; leave {name} out, or use {'Linear' * linear}ABLoss"
    ):
        ab.DFT(linear=linear, **{name: value})
