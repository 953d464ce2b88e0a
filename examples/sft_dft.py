"""TRL's SFTTrainer on a tiny random model with LoRA: dynamic fine-tuning (DFT) and ABSGD, without stored logits.

A third of the completions is random text. Both losses trust a token as far as the model finds it probable, so they learn less of
the random text than the usual loss. Run it with: python examples/sft_dft.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import absgd_fast as ab
from absgd_fast.integrations.transformers import RobustTrainerMixin

VOCAB, LENGTH = 64, 16


class MyTrainer(RobustTrainerMixin, SFTTrainer):
    """SFTTrainer with a robust loss."""


def sequences(n, seed, random=0.0):
    """Sequences that count upwards; a share of them is random."""
    draw = torch.Generator().manual_seed(seed)
    counting = (torch.randint(VOCAB, (n, 1), generator=draw) + torch.arange(LENGTH)) % VOCAB
    noise = torch.randint(VOCAB, (n, LENGTH), generator=draw)
    ids = torch.where(torch.rand(n, 1, generator=draw) < random, noise, counting).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0")
args = SFTConfig(
    tempfile.mkdtemp(),
    gradient_accumulation_steps=4,
    num_train_epochs=4,
    learning_rate=2e-2,
    use_cpu=True,
    bf16=False,
    logging_steps=20,
    report_to=[],
    disable_tqdm=True,
    dataset_kwargs={"skip_prepare_dataset": True},  # it is tokenized already
)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
criteria = {"cross-entropy": "cross_entropy", "DFT": "dft", "ABSGD": ab.LinearABLoss(lam=-2.0)}
for name, criterion in criteria.items():
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    data = {"train_dataset": sequences(400, 0, random=1 / 3), "eval_dataset": sequences(64, 1)}
    trainer = MyTrainer(model, args, **data, processing_class=tokenizer, peft_config=lora, criterion=criterion)
    trainer.train()
    print(f"{name}: loss of clean text: {trainer.evaluate()['eval_loss']:.3f}")
