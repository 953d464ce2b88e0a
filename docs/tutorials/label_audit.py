# %% [markdown]
# # Finding wrong labels
#
# This tutorial looks for the wrong labels of a training set with `ab.LabelAudit`. It adds up the loss of every sample while a
# network is trained. Here we know which labels are wrong, so we can count how many of the suspects are.

# %%
import math

import matplotlib.pyplot as plt
import torch

import absgd_fast as ab
from absgd_fast.experiments.data import draw, load_source
from absgd_fast.experiments.models import make_model

EPOCHS = 60
torch.set_num_threads(1)  # the models are small

data = draw(load_source("digits"), seed=0, noise="symmetric", rate=0.2)
wrong = data.y != data.y_true
print(f"{len(data.y)} training images, {wrong.sum()} of them with a wrong label")

# %% [markdown]
# ## The training
# The audit needs the index of each sample in the training set, and the losses that the criterion has made anyway. It records
# the first half of the epochs, before the network memorises.

# %%
torch.manual_seed(0)
model = make_model("mlp", (1, 8, 8), 10, seed=0)
criterion = ab.ABLoss(lam=math.inf)  # the plain mean
optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9)
audit = ab.LabelAudit(len(data.y))

for epoch in range(EPOCHS):
    for index in torch.randperm(len(data.y)).split(64):
        optimizer.zero_grad()
        criterion(model(data.x[index]), data.y[index]).backward()
        optimizer.step()
        if epoch < EPOCHS / 2:
            audit.update(index, criterion.last.losses)

with torch.no_grad():
    last_loss = torch.nn.functional.cross_entropy(model(data.x), data.y, reduction="none")

# %% [markdown]
# ## The suspects
# `audit.ranked()` has the most suspicious samples first. The loss at the end of the training is the obvious alternative. It is
# worse where the network has memorised wrong labels.

# %%
suspects = audit.ranked()
by_last_loss = last_loss.argsort(descending=True)
n = int(wrong.sum())
for name, order in {"average loss of the audit": suspects, "loss at the end": by_last_loss}.items():
    print(f"{name:26} {wrong[order[:n]].float().mean():6.1%} of the first {n} samples have a wrong label")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
bins = torch.linspace(0, float(audit.mean_loss.max()), 40).tolist()
left.hist(
    [audit.mean_loss[~wrong].tolist(), audit.mean_loss[wrong].tolist()], bins, stacked=True, color=["tab:green", "tab:orange"]
)
left.set(title="Samples by their average loss", xlabel="average loss", yscale="log")
left.legend(["right label", "wrong label"])
for name, order in {"audit": suspects, "loss at the end": by_last_loss}.items():
    right.plot(100 * wrong[order].cumsum(0) / n, label=name)
right.set(title="Wrong labels found, %", xlabel="samples looked at")
right.legend()
plt.show()

# %% [markdown]
# These are the first twelve suspects. Above each image stands the label that it was given, and in brackets the right one.

# %%
figure, grid = plt.subplots(2, 6, figsize=(9, 3.4), layout="constrained")
for axes, i in zip(grid.flat, suspects[:12].tolist()):
    axes.imshow(data.x[i, 0], cmap="gray_r")
    axes.set_title(f"{data.y[i]} ({data.y_true[i]})")
    axes.axis("off")
plt.show()

# %% [markdown]
# The statements of this page are checked:

# %%
precision = wrong[suspects[:n]].float().mean()
assert precision > 0.8, "most of the suspects have a wrong label"
assert precision > wrong[by_last_loss[:n]].float().mean(), "the audit finds more than the loss at the end"

# %% [markdown]
# [Label audit](../audit.md) has measurements, the command `absgd-fast audit`, which makes a page of the suspects, and the cases
# where the audit misleads.
