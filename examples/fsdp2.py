"""A language model on two processes with FSDP2: each holds half of every parameter, and a step consists of two micro-batches.

A quarter of the labels is wrong. Dynamic fine-tuning (DFT) trusts a token as far as the model finds it probable.
Run it with: torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import absgd_fast as ab

VOCAB, LENGTH, ROWS, STEPS = 20, 16, 16, 60


class Model(nn.Module):
    """It predicts each token from the ones before it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCAB, 32), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, VOCAB, bias=False)

    def get_output_embeddings(self):
        """The head, by the name that models of transformers have for this; causal_lm_loss asks for it."""
        return self.head

    def forward(self, input_ids):
        """Logits (B, T, VOCAB), in a mapping as of transformers."""
        return {"logits": self.head(self.body(self.embedding(input_ids))[0])}


def sequences(wrong):
    """Tokens that go up by 3 each time, and labels of which a share is wrong."""
    tokens = (torch.randint(VOCAB, (ROWS, 1)) + 3 * torch.arange(LENGTH)) % VOCAB
    labels = torch.where(torch.rand(tokens.shape) < wrong, torch.randint(VOCAB, tokens.shape), tokens)
    return {"input_ids": tokens, "labels": labels}


dist.init_process_group("gloo")
torch.manual_seed(0)  # the same parameters on every process
model, mesh = Model(), dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
for part in (model.body, model):
    fully_shard(part, mesh=mesh)
criterion = ab.DFT(ab.CrossEntropy(label_smoothing=0.1), linear=True, deferred=True)
optimizer = ab.ABAdamW(model.parameters(), lr=0.01, robust=criterion)  # its step divides by all tokens of the step
torch.manual_seed(dist.get_rank())  # other sequences on every process
for step in range(STEPS):
    for _ in range(2):
        ab.causal_lm_loss(criterion, model, sequences(wrong=0.25)).backward()  # through the wrapper; logits are never stored
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 20 == 19:
        print(f"step {step + 1}: {criterion.last}")  # the latest micro-batch: its tokens, mean loss and effective sample size
clean = sequences(wrong=0.0)["input_ids"]
hits = model(clean)["logits"][:, :-1].argmax(-1) == clean[:, 1:]
if dist.get_rank() == 0:
    print(f"right on clean sequences: {hits.float().mean():.0%}")
dist.destroy_process_group()
