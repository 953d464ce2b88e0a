"""The plain loop is ABLoss in an ordinary training, so an integration that equals one equals the other."""

import pytest
import torch
import truth

import absgd_fast as ab


@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_the_plain_loop_is_abloss(optimizer, dtype):
    tensors = truth.samples(30, dtype)
    wanted = truth.train(truth.network(dtype), truth.big_batches(tensors, 10, 4, 4), optimizer, max_norm=truth.CLIP)
    net = truth.network(dtype)
    criterion, stepper = ab.ABLoss(lam=truth.LAM).to(dtype), truth.OPTIMIZERS[optimizer](net.parameters())
    means = []
    for x, y in truth.big_batches(tensors, 10, 4, 4):
        stepper.zero_grad()
        criterion(net(x), y).backward()
        means.append(float(criterion.last.mean_loss))
        torch.nn.utils.clip_grad_norm_(net.parameters(), truth.CLIP)
        stepper.step()
    truth.assert_same(net, wanted, dtype)
    assert len(means) == 12 and means == pytest.approx(wanted.means, rel=1e-6)


def test_big_batches():
    """10 micro-batches in fours are steps of 4, 4 and 2; two processes draw in turn."""
    (index,) = (torch.arange(60),)
    assert [len(batch[0]) for batch in truth.big_batches((index[:30],), 10, 4, 1)] == [12, 12, 6]
    assert [len(batch[0]) for batch in truth.big_batches((index,), 10, 4, 1, processes=2)] == [24, 24, 12]
    assert [len(batch[0]) for batch in truth.big_batches((index[:30],), 10, [5, 10], 2)] == [15, 15, 30]
