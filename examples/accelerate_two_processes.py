"""Accelerate on two processes: handwritten digits of which 40 % have a wrong label, plain cross-entropy and ABSGD with lam < 0.

An optimizer step has the samples of both processes and two micro-batches. All of them share one normaliser.
Run it with: torchrun --nproc-per-node 2 examples/accelerate_two_processes.py
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import absgd_fast as ab
from absgd_fast.integrations.accelerate import Robust

EPOCHS = 30


def train(data, lam):
    """Train a network, with the plain mean for the first third of the epochs."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = ab.ABSGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16, shuffle=True))

    criterion = ab.ABLoss(lam=lam)
    schedule = ab.TwoStage(criterion, lam=lam, start=EPOCHS // 3)
    robust = Robust(accelerator, criterion, schedule)  # accelerator.save_state saves both
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), y))
                robust.finish(model, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    return accelerator, accelerator.unwrap_model(model)


x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x, held_out = x.float() / 16, torch.arange(len(y)) % 2 == 0
clean, draw = y[~held_out], torch.Generator().manual_seed(0)
wrong = torch.rand(len(clean), generator=draw) < 0.4
noisy = torch.where(wrong, (clean + torch.randint(1, 10, (len(clean),), generator=draw)) % 10, clean)
data = TensorDataset(x[~held_out], noisy)
for name, lam in (("cross-entropy", float("inf")), ("ABSGD", -0.5)):
    accelerator, net = train(data, lam)
    accuracy = (net(x[held_out]).argmax(1) == y[held_out]).float().mean()
    accelerator.print(f"{name}: accuracy {accuracy:.1%}")
accelerator.end_training()
