"""Sharded parameters (FSDP2, DTensor) under the optimizers, in two processes that talk through gloo."""

import copy

import pytest
import torch
from torch import nn
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

PAIRS = {
    "ABSGD": (ab.ABSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    "ABAdam": (ab.ABAdam, torch.optim.Adam, dict(lr=0.01)),
    "ABAdamW": (ab.ABAdamW, torch.optim.AdamW, dict(lr=0.01, amsgrad=True)),
    "ABRMSprop": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=0.01, momentum=0.9, centered=True)),
    "ABAdagrad": (ab.ABAdagrad, torch.optim.Adagrad, dict(lr=0.1)),
}

pytestmark = needs_gloo


# ---- bodies ----------------------------------------------------------------------------------------------------------


def _network():
    """Widths that two ranks cannot share evenly, and one parameter of which the second rank has nothing."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5), nn.ReLU(), nn.Linear(5, 1))


def _batch(rank, step):
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 7, generator=draw), torch.randn(4, 1, generator=draw)


def _sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    network = _network()
    for layer in network:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def _train(network, optimizer, rank, steps):
    for step in steps:
        x, y = _batch(rank, step)
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()


def _for_each(rank, body):
    for name in PAIRS:
        try:
            body(rank, name)
        except Exception as error:
            raise AssertionError(f"{body.__name__} with {name}") from error


def like_torch(rank, name):
    """The same parameters and states as torch's class on the same shards; all tensors go through the plan."""
    from torch.distributed.device_mesh import init_device_mesh

    ours, theirs, options = PAIRS[name]
    mesh = init_device_mesh("cpu", (RANKS,))
    a, b = _sharded(mesh), _sharded(mesh)
    first, second = ours(a.parameters(), **options), theirs(b.parameters(), **options, foreach=False)
    _train(a, first, rank, range(4))
    _train(b, second, rank, range(4))
    if first._plan is not None:  # without the host module the operator is given lists
        x, y = _batch(rank, 9)
        (a(x) - y).square().mean().backward()
        updated, *_, others = first._plan.refresh(first.param_groups, first.state, None, None, torch.distributed.tensor.DTensor)
        assert len(updated) == 6 and others == []
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-5, atol=1e-6)
        assert first.state[p].keys() >= {key for key, value in second.state[q].items() if value is not None}
        for key, value in second.state[q].items():
            mine = first.state[p][key]
            assert type(mine) is type(value), key
            if key != "step":
                assert mine.placements == value.placements and mine.device_mesh == value.device_mesh
                torch.testing.assert_close(mine.to_local(), value.to_local(), rtol=1e-5, atol=1e-6)


def like_one_process(rank, name):
    """Two ranks with half of the batch each take the step of one process with all of it."""
    from torch.distributed.device_mesh import init_device_mesh

    ours, _, options = PAIRS[name]
    network = _sharded(init_device_mesh("cpu", (RANKS,)))
    _train(network, ours(network.parameters(), **options), rank, range(5))
    alone = _network()
    optimizer = ours(alone.parameters(), **options)
    for step in range(5):
        parts = [_batch(r, step) for r in range(RANKS)]
        x, y = (torch.cat(part) for part in zip(*parts))
        optimizer.zero_grad()
        (alone(x) - y).square().mean().backward()
        optimizer.step()
    for p, q in zip(network.parameters(), alone.parameters()):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-6)


def checkpoint(rank, name):
    """torch's tools for sharded checkpoints take ours, and what they load goes on as if nothing had been."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    ours, _, options = PAIRS[name]
    mesh = init_device_mesh("cpu", (RANKS,))
    a, b = _sharded(mesh), _sharded(mesh)
    first, second = ours(a.parameters(), **options), ours(b.parameters(), **options)
    _train(a, first, rank, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(a, first))
    b.load_state_dict(a.state_dict())
    set_optimizer_state_dict(b, second, saved)
    _train(a, first, rank, range(3, 6))
    _train(b, second, rank, range(3, 6))
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p.to_local(), q.to_local())


def unequal_shares(rank, name):
    """A gradient that is shared out in another way than its parameter is not taken for a plain array of the same shape."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    ours, _, options = PAIRS[name]
    mesh = init_device_mesh("cpu", (RANKS,))
    start, slope = torch.arange(8.0), torch.linspace(-1, 1, 8)
    p = nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    alone = nn.Parameter(start.clone())
    first, second = ours([p], **options), ours([alone], **options)
    for _ in range(3):
        share = distribute_tensor(slope, mesh, [Shard(0)])
        assert isinstance(share, DTensor)
        p.grad, alone.grad = share.redistribute(mesh, [Replicate()]), slope.clone()
        first.step()
        second.step()
    torch.testing.assert_close(p.full_tensor(), alone)
    # each rank has the whole shape here, but only a part of the sum
    p.grad = DTensor.from_local(slope / RANKS, mesh, [torch.distributed.tensor.Partial()])
    alone.grad = slope.clone()
    first.step()
    second.step()
    torch.testing.assert_close(p.full_tensor(), alone)


MESHES = {"sharded": ((2,), None), "replicated": ((2, 1), ("copies", "shards")), "in one copy": ((1, 2), ("copies", "shards"))}


def clipped(rank, name):
    """max_norm= against one process that clips: sums go over the shards of a gradient, and not over its copies. A plain tensor,
    whose gradient every rank has, counts once, and a parameter without a gradient does not stop the others."""
    from torch.distributed.device_mesh import init_device_mesh

    ours, _, options = PAIRS[name]
    for shape, names in MESHES.values():
        network, alone = _sharded(init_device_mesh("cpu", shape, mesh_dim_names=names)), _network()
        plain, plain_alone, unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
        first = ours([*network.parameters(), plain, unused], max_norm=1.0, **options)
        second = ours([*alone.parameters(), plain_alone], **options)
        for step in range(5):
            x, y = (torch.cat(part) for part in zip(*[_batch(r, step) for r in range(RANKS)]))
            mine = slice(4 * rank, 4 * rank + 4)
            for net, own, optimizer, part in ((network, plain, first, mine), (alone, plain_alone, second, slice(None))):
                optimizer.zero_grad()
                (net(x[part]) - y[part]).square().mean().mul(1 + step).backward()
                own.grad = torch.linspace(-1, 1, 3) * step
            norm = nn.utils.clip_grad_norm_([*alone.parameters(), plain_alone], 1.0)
            first.step()
            second.step()
            torch.testing.assert_close(first.last_grad_norm.float(), norm, rtol=1e-5, atol=0)
        assert norm > 1
        torch.testing.assert_close(plain, plain_alone, rtol=1e-4, atol=1e-6)
        for p, q in zip(network.parameters(), alone.parameters()):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-6)


def clipped_sums(rank, name):
    """A gradient whose parts are still to be summed up has the norm of the sum."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    ours, _, options = PAIRS[name]
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(distribute_tensor(torch.arange(8.0), mesh, [Replicate()]))
    alone = nn.Parameter(torch.arange(8.0))
    first, second = ours([p], max_norm=0.5, **options), ours([alone], **options)
    for _ in range(2):
        alone.grad = torch.linspace(-1, 1, 8)
        p.grad = DTensor.from_local(alone.grad * (1.5 if rank == 0 else -0.5), mesh, [Partial()])
        norm = nn.utils.clip_grad_norm_([alone], 0.5)
        first.step()
        second.step()
        torch.testing.assert_close(first.last_grad_norm.float(), norm)
    torch.testing.assert_close(p.full_tensor(), alone)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [like_torch, like_one_process, checkpoint, unequal_shares, clipped, clipped_sums])
def test_two_processes(tmp_path, body):
    run(_for_each, tmp_path, body)  # all in one pair of processes: these take 4 s to start


def test_a_failing_rank_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(_fails, tmp_path)


def _fails(rank):
    1 / (rank - 1)  # on the second rank
