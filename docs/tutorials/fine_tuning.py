# %% [markdown]
# # Fine-tuning a language model
#
# This tutorial fine-tunes a tiny causal language model on sequences of which some are random text. It compares the usual loss
# with dynamic fine-tuning (`ab.DFT`) and with ABSGD. No loss is told which sequences are random. The model is made of plain
# PyTorch modules, and the losses call it through `ab.causal_lm_loss`, which never stores the logits. A model of Hugging Face
# transformers is called in the same way.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import absgd_fast as ab

VOCABULARY, LENGTH, WIDTH = 64, 16, 64
torch.set_num_threads(1)  # the models are small


class LanguageModel(nn.Module):
    """Two layers of a causal transformer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self):  # this is how `causal_lm_loss` finds the head
        return self.head

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1])
        causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        hidden = self.body(self.tokens(input_ids) + self.places(places), mask=causal, is_causal=True)
        return {"logits": self.head(hidden)}


# %% [markdown]
# ## The data
# The model is pretrained on sequences that count upwards by one, by two and by three. It is fine-tuned on sequences of one
# kind, of which a third are random. There are two tasks: counting by two, which the model knows, and counting by five, which is
# new to it.


# %%
def sequences(n, step, seed, random=0.0):
    """(n, LENGTH) tokens that count by `step`, and which of the sequences are random instead."""
    draw = torch.Generator().manual_seed(seed)
    counting = (torch.randint(VOCABULARY, (n, 1), generator=draw) + step * torch.arange(LENGTH)) % VOCABULARY
    noise = torch.randint(VOCABULARY, (n, LENGTH), generator=draw)
    is_random = torch.rand(n, generator=draw) < random
    return torch.where(is_random[:, None], noise, counting), is_random


def train(model, criterion, ids, epochs, lr, is_random=None):
    """Mean weight of the tokens of clean and of random sequences, after each epoch."""
    torch.manual_seed(0)
    optimizer = ab.ABAdamW(model.parameters(), lr=lr)
    history = []
    for _ in range(epochs):
        weights = torch.zeros(len(ids))
        for batch in torch.randperm(len(ids)).split(32):
            optimizer.zero_grad()
            ab.causal_lm_loss(criterion, model, {"input_ids": ids[batch], "labels": ids[batch]}).backward()
            optimizer.step()
            of_tokens, counted = criterion.last.weights, criterion.last.counted
            weights[batch] = (of_tokens * counted).sum(1) / counted.sum(1)
        if is_random is not None:
            history.append((weights[~is_random].mean().item(), weights[is_random].mean().item()))
    return history


torch.manual_seed(0)
pretrained = LanguageModel()
text = torch.cat([sequences(512, step, seed=step)[0] for step in (1, 2, 3)])
_ = train(pretrained, ab.LinearABLoss(lam=math.inf), text, epochs=8, lr=3e-3)

# %% [markdown]
# ## The fine-tuning
# What counts is clean text of the task: the mean loss of its tokens, and how many of the tokens are predicted rightly once the
# first two have shown the step. Both are measured without weights.


# %%
def evaluate(model, ids):
    """Mean loss of all tokens, and the share of right predictions behind the second token, in percent."""
    plain = ab.LinearABLoss(lam=math.inf).eval()
    with torch.no_grad():
        loss = ab.causal_lm_loss(plain, model, {"input_ids": ids, "labels": ids})
        predicted = model(ids)["logits"][:, 1:-1].argmax(-1)
    return loss.item(), 100 * (predicted == ids[:, 2:]).float().mean().item()


criteria = {
    "plain mean": lambda: ab.LinearABLoss(lam=math.inf),
    "DFT": lambda: ab.DFT(linear=True),
    "ABSGD, λ = −4": lambda: ab.LinearABLoss(lam=-4.0),
}
results, weights = {}, {}
for task, step in {"counting by two (known)": 2, "counting by five (new)": 5}.items():
    ids, is_random = sequences(512, step, seed=11, random=1 / 3)
    clean, _ = sequences(256, step, seed=12)
    results[task, "before"] = evaluate(pretrained, clean)
    for name, make in criteria.items():
        model = copy.deepcopy(pretrained)
        weights[task, name] = train(model, make(), ids, epochs=8, lr=1e-3, is_random=is_random)
        results[task, name] = evaluate(model, clean)

for (task, name), (loss, right) in results.items():
    print(f"{task:24} {name:14} loss {loss:6.3f}, {right:5.1f} % right")

# %% [markdown]
# On the task that the model knows, the random sequences make the plain mean worse than no fine-tuning: the model grows unsure
# of everything. Both robust losses give random sequences little weight, and the loss falls.
#
# On the new task DFT fails. It trusts a token as far as the model finds it probable, and the model finds nothing of this task
# probable. ABSGD learns it, because its weights are relative to those of the batch: their mean stays about 1. So DFT is for
# data that resemble what the model has learned before.

# %%
figure, grid = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
colors = {"plain mean": "0.5", "DFT": "tab:purple", "ABSGD, λ = −4": "tab:blue"}
for axes, task in zip(grid, dict.fromkeys(task for task, _ in weights)):
    for name, color in colors.items():
        clean_weight, random_weight = zip(*weights[task, name])
        axes.plot(clean_weight, color=color, label=f"{name}: clean")
        axes.plot(random_weight, color=color, linestyle="--", label=f"{name}: random")
    axes.set(title=f"Mean weight, {task}", xlabel="epoch")
grid[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The statements of this page are checked:

# %%
known, new = dict.fromkeys(task for task, _ in weights)
assert results[known, "plain mean"][0] > results[known, "before"][0], "random sequences make the plain mean worse"
assert max(results[known, name][0] for name in ("DFT", "ABSGD, λ = −4")) < results[known, "before"][0], "the others gain"
assert results[new, "DFT"][1] < 50, "DFT does not learn the new task"
assert results[new, "ABSGD, λ = −4"][1] > 80, "ABSGD does"

# %% [markdown]
# [Language models](../language-models.md) says what the two losses ask of a model, and [inside other
# trainers](../integrations.md) how they are used in Transformers and TRL.
