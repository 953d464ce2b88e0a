# %% [markdown]
# # Wrong labels
#
# This tutorial trains the same network twice on handwritten digits of which 40 % have a wrong label: once with the plain mean
# of the losses, and once with a robust loss. It shows when the network begins to memorise, and where the weights go.
#
# Every tutorial is a script: `python docs/tutorials/noise.py` runs this one in some seconds. `make docs` runs it too, and makes
# this page of its text, its output and its figures.

# %%
import math

import matplotlib.pyplot as plt
import torch

import absgd_fast as ab
from absgd_fast.experiments.data import draw, load_source
from absgd_fast.experiments.models import make_model

EPOCHS = 120
torch.set_num_threads(1)  # the models are small

# %% [markdown]
# ## The data
# Scikit-learn's digits are 1797 images of 8 × 8 pixels. `draw` takes 110 training images of each class, and gives each of them
# another label with a probability of 0.4. The labels of the 600 test images stay right.

# %%
data = draw(load_source("digits"), seed=0, noise="symmetric", rate=0.4)
wrong = data.y != data.y_true
print(f"{len(data.y)} training images, {wrong.float().mean():.0%} with a wrong label; {len(data.y_test)} test images")

# %% [markdown]
# ## The training
# The loop is the usual one. `ab.Ramp` brings λ in: it starts at the plain mean (λ = ∞), and reaches its end after 30 % of the
# epochs. With `lam=math.inf` it stays the plain mean, which is how the first of the two trainings is made.


# %%
def train(lam):
    """Test accuracy, and mean weight of the right and of the wrong labels, after each epoch."""
    torch.manual_seed(0)
    model = make_model("mlp", (1, 8, 8), 10, seed=0)
    criterion = ab.ABLoss(lam=math.inf)
    schedule = ab.Ramp(criterion, lam=lam, length=int(0.3 * EPOCHS))
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.6 * EPOCHS), int(0.8 * EPOCHS)])
    history = []
    for _ in range(EPOCHS):
        model.train()
        weights = torch.zeros(len(data.y))
        for batch in torch.randperm(len(data.y)).split(64):
            optimizer.zero_grad()
            criterion(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
            weights[batch] = criterion.last.weights
        schedule.step()
        decay.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
        history.append((100 * accuracy, weights[~wrong].mean().item(), weights[wrong].mean().item()))
    return torch.tensor(history)


plain = train(math.inf)
robust = train(-0.5)
for name, history in {"plain mean": plain, "λ → −0.5": robust}.items():
    print(f"{name:10}  best epoch {history[:, 0].max():.1f} %, last epoch {history[-1, 0]:.1f} %")

# %% [markdown]
# ## What happened
# Both networks first learn what most labels agree on. With the plain mean the accuracy then falls, because the network learns
# the wrong labels by heart. The robust loss takes the weight of the wrong labels away before that happens. It is not told which
# ones they are: it sees their losses.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(plain[:, 0], color="0.5", label="plain mean")
left.plot(robust[:, 0], color="tab:blue", label="λ → −0.5")
left.set(title="Accuracy on the test set, %", xlabel="epoch", ylim=(0, 100))
right.plot(robust[:, 1], color="tab:green", label="right label")
right.plot(robust[:, 2], color="tab:orange", label="wrong label")
right.set(title="Mean weight with λ → −0.5", xlabel="epoch")
for axes in (left, right):
    axes.axvline(0.3 * EPOCHS, color="0.7", linestyle=":")
    axes.legend()
plt.show()

# %% [markdown]
# The dotted line is the end of the ramp. The text above is checked, so that this page cannot say what the run did not show:

# %%
assert plain[-1, 0] < plain[:, 0].max() - 10, "the plain mean loses more than 10 points by memorising"
assert robust[-1, 0] > plain[-1, 0] + 10, "the robust loss ends more than 10 points higher"
assert robust[-1, 2] < 0.5 * robust[-1, 1], "a wrong label has less than half of the weight of a right one"

# %% [markdown]
# One run is an example and no measurement. [Where ABSGD helps](../evidence.md) has the measurements with error bars, and
# [choosing λ](../choosing-lambda.md) says how to find λ without knowing which labels are wrong. Where no label is wrong, the
# same ramp can cost accuracy.
