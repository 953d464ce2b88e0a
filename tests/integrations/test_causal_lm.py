"""causal_lm_loss on models of transformers in the wrappers of trainers, against the formula on stored logits."""

import copy
import math

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

VOCAB, LAM = 50, -0.5
SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options))


def qwen():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True))


def gpt2():
    sizes = dict(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0))


def mixtral():
    sizes = dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager")
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **sizes))


MODELS = {f.__name__: f for f in (llama, qwen, gpt2, gpt_neox, mixtral)}  # qwen and gpt2 tie the head to the embedding


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype)


def batch(rows=slice(None)):
    """Five sequences of nine tokens, padded; the labels ignore the padding and a prompt of another length in each."""
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(VOCAB, (5, 9), generator=draw), torch.ones(5, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for row in range(5):
        labels[row, :row] = -100
    return {"input_ids": ids[rows], "attention_mask": mask[rows], "labels": labels[rows]}


def truth(model, inputs, lam=LAM, dft=False):
    """The robust loss of a first batch, from stored logits (docs/MATH.md §1)."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    losses = F.cross_entropy(logits, labels, reduction="none")[labels != -100]
    z = losses.detach() / (-1.0 if dft else lam)
    log_s = 0.0 if dft else z.logsumexp(0) - math.log(len(z))
    return ((z - log_s).exp() * losses).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(got, wanted, tolerance=1e-12):
    assert abs(got[0] - wanted[0]) <= tolerance * abs(wanted[0])
    assert got[1].keys() == wanted[1].keys() and len(wanted[1]) > 2
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=0, atol=tolerance * float(grad.abs().max().clamp(min=1e-3)), msg=name)


def criterion(**options):
    return ab.LinearABLoss(lam=LAM, **options).double()


@pytest.mark.parametrize("model", MODELS)
def test_the_formula(model):
    model, inputs = made(MODELS[model]), batch()
    wanted = with_gradients(model, truth(model, inputs))
    assert_same(with_gradients(model, ab.causal_lm_loss(criterion(), model, inputs)), wanted)
    dft = with_gradients(model, ab.causal_lm_loss(ab.DFT(linear=True).double(), model, inputs))
    assert_same(dft, with_gradients(model, truth(model, inputs, dft=True)))
    assert model(**inputs).logits.shape == (5, 9, VOCAB)  # the head is as before


def test_the_mean_is_what_transformers_computes():
    model, inputs = made(llama), batch()
    shifted = dict(inputs, shift_labels=F.pad(inputs["labels"][:, 1:], (0, 1), value=-100), num_items_in_batch=torch.tensor(3))
    mean = model(**inputs).loss
    for given in (inputs, shifted, {k: v for k, v in shifted.items() if k != "labels"}):
        loss = ab.causal_lm_loss(ab.LinearABLoss(lam=math.inf).double(), model, given)
        torch.testing.assert_close(loss.float(), mean)  # which transformers computes in float32


def test_outputs():
    """As if the model had computed the loss. A mixture of experts has its loss of balance beside it."""
    model = made(mixtral)
    loss, outputs = ab.causal_lm_loss(criterion(), model, dict(batch(), output_router_logits=True), return_outputs=True)
    assert type(outputs) is type(model(**batch())) and outputs.loss is loss
    assert outputs.logits is None and "logits" not in outputs and outputs.aux_loss.dim() == 0
    loss, outputs = ab.causal_lm_loss(criterion(), model, dict(batch(), return_dict=False), return_outputs=True)
    assert outputs[0] is loss


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "gradient checkpointing": lambda model: model.gradient_checkpointing_enable() or model,
    "compiled, eval": lambda model: torch.compile(model.eval(), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped(wrapper):
    """Logits before, between and after: what is compiled for one is not used for the other."""
    model, inputs = made(llama), batch()
    wanted = with_gradients(model, truth(model, inputs))
    wrapped = WRAPPERS[wrapper](model)
    for _ in range(2):
        assert_same(with_gradients(model, ab.causal_lm_loss(criterion(), wrapped, inputs)), wanted)
        assert_same(with_gradients(model, truth(wrapped, inputs)), wanted)


def test_accelerate_in_bfloat16():
    """The criterion is called inside accelerate's autocast, and its loss passes through the conversion of the outputs."""
    model, inputs = made(llama, torch.float32), batch()
    wanted = truth(model, inputs).detach()
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    loss = ab.causal_lm_loss(ab.LinearABLoss(lam=LAM), prepared, inputs)
    assert loss.dtype == torch.float32 and abs(loss - wanted) <= 2e-2 * wanted
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


PEFT = {
    "body": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "head saved": dict(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("adapters", PEFT)
def test_peft(adapters):
    model, inputs = peft.get_peft_model(made(llama), peft.LoraConfig(r=2, **PEFT[adapters])).double(), batch()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # PEFT starts with an adapter of zero, whose A has no gradient
    wanted = with_gradients(model, truth(model, inputs))
    assert_same(with_gradients(model, ab.causal_lm_loss(criterion(), model, inputs)), wanted)
    assert any("lm_head" in name for name in wanted[1]) == (adapters == "head saved")
    with model.disable_adapter():
        loss = ab.causal_lm_loss(criterion(), model, inputs)
        torch.testing.assert_close(loss, truth(model, inputs), rtol=1e-12, atol=0)


def gemma(**options):
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8, **options)
    return transformers.Gemma2ForCausalLM(config)


def cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.5))


def t5():
    sizes = dict(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def lora_head():
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


REFUSED = {
    "softcap": (gemma, RuntimeError, r"Gemma2ForCausalLM changes its logits after the head \(a scale or a softcap"),
    "scale": (cohere, RuntimeError, r"CohereForCausalLM changes its logits .* use ABLoss on the model's logits"),
    "encoder-decoder": (t5, TypeError, "T5ForConditionalGeneration, an encoder-decoder model"),
    "LoRA on the head": (lora_head, TypeError, r"a head that is adapted .*modules_to_save=\['lm_head'\]"),
    "no head": (lambda: llama().model, TypeError, "get_output_embeddings"),
    "DataParallel": (lambda: nn.DataParallel(llama()), TypeError, "DistributedDataParallel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    one = criterion()
    with pytest.raises(error, match=message):
        ab.causal_lm_loss(one, made(make), batch())


def test_a_softcap_that_is_off():
    model, inputs = made(lambda: gemma(final_logit_softcapping=None)), batch()
    torch.testing.assert_close(ab.causal_lm_loss(criterion(), model, inputs), truth(model, inputs), rtol=1e-12, atol=0)


def ddp(model, **options):
    return nn.parallel.DistributedDataParallel(model, **options)


def in_float32():
    """FSDP2 casts what the model returns, with the loss among it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(output_dtype=torch.float32)


def fsdp2(model, head=False, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in [*model.gpt_neox.layers, *([model.get_output_embeddings()] if head else [])]:
        fully_shard(layer)
    return fully_shard(model, **options)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


PARALLEL = {
    "ddp": ddp,
    "ddp, unused": lambda model: ddp(model, find_unused_parameters=True),
    "ddp, static": lambda model: ddp(model, static_graph=True),
    "ddp, compiled": lambda model: torch.compile(ddp(model), backend="eager"),
    "fsdp2": fsdp2,
    "fsdp2, head": lambda model: fsdp2(model, head=True),
    "fsdp2, outputs in another dtype": lambda model: fsdp2(model, mp_policy=in_float32()),
    "fsdp1": fsdp1,
}
ROWS = [slice(0, 3), slice(3, 5)]  # of each process


def is_part_of(part, whole):
    """Whether consecutive numbers of `whole` are those of `part`."""
    return any(torch.allclose(part, at, rtol=0, atol=1e-12) for at in whole.unfold(0, len(part), 1)) if len(part) else True


def averaged(rank, only):
    """The gradients of two uneven batches are those of one, and are the same on both processes.

    llama will not do: its RMSNorm rounds the gradients of deferred micro-batches, which are larger, to float32."""
    wanted_loss, wanted = with_gradients(whole := made(gpt_neox), truth(whole, batch()))
    for name, wrap in PARALLEL.items():
        if name.split(",")[0] != only:
            continue
        for deferred in (False, True):
            wrapped, one = wrap(copy.deepcopy(whole)), criterion(deferred=deferred)
            wrapped.zero_grad()
            loss = ab.causal_lm_loss(one, wrapped, batch(ROWS[rank]))
            loss.backward()
            if deferred:
                assert one.finish_(wrapped.parameters())
            else:
                torch.distributed.all_reduce(loss := loss.detach())
                rtol = 1e-12 if loss.dtype == torch.float64 else 1e-6
                torch.testing.assert_close(loss.double() / RANKS, wanted_loss, rtol=rtol, atol=0)
            for p, grad in zip(wrapped.parameters(), wanted.values(), strict=True):
                if only == "fsdp1":  # this process has a part of it
                    found = p.grad.flatten() if p.numel() else grad.new_empty(0)
                    assert len(found) == p.numel() and is_part_of(found, grad.flatten()), f"{name}, deferred={deferred}"
                    continue
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(got, grad, rtol=0, atol=1e-12, msg=lambda m: f"{name}, deferred={deferred}: {m}")


@needs_gloo
@pytest.mark.parametrize("wrapper", sorted({name.split(",")[0] for name in PARALLEL}))
def test_two_processes(tmp_path, wrapper):
    run(averaged, tmp_path, wrapper)
