# %% [markdown]
# # Rare classes
#
# This tutorial trains a linear classifier on handwritten digits where the largest class has 100 times as many training images
# as the smallest one. It compares the plain mean of the losses with `ab.TargetESS` and with class weights, over several draws
# of the data.

# %%
import math

import matplotlib.pyplot as plt
import torch

import absgd_fast as ab
from absgd_fast.experiments.data import draw, load_source, train_counts
from absgd_fast.experiments.models import make_model

EPOCHS, SEEDS = 60, 5
torch.set_num_threads(1)  # the models are small

# %% [markdown]
# ## The data
# The number of training images falls from class to class, from 110 to 1. The test set is balanced, so the accuracy on it counts
# every class alike.

# %%
source = load_source("digits")
counts = train_counts(draw(source, seed=0, imbalance="lt", rho=100), 10)
print("training images of each class:", counts)

# %% [markdown]
# ## The losses
# `ab.TargetESS()` gives each batch the λ > 0 at which its weights are worth as much as 95 % of the samples, so large losses
# count more. `ab.TargetESS(0.7)` does the same more strongly. Class weights use what `TargetESS` is not told: how many images
# each class has. The last line combines the two.

# %%
criteria = {
    "plain mean": lambda: ab.ABLoss(lam=math.inf),
    "TargetESS()": lambda: ab.ABLoss(lam=ab.TargetESS()),
    "TargetESS(0.7)": lambda: ab.ABLoss(lam=ab.TargetESS(0.7)),
    "class weights": lambda: ab.ABLoss(ab.CrossEntropy(weight=ab.class_balanced_weights(counts)), lam=math.inf),
    "both": lambda: ab.ABLoss(ab.CrossEntropy(weight=ab.class_balanced_weights(counts)), lam=ab.TargetESS()),
}


def train(criterion, data, seed):
    """The share of the test images of each class that the trained classifier knows, in percent."""
    torch.manual_seed(seed)
    model = make_model("linear", (1, 8, 8), 10, seed)
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.y)).split(64):
            optimizer.zero_grad()
            criterion(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model(data.x_test).argmax(1) == data.y_test
    return torch.stack([100 * right[data.y_test == c].float().mean() for c in range(10)])


recalls = {name: [] for name in criteria}
for seed in range(SEEDS):
    data = draw(source, seed, imbalance="lt", rho=100)
    for name, make in criteria.items():
        recalls[name].append(train(make(), data, seed))
recalls = {name: torch.stack(rows) for name, rows in recalls.items()}

# %% [markdown]
# ## The result
# The first column is the accuracy on the balanced test set. The second one is the difference from the plain mean, which is
# paired: both are trained on the same draw, from the same initial weights, with the same order of batches.

# %%
for name, rows in recalls.items():
    accuracy, gain = rows.mean(1), rows.mean(1) - recalls["plain mean"].mean(1)
    error = gain.std() / math.sqrt(SEEDS)
    print(f"{name:15} {accuracy.mean():5.1f} ± {accuracy.std():.1f} %   {gain.mean():+5.1f} ± {error:.1f} points")

# %% [markdown]
# The ± of the accuracy is the standard deviation over the draws, and that of the difference its standard error. A difference
# that is not well above its standard error shows nothing.
#
# Here class weights gain more than `TargetESS` alone. They know how rare each class is, and the losses show it only in part.
# `TargetESS` needs to know nothing of the classes.

# %%
figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
for i, (name, rows) in enumerate(recalls.items()):
    axes.bar(torch.arange(10) + 0.16 * (i - 2), rows.mean(0), width=0.16, label=name)
axes.set(xlabel="class, with its number of training images", ylabel="recall on the test set, %")
axes.set_xticks(range(10), [f"{c}\n({count})" for c, count in enumerate(counts)])
axes.legend()
plt.show()

# %% [markdown]
# The classes at the right have a handful of images. That is where a loss for imbalance can gain, and the classes at the left
# are where it can lose. No weighting makes up for images that are not there: the rarest classes stay far below the others.

# %%
for name, rows in recalls.items():
    assert rows[:, :5].mean() > rows[:, 8:].mean() + 10, f"{name}: the rarest classes stay far below the others"
gains = {name: float((rows - recalls["plain mean"]).mean()) for name, rows in recalls.items()}
assert gains["class weights"] > gains["TargetESS()"] > 0, "TargetESS gains, and class weights gain more"

# %% [markdown]
# With rare classes the gains are small in most settings that were measured: [where ABSGD helps](../evidence.md) has them all.
# [Losses](../losses.md) lists the losses that are made for imbalance, and [choosing λ](../choosing-lambda.md) says more about
# `TargetESS`.
