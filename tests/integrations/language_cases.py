"""Tiny language models, and SFTTrainer and Trainer on them."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers_cases import quiet
from trl import SFTConfig, SFTTrainer

from absgd_fast.integrations.transformers import RobustTrainerMixin

VOCABULARY, LENGTH, SEQUENCES = 23, 7, 2  # SEQUENCES of a micro-batch


class RobustSFT(RobustTrainerMixin, SFTTrainer):
    """SFTTrainer as a user has it."""


def tokenizer():
    """Of a vocabulary of numbers."""
    words = {str(i): i for i in range(VOCABULARY - 1)} | {"<pad>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<pad>", unk_token="0")


def language_model(dtype=torch.float32, **options):
    """A small GPT-2, which computes in float64 all through if it is asked to; the same parameters in every call."""
    given = dict(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=32,
        pad_token_id=VOCABULARY - 1,
        bos_token_id=VOCABULARY - 1,
        eos_token_id=VOCABULARY - 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        initializer_range=0.6,  # so large that the losses of the tokens differ, and so do their weights
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return GPT2LMHeadModel(GPT2Config(**(given | options))).to(dtype)


def with_lora(model, **options):
    """The model with LoRA on its attention, whose B is not zero."""
    given = dict(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = get_peft_model(model, LoraConfig(**(given | options)))
        for name, p in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    return made


def tokens(n, seed=0):
    """input_ids and labels (n, LENGTH); some labels do not count, and not equally many in each sequence."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY - 1, (n, LENGTH), generator=draw)
    prompts = torch.randint(1, LENGTH - 1, (n, 1), generator=draw)
    return ids, torch.where(torch.arange(LENGTH) < prompts, -100, ids)


def dataset(n, seed=0):
    """The `tokens` as SFTTrainer takes them: tokenized."""
    ids, labels = tokens(n, seed)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def losses_of(model, batch):
    """The losses of the tokens that count of a batch (input_ids, labels)."""
    logits = model(input_ids=batch[0], attention_mask=torch.ones_like(batch[0])).logits[:, :-1]
    losses = F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[1][:, 1:].reshape(-1), reduction="none", ignore_index=-100)
    return losses[batch[1][:, 1:].reshape(-1) != -100]


def arguments(folder, **options):
    """`quiet` SFTConfig for the sequences of this file."""
    given = dict(
        bf16=False,
        per_device_train_batch_size=SEQUENCES,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTConfig(**(quiet(folder) | given | options))


def sft(folder, model, cls=RobustSFT, rows=20, more=None, **options):
    """A trainer of `cls` on `rows` sequences. more: other arguments of the trainer."""
    return cls(model, arguments(folder, **options), train_dataset=dataset(rows), processing_class=tokenizer(), **(more or {}))


class Tokens(torch.utils.data.Dataset):
    """The `tokens` as Trainer takes them."""

    def __init__(self, n, seed=0):
        self.ids, self.labels = tokens(n, seed)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.labels[i]}


def logged(trainer, key):
    """What was logged after each step under a key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
