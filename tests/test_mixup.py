"""mixup: images and losses are mixed by one draw, for any loss; the draws follow the generator alone."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import absgd_fast as ab
from absgd_fast.experiments.mixup import Mixup

B, C = 6, 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def random(*size, seed=1, dtype=torch.float64):
    return torch.randn(size, generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype)


LOSSES = {
    "ce": lambda: ab.CrossEntropy(),
    "focal": lambda: ab.Focal(),
    "ldam": lambda: ab.LDAM([50, 20, 10, 5]),
    "gce": lambda: ab.GCE(),
    "torch": lambda: torch.nn.CrossEntropyLoss(reduction="none"),
    "function": lambda: lambda logits, labels: F.cross_entropy(logits, labels, reduction="none") ** 2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_images_and_losses_are_mixed_by_the_formula(name):
    mixup = Mixup(LOSSES[name](), 1.0, generator())
    loss, images, logits = LOSSES[name](), random(B, 1, 3, 3), random(B, C, seed=2)
    seen = set()
    for _ in range(3):
        mixed = mixup.mix(images)
        a, perm = mixup.share, mixup.permutation
        assert 0 < a < 1 and sorted(perm.tolist()) == list(range(B))
        for i, j in enumerate(perm.tolist()):
            torch.testing.assert_close(mixed[i], a * images[i] + (1 - a) * images[j])
        expected = a * loss(logits, LABELS) + (1 - a) * loss(logits, LABELS[perm])
        losses = mixup(logits, LABELS)
        assert losses.shape == (B,)
        torch.testing.assert_close(losses, expected)
        assert torch.equal(mixup(logits, LABELS), losses)  # the second pass of SAM
        seen.add((a, *perm.tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("rule", ["lam", "term"])
def test_a_robust_loss_weighs_the_mixed_losses(rule):
    mixup = Mixup(ab.Focal(), 1.0, generator())
    criterion = ab.ABLoss(mixup, lam=0.7, normalizer="batch") if rule == "term" else ab.ABLoss(mixup, lam=0.7)
    logits = random(B, C, seed=2).requires_grad_()
    mixup.mix(random(B, 2))
    a, perm = mixup.share, mixup.permutation
    plain = ab.Focal()
    losses = a * plain(logits, LABELS) + (1 - a) * plain(logits, LABELS[perm])
    w = torch.softmax(losses.detach() / 0.7, 0)  # exp(z) over their mean, over n
    loss = criterion(logits, LABELS)
    torch.testing.assert_close(loss, (w * losses).sum())
    torch.testing.assert_close(criterion.last.losses.double(), losses.detach())
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad((w * losses).sum(), logits))


def test_a_mean_is_mixed_too():
    mixup = Mixup(torch.nn.CrossEntropyLoss(), 1.0, generator())
    logits = random(B, C)
    mixup.mix(random(B, 2))
    a = mixup.share
    expected = a * F.cross_entropy(logits, LABELS) + (1 - a) * F.cross_entropy(logits, LABELS[mixup.permutation])
    torch.testing.assert_close(mixup(logits, LABELS), expected)


@pytest.mark.parametrize("state", ["fresh", "eval", "forgotten", "alpha 0"])
def test_where_it_is_the_plain_loss(state):
    mixup, images, logits = Mixup(ab.Focal(), 0.0 if state == "alpha 0" else 1.0, generator()), random(B, 2), random(B, C)
    if state != "fresh":
        mixup.mix(images)
    if state == "eval":
        before = mixup.generator.get_state()
        assert mixup.eval().mix(images) is images and torch.equal(mixup.generator.get_state(), before)
    elif state == "forgotten":
        mixup.forget()
    elif state == "alpha 0":
        assert torch.equal(mixup.mix(images), images)
    assert torch.equal(mixup(logits, LABELS), ab.Focal()(logits, LABELS))


def test_eval_of_the_robust_loss_reaches_it():
    mixup = Mixup(ab.CrossEntropy(), 1.0, generator())
    criterion, logits = ab.ABLoss(mixup, lam=math.inf), random(B, C)
    mixup.mix(random(B, 2))
    mixed = criterion(logits, LABELS)
    plain = criterion.eval()(logits, LABELS)
    torch.testing.assert_close(plain, F.cross_entropy(logits, LABELS))
    assert not torch.isclose(mixed, plain)


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 8.0])
def test_the_share_has_the_beta_distribution(alpha):
    mixup, few = Mixup(ab.CrossEntropy(), alpha, generator()), torch.zeros(1, 1)
    shares = []
    for _ in range(2000):
        mixup.mix(few)
        shares.append(mixup.share)
    assert all(0 <= a <= 1 for a in shares)
    low, high = (sum(a < 0.5 for a in shares), sum(a > 0.5 for a in shares))
    assert abs(low - high) < 4 * math.sqrt(2000)
    if alpha > 0.01:  # below that nearly all shares round to 0 or 1
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
        assert stats.kstest(shares, stats.beta(2 * alpha, alpha).cdf).pvalue < 1e-9
    else:
        assert sum(min(a, 1 - a) < 1e-3 for a in shares) > 1900


def test_the_draws_follow_the_generator_alone():
    images, here = random(B, 2), torch.random.get_rng_state()

    def draws(mixup, n=3):
        return [(mixup.mix(images), mixup.share)[1] for _ in range(n)], mixup.permutation.tolist()

    one, two, other = (draws(Mixup(ab.CrossEntropy(), 1.0, generator(seed))) for seed in (5, 5, 6))
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), here)


@pytest.mark.parametrize("way", ["state_dict", "of the robust loss", "deepcopy", "pickle"])
def test_the_stream_goes_on_after_a_checkpoint(way):
    images, mixup = random(B, 2), Mixup(ab.CrossEntropy(), 1.0, generator(3))
    criterion = ab.ABLoss(mixup, lam=0.5)
    criterion(mixup.mix(images), LABELS.clamp(max=1))
    whole = criterion if way == "of the robust loss" else mixup
    if way in ("state_dict", "of the robust loss"):
        fresh = Mixup(ab.CrossEntropy(), 1.0, generator(99))
        target = ab.ABLoss(fresh, lam=0.5) if way == "of the robust loss" else fresh
        target.load_state_dict(copy.deepcopy(whole.state_dict()))
    else:
        fresh = copy.deepcopy(mixup) if way == "deepcopy" else pickle.loads(pickle.dumps(mixup))
    expected = [mixup.mix(images), mixup.mix(images)]
    assert all(torch.equal(fresh.mix(images), mixed) for mixed in expected)


@pytest.mark.parametrize("loss, label", [(ab.CrossEntropy(ignore_index=1), 1), (ab.weights.cvar, None)], ids=["ce", "function"])
def test_the_label_that_the_inner_loss_ignores(loss, label):
    assert Mixup(loss, 1.0, generator()).ignore_index == label


def test_a_row_whose_own_label_is_ignored_does_not_count():
    mixup = Mixup(ab.CrossEntropy(ignore_index=-1), 1.0, generator())
    criterion = ab.ABLoss(mixup, lam=math.inf)
    labels, logits = LABELS.clone(), random(B, C)
    labels[2] = -1
    mixup.mix(random(B, 2))
    counts = labels != -1
    torch.testing.assert_close(criterion(logits, labels), mixup(logits, labels)[counts].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    mixup = Mixup(ab.CrossEntropy(), 1.0, generator())
    assert mixup.mix(random(B, 2, dtype=dtype)).dtype == dtype
    assert mixup(random(B, C, dtype=dtype), LABELS).dtype == ab.CrossEntropy()(random(B, C, dtype=dtype), LABELS).dtype


def made(**given):
    return Mixup(**{"loss": ab.CrossEntropy(), "alpha": 1.0, "generator": generator()} | given)


def mixed(rows):
    mixup = made()
    mixup.mix(random(B, 2))
    return mixup(random(rows, C), LABELS[:rows])


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "alpha: got -1, expected a finite number >= 0", lambda: made(alpha=-1)),
        (ValueError, "alpha: got nan", lambda: made(alpha=math.nan)),
        (TypeError, "loss: got int, expected a callable", lambda: made(loss=3)),
        (
            ValueError,
            "images of torch.uint8, expected a floating dtype",
            lambda: made().mix(torch.zeros(2, 2, dtype=torch.uint8)),
        ),
        (ValueError, "got 5 labels, expected 6", lambda: mixed(5)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
