"""ab.select: what is held out, which candidate is stopped and which one wins, failures, and going on after a kill."""

import errno
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import absgd_fast as ab
from absgd_fast.selection import Candidate, default_candidates, rule
from absgd_fast.selection.candidates import is_strongest
from absgd_fast.selection.record import FILE, Record, packed, unpacked
from absgd_fast.selection.rule import Curve, Judge, rungs_of
from absgd_fast.selection.split import split

ROOT = Path(ab.__file__).resolve().parents[1]
QUIET = {"progress": False}


def scripted(curves, calls=None):
    """A training whose scores are curves[candidate]; it returns (candidate, number of samples that it trained on)."""

    def train(candidate, train_idx, holdout_idx, budget):
        for epoch in range(budget):
            if calls is not None:
                calls.append((candidate, len(train_idx), epoch + 1))
            yield curves[candidate][epoch]
        return candidate, len(train_idx)

    return train


def flat(**levels):
    return {name: [level] * 100 for name, level in levels.items()}


def selected(curves, budget=10, **options):
    return ab.select(scripted(curves), list(curves), **QUIET | {"n": 100, "budget": budget} | options)


# ---- the rule ----------------------------------------------------------------------------------------------------------


def coins(p, n, seed, epochs=10):
    """A curve of predictions: n held-out samples, each right in every epoch or in none, about p of them right."""
    right = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < p
    return Curve([float(right.double().mean())] * epochs, [right] * epochs)


def changed(curve, gains, losses=0):
    """The same curve with so many wrong samples right, and so many right ones wrong."""
    right = curve.right[0].clone()
    right[torch.nonzero(~curve.right[0]).flatten()[:gains]] = True
    right[torch.nonzero(curve.right[0]).flatten()[:losses]] = False
    return Curve([float(right.double().mean())] * len(curve.scores), [right] * len(curve.right))


@pytest.mark.parametrize(
    "gains, losses, wins",
    [
        (0, 0, False),  # the same predictions
        (10, 10, False),  # others, but no better
        (11, 10, False),  # 1 ± 4.6 samples better: chance
        (20, 17, False),  # 3 ± 6.1 samples
        (20, 16, True),  # 4 ± 6 samples
        (1, 0, True),  # 1 ± 1 samples
        (0, 1, False),
    ],
)
def test_a_lead_over_the_plain_mean_must_be_more_than_chance(gains, losses, wins):
    plain = coins(0.5, 200, seed=1)
    judge = Judge(10)
    assert judge.choose([plain, changed(plain, gains, losses)], plain) == int(wins)


def test_only_the_plain_mean_is_preferred():
    """Among the others the best wins, by however little, and also after the plain mean was stopped."""
    plain = coins(0.4, 200, seed=2)
    good = changed(plain, 40)
    best = changed(plain, 41)
    assert Judge(10).choose([plain, good, best], plain) == 2
    assert Judge(10).choose([good, best], None) == 1
    assert Judge(10).choose([good, good], None) == 0  # equals: the first one


def test_the_last_epochs_count_together():
    """One lucky epoch at the end does not win; the window is a tenth of the budget."""
    judge = Judge(30)
    assert judge.window == 3
    steady, lucky = Curve([0.5] * 30), Curve([0.45] * 29 + [0.55])
    assert judge.level(lucky, 30) == pytest.approx((0.45 + 0.45 + 0.55) / 3)
    assert judge.choose([steady, lucky], steady) == 0
    assert Judge(30).choose([lucky, steady], None) == 1


def test_scores_alone_are_judged_by_their_spread():
    """Without predictions a lead within the spread from epoch to epoch is chance."""
    judge = Judge(40)
    restless, ahead = Curve([0.5, 0.54] * 20), Curve([0.51, 0.55] * 20)
    lead, error = judge.lead(ahead, restless, 40)
    assert lead == pytest.approx(0.01) and error == pytest.approx(math.hypot(0.02, 0.02) * math.sqrt(4 / 3))
    assert judge.choose([restless, ahead], restless) == 0
    far = Curve([0.6, 0.64] * 20)
    assert judge.choose([restless, far], restless) == 1


@pytest.mark.parametrize("groups", [None, [0] * 60 + [1] * 30 + [4] * 10])
def test_the_standard_error_is_that_of_paired_samples(groups):
    """Against NumPy: averages over the window first, then differences sample by sample; by class for balanced accuracy."""
    random = torch.Generator().manual_seed(3)
    curves = [[torch.rand(100, generator=random) < p for _ in range(20)] for p in (0.7, 0.5)]
    labels = None if groups is None else torch.tensor(groups)
    judge = Judge(20, labels)
    curves = [Curve([judge.score(right) for right in rights], rights) for rights in curves]
    lead, error = judge.lead(*curves, 20)
    a, b = (np.stack([r.numpy() for r in c.right[18:20]]).mean(0) for c in curves)
    if groups is None:
        assert lead == pytest.approx((a - b).mean()) and error == pytest.approx((a - b).std(ddof=1) / 10)
        return
    d, groups = a - b, np.array(groups)
    parts = [d[groups == g] for g in (0, 1, 4)]
    spread = [((p**2).sum() + 2 * (d**2).mean()) / (len(p) + 2) for p in parts]
    assert lead == pytest.approx(np.mean([p.mean() for p in parts]))
    assert error == pytest.approx(math.sqrt(sum(s / len(p) for s, p in zip(spread, parts))) / 3)


def test_a_class_of_one_held_out_sample_has_an_error_too():
    judge = Judge(1, torch.tensor([0] * 9 + [1]))
    right = torch.ones(10, dtype=torch.bool)
    other = right.clone()
    other[0] = False
    _, error = judge.lead(Curve([1.0], [right]), Curve([0.9], [other]), 1)
    assert math.isfinite(error) and error > 0


@pytest.mark.parametrize("groups", [[0] * 9 + [1], [0] * 4 + [1] * 4 + [2] * 2, [0, 0, *range(8)]])
@pytest.mark.parametrize("wrong", [[9], [8, 9], [0], [0, 9], list(range(10))])
def test_a_difference_is_never_without_an_error(groups, wrong):
    """Not even if it is the same in all samples of a class: one image must not stop a candidate."""
    judge = Judge(10, torch.tensor(groups))
    right = torch.ones(10, dtype=torch.bool)
    other = right.clone()
    other[wrong] = False
    curves = [Curve([judge.score(r)] * 10, [r] * 10) for r in (right, other)]
    lead, error = judge.lead(*curves, 10)
    assert lead > 0 and error > 0.03
    assert (judge.hopeless(curves, 7) == []) == (lead <= 2 * error)
    assert len(wrong) > 1 or judge.hopeless(curves, 7) == []


def test_balanced_accuracy():
    judge = Judge(1, torch.tensor([0, 0, 0, 1]))
    assert judge.score(torch.tensor([True, True, True, False])) == 0.5
    assert Judge(1).score(torch.tensor([True, True, True, False])) == 0.75


def test_hopeless_is_clearly_behind():
    plain = coins(0.5, 200, seed=4)
    judge = Judge(10)
    near, far = changed(plain, 0, 3), changed(plain, 0, 30)  # 3 ± 1.7 and 30 ± 5.1 samples behind
    assert judge.hopeless([plain, near, far], 5) == [2]
    assert judge.hopeless([far], 5) == []


def test_a_lead_that_swings_stops_nobody():
    """The same mean lead of 0.1, steady or from 0 to 0.2, between scores whose own error is small."""
    plain = coins(0.5, 2000, seed=5, epochs=30)
    behind = [changed(plain, 0, n).right[0] for n in (200, 0, 400)]
    steady = Curve([float(behind[0].double().mean())] * 30, [behind[0]] * 30)
    rights = [behind[0]] * 27 + [behind[1], behind[0], behind[2]]
    swings = Curve([float(right.double().mean()) for right in rights], rights)
    assert Judge(30).hopeless([plain, steady], 30) == [1] and Judge(30).hopeless([plain, swings], 30) == []


@pytest.mark.parametrize(
    "budget, ramp, rungs",
    [(100, 0.3, [70, 85]), (100, 0.55, [70, 85]), (100, 0.6, [85]), (100, 0.9, []), (1, 0.3, []), (2, 0.3, [1]), (3, 0.3, [2])],
)
def test_rungs_come_after_the_ramps(budget, ramp, rungs):
    assert rungs_of(budget, ramp) == rungs


@pytest.mark.parametrize("budget", [2, 10, 14])
def test_a_few_scores_stop_nobody_by_a_hair(budget):
    """With a window of one epoch, too, the spread from epoch to epoch is that of three, and unknown after one."""
    up = {"a": [0.1 * i for i in range(1, 15)], "b": [0.1 * i - 1e-4 for i in range(1, 15)]}
    chosen = selected(up, budget)
    assert chosen.name == "a" and [row["outcome"] for row in chosen.table] == ["chosen", "finished"]


def test_one_score_decides_without_an_error():
    chosen = selected(flat(plain=0.5, better=0.6), budget=1)
    assert chosen.name == "better" and math.isnan(chosen.table[0]["error"]) and "a single score shows no error" in chosen.reason


def test_the_preference_is_no_test_of_significance():
    """How often another of equally good candidates is chosen, as select's docstring and rule.py say."""
    random, trials = torch.Generator().manual_seed(0), 400
    others = {1: 0, 3: 0}
    for rivals in others:
        for _ in range(trials):
            base = torch.rand(200, generator=random) < 0.6
            rights = [torch.where(torch.rand(200, generator=random) < 0.12, torch.rand(200, generator=random) < 0.6, base)]
            for _ in range(rivals):
                flips = torch.rand(200, generator=random) < 0.12
                rights.append(torch.where(flips, torch.rand(200, generator=random) < 0.6, base))
            curves = [Curve([float(right.double().mean())], [right]) for right in rights]
            others[rivals] += Judge(1).choose(curves, curves[0]) != 0
    assert 0.2 < others[1] / trials < 0.4 and 0.4 < others[3] / trials < 0.65


def test_the_reason_names_ties_as_ties():
    assert "a and b have the same score" in selected(flat(a=0.5, b=0.5)).reason


@pytest.mark.parametrize(
    "names, chosen, is_said",
    [
        ("inf -2 -1 -0.5", "-0.5", True),
        ("inf -2 -1 -0.5", "-1", False),
        ("inf -2 -1 -0.5", "inf", False),
        ("inf 0.5 -1", "-1", True),  # the stronger one has the other sign
        ("inf ess0.9 ess0.7 -0.1", "ess0.7", True),
        ("inf ess0.9 ess0.7", "ess0.9", False),
    ],
)
def test_the_reason_says_whether_a_stronger_candidate_was_tried(names, chosen, is_said):
    candidates = [Candidate.named(name) for name in names.split()]

    def train(candidate, train_idx, holdout_idx, budget):
        for _ in range(budget):
            yield 0.5 + 0.1 * (candidate.name == chosen)

    found = ab.select(train, candidates, n=100, budget=3, **QUIET)
    assert found.name == chosen and ("no stronger candidate was tried" in found.reason) == is_said


def test_strengths_of_relative_lambdas_compare_with_each_other():
    weak, strong, absolute = (Candidate(f"{lam}", lam, 0.3) for lam in (ab.RelativeLam(-1), ab.RelativeLam(-0.5), -0.1))
    assert is_strongest(strong, [weak, strong, absolute]) and not is_strongest(weak, [weak, strong])
    assert not is_strongest("strong", ["strong"])  # an object of the user


def test_a_candidate_that_lags_while_it_ramps_is_not_stopped():
    late = {"plain": [0.5] * 20, "late": [0.1] * 8 + [0.5] * 2 + [0.8] * 10}
    assert selected(late, 20).name == "late"


def test_a_hopeless_candidate_is_stopped():
    chosen = selected(flat(plain=0.5, bad=0.1, worse=0.0) | {"fades": [0.5] * 30 + [0.2] * 10}, 40)
    outcomes = {row["candidate"]: (row["outcome"], row["epochs"]) for row in chosen.table}
    assert outcomes == {
        "plain": ("chosen", 40),
        "bad": ("stopped after 28 of 40", 28),
        "worse": ("stopped after 28 of 40", 28),
        "fades": ("stopped after 34 of 40", 34),
    }
    assert len(chosen.scores["bad"]) == 28 and "only candidate" in chosen.reason


@pytest.mark.parametrize("end", [None, *range(1, 34)])
def test_those_that_were_stopped_go_on_if_the_others_fail(end, tmp_path):
    """Also after an interruption in any epoch: a failure counts when it came, not before."""
    curves = {"low": [0.1] * 10, "lower": [0.05] * 10, "leader": [0.9] * 7 + [math.nan] * 3, "second": [0.8] * 8 + [math.nan] * 2}
    calls = []

    def train(*arguments):
        for value in scripted(curves)(*arguments):
            calls.append(1)
            if len(calls) == end:
                raise KeyboardInterrupt
            yield value

    options = {"n": 100, "budget": 10, "out": tmp_path, "refit": False} | QUIET
    if end is not None:
        with pytest.raises(KeyboardInterrupt):
            ab.select(train, list(curves), **options)
    chosen = ab.select(train, list(curves), **options)
    assert chosen.name == "low" and [row["epochs"] for row in chosen.table] == [10, 10, 7, 8]
    assert [row["outcome"].split(":")[0] for row in chosen.table] == ["chosen", "finished", "failed", "failed"]
    assert end is not None or len(calls) == 37  # every epoch once, and the two that are NaN


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.500001, 0.9, math.nan]), min_size=12, max_size=12), min_size=1, max_size=5
    ),
    st.integers(1, 12),
    st.booleans(),
)
def test_the_budget_is_bounded(curves, budget, refit):
    """At most one budget for each candidate and one more; every epoch is trained once; what is chosen has not failed."""
    calls = []
    train = scripted(dict(enumerate(curves)), calls)
    try:
        chosen = ab.select(train, range(len(curves)), n=20, budget=budget, refit=refit, **QUIET)
    except RuntimeError as error:
        assert all(any(map(math.isnan, curve[:budget])) for curve in curves) or "all samples" in str(error)
        return
    compared = [call for call in calls if call[1] == 18]
    assert len(compared) == len(set(compared)) <= len(curves) * budget and len(calls) - len(compared) == budget * refit
    assert not any(map(math.isnan, curves[chosen.best][:budget])) and chosen.scores[chosen.name] == curves[chosen.best][:budget]
    assert sum(row["epochs"] for row in chosen.table) <= len(compared)
    assert chosen.result == (chosen.best, 20 if refit else 18)


# ---- what is held out -------------------------------------------------------------------------------------------------


def test_a_share_is_drawn_from_each_class_by_seed():
    labels = torch.tensor([0] * 100 + [1] * 30 + [7] * 4)
    train, held, known = split(0.1, None, labels, 0)
    assert torch.bincount(labels[held]).tolist() == [10, 3, 0, 0, 0, 0, 0, 1] and torch.equal(known, labels)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(134))
    assert torch.equal(split(0.1, 134, labels.tolist(), 0)[1], held)
    assert not torch.equal(split(0.1, None, labels, 1)[1], held)


def test_a_share_without_labels():
    train, held, known = split(0.25, 40, None, 0)
    assert len(held) == 10 and len(train) == 30 and known is None


@pytest.mark.parametrize("given", [[1, 3], (3, 1), torch.tensor([1, 3]), np.array([1, 3]), [i in (1, 3) for i in range(6)]])
def test_given_indices(given):
    train, held, _ = split(given, 6, [0, 0, 1, 1, 0, 1], 0)
    assert held.tolist() == [1, 3] and train.tolist() == [0, 2, 4, 5] and held.dtype == torch.int64


@pytest.mark.parametrize(
    "options, words",
    [
        ({"holdout": 0.0}, ["0.0", "(0, 1)"]),
        ({"holdout": 1.0}, ["1.0", "(0, 1)"]),
        ({"holdout": -0.1}, ["-0.1"]),
        ({"holdout": math.nan}, ["nan"]),
        ({"holdout": 5}, ["5"]),
        ({"holdout": []}, ["held-out part has no sample"]),
        ({"holdout": range(6)}, ["training part has no sample"]),
        ({"holdout": [0, 6]}, ["from 0 to 6", "0 to 5"]),
        ({"holdout": [-1, 2]}, ["from -1"]),
        ({"holdout": [2, 2]}, ["more than once"]),
        ({"holdout": [0.5, 1.0]}, ["vector of integers"]),
        ({"holdout": [True, False]}, ["one for each of the 6"]),
        ({"holdout": [0, 1]}, ["held-out part has no sample of class 1", "class 1 has 3 in all"]),
        ({"holdout": [0, 2, 3, 5]}, ["training part has no sample of class 1"]),
        ({"labels": [0, 0, 1, 1, 0, 2]}, ["no sample of class 2", "class 2 has 1 in all"]),
        ({"labels": [0, 1]}, ["2 labels", "n = 6"]),
        ({"labels": [0.5] * 6}, ["labels", "vector of integers"]),
        ({"labels": None, "n": None}, ["n: got neither"]),
        ({"labels": None, "n": 1}, ["n: got 1"]),
        ({"budget": 0}, ["budget: got 0"]),
        ({"budget": 1.5}, ["budget: got 1.5"]),
        ({"seed": -1}, ["seed: got -1"]),
        ({"goal": "f1"}, ["goal: got 'f1'", "'accuracy', 'balanced'"]),
        ({"candidates": []}, ["candidates: got none"]),
        ({"candidates": [1.0, 1.0]}, ["1.0 more than once"]),
    ],
    ids=str,
)
def test_bad_arguments(options, words, tmp_path):
    called = []
    arguments = {"candidates": ["a"], "labels": [0, 0, 1, 1, 0, 1], "n": 6, "budget": 2, "holdout": 0.34} | options
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        ab.select(lambda *_: called.append(1), arguments.pop("candidates"), **arguments, out=tmp_path / "out")
    assert all(word in str(raised.value) for word in words) and not called and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"holdout": {1, 2}}, TypeError, ["holdout: got set"]),
        ({"holdout": "0.1"}, TypeError, ["holdout: got str", "a number in (0, 1)"]),
        ({"holdout": None}, TypeError, ["holdout: got NoneType"]),
        ({"holdout": [1, "a"]}, TypeError, ["holdout: got list"]),
        ({"holdout": torch.tensor(3)}, ValueError, ["holdout: got 3.0"]),
        ({"labels": ["cat", "dog"] * 3}, TypeError, ["labels: got list of str", "number the classes"]),
        ({"labels": np.array(["cat", "dog"] * 3)}, TypeError, ["labels: got ndarray of str_", "number the classes"]),
        ({"labels": {}}, TypeError, ["labels: got dict"]),
        ({"labels": [0] * 5 + [10**12]}, ValueError, ["class 1000000000000 has 1 in all"]),
        ({"candidates": "ab"}, TypeError, ["candidates: got 'ab'", "a list"]),
        ({"candidates": {"a": 1}}, TypeError, ["candidates: got {'a': 1}"]),
        ({"candidates": 5}, TypeError, ["candidates: got 5"]),
        ({"settings": [1]}, TypeError, ["settings: got list"]),
        ({"settings": {"data": Path("x")}}, TypeError, ["settings: got", "for 'data'"]),
        ({"settings": {"lr": math.nan}}, ValueError, ["settings: got nan for 'lr'"]),
        ({"settings": {"goal": 1}}, ValueError, ["settings: got 'goal'"]),
        ({"train": None}, TypeError, ["train: got None", "generator function"]),
    ],
    ids=str,
)
def test_arguments_of_other_types(options, error, words, tmp_path):
    arguments = {"train": scripted({}), "candidates": ["a"], "labels": [0, 0, 1, 1, 0, 1], "budget": 2, "holdout": 0.34} | options
    with pytest.raises(error, match=re.escape(words[0])) as raised:
        ab.select(**arguments, out=tmp_path / "out")
    assert all(word in str(raised.value) for word in words) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("holdout", [np.float32(0.25), torch.tensor(0.25), np.array(0.25)], ids=repr)
def test_a_share_may_be_any_number(holdout):
    assert len(split(holdout, 40, None, 2**64)[1]) == 10


def test_settings_may_be_scalars_of_numpy(tmp_path):
    for lr in (np.float32(0.5), 0.5):
        assert selected(flat(a=0.5), out=tmp_path, settings={"lr": lr}).best == "a"


# ---- what the function yields -------------------------------------------------------------------------------------------


LABELS = torch.arange(40) % 4


@pytest.mark.parametrize("as_what", [lambda p: p, lambda p: p.tolist(), lambda p: p.numpy(), lambda p: p.int()])
def test_predictions_are_scored_with_the_labels_that_the_data_have(as_what):
    def train(candidate, train_idx, holdout_idx, budget):
        predicted = LABELS[holdout_idx].clone()
        if candidate == "half":
            predicted[::2] = (predicted[::2] + 1) % 4
        for _ in range(budget):
            yield as_what(predicted)

    chosen = ab.select(train, ["half", "all"], labels=LABELS, holdout=0.5, budget=4, **QUIET)
    assert chosen.best == "all" and chosen.scores["all"] == [1.0] * 4 and chosen.scores["half"][0] == 0.5


@pytest.mark.parametrize("score", [0.5, 1, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, requires_grad=True)])
def test_scores_may_be_any_number(score):
    chosen = ab.select(lambda *_: iter([score]), ["a"], n=10, budget=1, refit=False, **QUIET)
    assert chosen.scores == {"a": [score.item() if hasattr(score, "item") else score]}


@pytest.mark.parametrize(
    "values, error, words",
    [
        (["text"], TypeError, ["yielded str"]),
        ([None], TypeError, ["yielded NoneType"]),
        ([True], TypeError, ["yielded bool"]),
        ([[1, 2]], ValueError, ["shape (2,)", "4 held-out samples"]),
        ([torch.zeros(4)], ValueError, ["float32", "argmax(1)"]),
        ([["0"] * 4], TypeError, ["yielded list that is no array of numbers", "4 held-out samples"]),
        ([torch.zeros(4, 2)], ValueError, ["shape (4, 2)"]),
        ([0.5, torch.zeros(4, dtype=torch.int64)], ValueError, ["one kind"]),
        ([torch.zeros(4, dtype=torch.int64), 0.5], ValueError, ["one kind"]),
        ([0.5, 0.5, 0.5], ValueError, ["more than budget = 2"]),
    ],
    ids=str,
)
def test_what_is_neither_a_score_nor_predictions_is_an_error(values, error, words):
    with pytest.raises(error) as raised:
        ab.select(lambda *_: iter(values), ["a"], labels=LABELS, budget=2, **QUIET)
    assert all(word in str(raised.value) for word in words)


def test_a_function_that_is_no_generator_is_an_error():
    with pytest.raises(TypeError, match=r"it returned float, expected a generator") as raised:
        ab.select(lambda *_: 0.5, ["a", "b"], n=10, budget=2, **QUIET)
    assert raised.type is TypeError


def test_predictions_need_labels():
    with pytest.raises(ValueError, match=r"labels: train yields predictions"):
        ab.select(lambda *_: iter([torch.zeros(1, dtype=torch.int64)]), ["a"], n=10, budget=1, goal="balanced", **QUIET)


def test_a_balanced_goal_with_scores_needs_no_labels():
    assert selected(flat(a=0.5, b=0.7), goal="balanced").best == "b"


# ---- failures ----------------------------------------------------------------------------------------------------------


def failing(candidate, train_idx, holdout_idx, budget):
    """Fails in the way that the candidate names."""
    for epoch in range(budget):
        if candidate == "raises" and epoch == 2:
            raise FloatingPointError("the loss is\nnan")
        if candidate == "stops" and epoch == 1:
            return
        yield {"nan": math.nan, "inf": math.inf}.get(candidate, 0.5) if epoch == 1 else 0.4


REASONS = {
    "raises": "FloatingPointError: the loss is nan",
    "nan": "the score of epoch 2 is nan",
    "inf": "the score of epoch 2 is inf",
    "stops": "it ended after 1 of 4 scores",
}


def test_the_others_go_on(tmp_path):
    chosen = ab.select(failing, [*REASONS, "fine"], n=10, budget=4, out=tmp_path, **QUIET)
    assert chosen.best == "fine"
    assert {row["candidate"]: row["outcome"] for row in chosen.table} == {
        **{name: f"failed: {reason}" for name, reason in REASONS.items()},
        "fine": "chosen",
    }
    assert "failed: it ended after 1 of 4 scores" in repr(chosen)


def test_all_fail(tmp_path):
    for _ in range(2):  # the second time from the disk
        with pytest.raises(RuntimeError) as raised:
            ab.select(failing, list(REASONS), n=10, budget=4, out=tmp_path, **QUIET)
        assert all(f"{name}: {reason}" in str(raised.value) for name, reason in REASONS.items())
        assert str(tmp_path / FILE) in str(raised.value)
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [entry["score"] for entry in entries if entry.get("candidate") == 0 and "score" in entry] == [0.4, 0.5]


def test_the_cause_of_the_first_failure_is_shown():
    with pytest.raises(RuntimeError) as raised:
        ab.select(failing, ["stops", "raises"], n=10, budget=4, **QUIET)
    assert isinstance(raised.value.__cause__, FloatingPointError)


def test_a_last_training_that_fails():
    def train(candidate, train_idx, holdout_idx, budget):
        yield 0.5
        if len(train_idx) == 10:
            raise FloatingPointError("too many samples")

    with pytest.raises(RuntimeError, match=r"a was chosen, but its training on all samples failed: FloatingPointError: too many"):
        ab.select(train, ["a"], n=10, budget=1, **QUIET)
    assert ab.select(train, ["a"], n=10, budget=1, refit=False, **QUIET).best == "a"


MISTAKES = [NameError, UnboundLocalError, AttributeError, TypeError, ModuleNotFoundError, SyntaxError]


@pytest.mark.parametrize("mistake", [*MISTAKES, MemoryError, torch.OutOfMemoryError, PermissionError])
def test_what_says_nothing_of_a_candidate_is_no_failure_of_it(mistake, tmp_path):
    """It is raised as it is, nothing of it is on record, and the mended function goes on in the same folder."""
    calls, mended = [], False

    def train(candidate, train_idx, holdout_idx, budget):
        for epoch in range(budget):
            calls.append((candidate, epoch))
            if candidate == "b" and epoch == 1 and not mended:
                raise mistake("a typing error")
            yield 0.5

    with pytest.raises(mistake, match="a typing error"):
        ab.select(train, ["a", "b", "c"], n=10, budget=2, refit=False, out=tmp_path, **QUIET)
    assert "failed" not in (tmp_path / FILE).read_text()
    mended = True
    chosen = ab.select(train, ["a", "b", "c"], n=10, budget=2, refit=False, out=tmp_path, **QUIET)
    assert [row["outcome"] for row in chosen.table] == ["chosen", "finished", "finished"]
    assert calls.count(("a", 0)) == 1  # from the record


def test_a_failure_is_warned_of_if_another_one_is_chosen():
    with pytest.warns(
        UserWarning, match=r"select: 4 of 5 candidates failed: raises: FloatingPointError: the loss is nan; nan: the"
    ):
        assert ab.select(failing, [*REASONS, "fine"], n=10, budget=4, refit=False, **QUIET).best == "fine"


@pytest.mark.parametrize("block", [torch.no_grad, torch.enable_grad, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("outside", [True, False])
def test_a_yield_inside_no_grad_changes_no_other_training(block, outside):
    """Nor the caller's, also where the training is stopped, fails, or is left in the middle."""
    seen = []

    def train(candidate, train_idx, holdout_idx, budget):
        for epoch in range(budget):
            seen.append(torch.is_grad_enabled())
            with block():
                within = torch.is_grad_enabled()
                yield {"good": 0.9, "poor": 0.1}.get(candidate, 0.5)
                assert torch.is_grad_enabled() == within
            if candidate == "fails" and epoch == 3:
                raise FloatingPointError

    with torch.set_grad_enabled(outside):
        with pytest.warns(UserWarning, match="1 of 4"):
            chosen = ab.select(train, ["plain", "good", "poor", "fails"], n=20, budget=10, **QUIET)
        assert torch.is_grad_enabled() == outside
    assert chosen.best == "good" and torch.is_grad_enabled()
    assert {row["candidate"]: row["epochs"] for row in chosen.table}["poor"] == 7
    assert set(seen) == {outside}


@pytest.mark.parametrize("block", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_yield_inside_a_block_that_would_hold_for_all_is_refused(block, tmp_path):
    def train(candidate, train_idx, holdout_idx, budget):
        for _ in range(budget):
            with block():
                yield 0.5

    with pytest.raises(RuntimeError, match=r"it yielded inside `with torch\.\w+\(.*yield them after it"):
        ab.select(train, ["a", "b"], n=20, budget=2, out=tmp_path, **QUIET)
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    assert (tmp_path / FILE).read_text().count("\n") == 1  # the arguments alone
    with block():  # of the caller's own
        assert ab.select(scripted(flat(a=0.5, b=0.6)), ["a", "b"], n=20, budget=2, **QUIET).best == "b"


def refitted(before, after, n=500, budget=20):
    """A selection of one candidate whose share of right predictions is `before`, and `after` in the training on everything."""
    labels = torch.zeros(10 * n, dtype=torch.int64)

    def train(candidate, train_idx, holdout_idx, budget):
        right = after if len(train_idx) == len(labels) else before
        for _ in range(budget):
            yield (torch.arange(n) >= right * n).long()

    return ab.select(train, ["a"], labels=labels, holdout=range(n), budget=budget, **QUIET)


@pytest.mark.parametrize("before, after", [(0.8, 0.1), (0.8, 0.7), (0.5, 0.0)])
def test_a_last_training_that_collapses_is_seen(before, after):
    words = rf"a was chosen with the score {before:.4f}, but its training on all samples ended at {after:.4f}"
    with pytest.warns(UserWarning, match=words):
        refitted(before, after)


def test_scores_of_other_samples_are_not_compared_with_the_contest():
    """`absgd-fast tune` trains with predictions of the held-out part, and at last with scores of the test set."""
    right = torch.ones(100, dtype=torch.bool)
    before, again = Curve([1.0] * 10, [right] * 10), Curve([0.9] * 10)
    assert Judge(10).fell(again, before) is None
    assert Judge(10).fell(Curve([0.0] * 10, [~right] * 10), before) == (1.0, 0.0)


@pytest.mark.parametrize("before, after", [(0.8, 0.8), (0.8, 0.79), (0.1, 0.9)])
def test_a_last_training_that_is_no_worse_is_not_warned_of(before, after):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refitted(before, after)


def test_an_iterator_may_be_given_too_and_what_it_raises_at_its_end_is_nobodys():
    def stubborn():
        try:
            yield from [0.1] * 10
        finally:
            raise OSError("at the end")

    given = {
        "plain": lambda: iter([0.5] * 10),
        "stopped": lambda: iter([0.1] * 10),
        "raises": stubborn,
        "nan": lambda: iter([math.nan]),
    }
    chosen = ab.select(lambda candidate, *_: given[candidate](), list(given), n=20, budget=10, **QUIET)
    assert chosen.best == "plain" and [row["epochs"] for row in chosen.table] == [10, 7, 7, 0]


def test_a_training_that_raises_frees_its_model():
    alive = []

    class Model:
        pass

    def train(candidate, train_idx, holdout_idx, budget):
        gc.collect()
        assert all(model() is None for model in alive)
        model = Model()
        yield 0.5
        if candidate != "last":
            alive.append(weakref.ref(model))
            try:
                raise KeyError("inside")
            except KeyError:
                raise FloatingPointError("the loss is nan")  # noqa: B904  # its context has variables, too

    with pytest.raises(RuntimeError, match=r"all 3 candidates failed"):
        ab.select(train, ["a", "b", "last"], n=20, budget=3, **QUIET)
    assert len(alive) == 2


def test_an_error_of_the_disk_is_no_failure_of_a_candidate(tmp_path):
    """It ends the selection, and the same call goes on."""
    full = [True]

    def train(candidate, train_idx, holdout_idx, budget):
        yield 0.5
        if candidate == "b" and full:
            raise OSError(28, "No space left on device")
        yield 0.6

    options = {"n": 20, "budget": 2, "out": tmp_path} | QUIET
    with pytest.raises(OSError, match=r"No space left"):
        ab.select(train, ["a", "b"], **options)
    full.clear()
    assert [row["outcome"] for row in ab.select(train, ["a", "b"], **options).table] == ["chosen", "finished"]


def test_a_record_that_cannot_be_written_is_named(tmp_path):
    """/dev/full is a full disk; what an unfinished line leaves, the next reader drops."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    record = Record(tmp_path, {})
    record._file.close()
    record._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=re.escape(str(tmp_path / FILE))):
        record.add({"score": 1})
    record._file.close()


def test_a_disk_without_locks_is_no_other_process(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert selected(flat(a=0.5), out=tmp_path).best == "a"


def test_trainings_that_take_turns_have_random_numbers_of_their_own():
    """Of torch, Python and NumPy, seeded or not; and the caller's generators are left as they were."""
    drawn = {}

    def train(candidate, train_idx, holdout_idx, budget):
        if candidate != "unseeded":
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
        numbers = drawn.setdefault((candidate, len(train_idx)), [])
        for _ in range(budget):
            numbers.append((random.random(), float(torch.rand(1)), np.random.rand()))  # noqa: NPY002
            yield 0.5

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    ab.select(train, ["a", "b", "unseeded"], n=20, budget=10, **QUIET)
    after = random.random(), float(torch.rand(1)), np.random.rand()  # noqa: NPY002
    assert drawn["a", 18] == drawn["b", 18] == drawn["unseeded", 18] == drawn["a", 20] and after == drawn["a", 18][0]


def test_the_models_of_the_others_are_gone_before_the_last_training():
    alive = []

    class Model:
        pass

    def train(candidate, train_idx, holdout_idx, budget):
        if len(train_idx) == 20:
            gc.collect()
            assert [model() for model in alive] == [None, None]
        model = Model()
        alive.append(weakref.ref(model))
        yield 0.5
        return model

    assert isinstance(ab.select(train, ["a", "b"], n=20, budget=1, **QUIET).result, Model)


# ---- on disk -----------------------------------------------------------------------------------------------------------

CURVES = {
    "plain": [0.50, 0.52, 0.51, 0.50, 0.52, 0.51, 0.50, 0.52],
    "good": [0.10, 0.20, 0.40, 0.60, 0.70, 0.80, 0.80, 0.80],
    "bad": [0.30, 0.20, 0.10, 0.10, 0.10, 0.10, 0.10, 0.10],
    "nan": [0.50, 0.50, 0.50, 0.50, math.nan, 0.0, 0.0, 0.0],
}


def summary(chosen):
    return chosen.name, repr(chosen), chosen.scores, chosen.reason, chosen.result


def test_a_selection_that_is_interrupted_in_any_epoch_goes_on(tmp_path):
    calls = []
    whole = ab.select(scripted(CURVES, calls), list(CURVES), n=50, budget=8, **QUIET)
    for end in range(len(calls)):
        out, before, after = tmp_path / str(end), [], []

        def interrupted(*arguments):
            for value in scripted(CURVES, before)(*arguments):
                if len(before) > end:
                    raise KeyboardInterrupt
                yield value

        with pytest.raises(KeyboardInterrupt):
            ab.select(interrupted, list(CURVES), n=50, budget=8, out=out, **QUIET)
        resumed = ab.select(scripted(CURVES, after), list(CURVES), n=50, budget=8, out=out, **QUIET)
        expected = whole.result if end < len(calls) else None
        assert summary(resumed) == summary(whole) and resumed.result == expected
        known = before[:end]  # the epochs whose scores were on the disk
        finished = {c for c in CURVES if [call[2] for call in known if call[0] == c and call[1] == 45][-1:] == [8]}
        assert not finished & {c for c, samples, _ in after if samples == 45}


def test_half_a_line_is_dropped(tmp_path):
    """The file cut short after any byte of its last two lines, or of its first one."""
    whole = ab.select(scripted(CURVES), list(CURVES), n=50, budget=8, out=tmp_path, **QUIET)
    content = (tmp_path / FILE).read_bytes()
    second_last = content.rfind(b"\n", 0, content.rfind(b"\n", 0, -1))
    for size in [0, 5, 100, *range(second_last, len(content), 7), len(content)]:
        (tmp_path / FILE).write_bytes(content[:size])
        assert summary(ab.select(scripted(CURVES), list(CURVES), n=50, budget=8, out=tmp_path, **QUIET)) == summary(whole)
        assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize(
    "change, words",
    [
        ({"budget": 9}, ["budget: it was made with 8, got 9"]),
        ({"n": 51}, ["n: it was made with 50, got 51"]),
        ({"seed": 1}, ["held-out samples"]),
        ({"goal": "balanced"}, ["goal: it was made with 'accuracy', got 'balanced'"]),
        ({"labels": [0, 1] * 25}, ["labels"]),
        ({"settings": {"lr": 0.2}}, ["lr: it was made with 0.1, got 0.2"]),
        ({"candidates": ["plain"]}, ["candidates"]),
    ],
    ids=str,
)
def test_other_arguments_are_refused(change, words, tmp_path):
    arguments = {"candidates": list(CURVES), "n": 50, "budget": 8, "settings": {"lr": 0.1}, "out": tmp_path}
    ab.select(scripted(CURVES), **arguments, **QUIET)
    content = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        ab.select(scripted(CURVES), **arguments | change, **QUIET)
    assert all(word in str(raised.value) for word in [*words, str(tmp_path / FILE), "another folder"])
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        "mine\n",
        "mine",
        "{}\n",
        "[1]\n",
        '{"format": "other", "version": 1}\n',
        '{"format": "absgd_fast.select", "version": 99}\n',
        "\x00" * 9,
    ],
)
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"give another folder"):
        selected(flat(a=0.5), out=tmp_path)
    assert (tmp_path / FILE).read_text() == content


def test_a_damaged_line_is_refused(tmp_path):
    selected(flat(a=0.5), out=tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    (tmp_path / FILE).write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    with pytest.raises(ValueError, match=r"damaged"):
        selected(flat(a=0.5), out=tmp_path)


def test_two_processes_do_not_write_one_record(tmp_path):
    def train(candidate, train_idx, holdout_idx, budget):
        with pytest.raises(ValueError, match=r"another process is writing .*give another folder"):
            selected(flat(a=0.5), out=tmp_path)
        yield 0.5

    assert ab.select(train, ["a"], n=10, budget=1, out=tmp_path, **QUIET).best == "a"


class Described:
    """A user's candidate, without a repr of its own."""

    def __init__(self, level):
        self.level = level


def test_objects_are_recognised_without_their_address(tmp_path):
    for _ in range(2):
        kept = [Described(0.5)]
        chosen = ab.select(lambda c, *_: iter([c.level]), kept, n=10, budget=1, refit=False, out=tmp_path, **QUIET)
        assert chosen.best is kept[0]


def test_a_function_may_keep_checkpoints_of_its_own(tmp_path):
    """In its folder. After a kill it yields the earlier values first, and trains the others alone."""
    trained = []

    def train(candidate, train_idx, holdout_idx, budget, folder):
        file = folder / "scores.json"
        scores = json.loads(file.read_text()) if file.exists() else []
        yield from scores
        while len(scores) < budget:
            trained.append((candidate, len(train_idx), len(scores) + 1))
            if len(trained) == 11:
                raise KeyboardInterrupt
            scores.append(CURVES[candidate][len(scores)])
            file.write_text(json.dumps(scores))
            yield scores[-1]
        return sum(scores)

    options = {"n": 50, "budget": 8, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        ab.select(train, ["plain", "good"], **options, **QUIET)
    chosen = ab.select(train, ["plain", "good"], **options, **QUIET)
    assert chosen.name == "good" and chosen.result == sum(CURVES["good"])
    del trained[10]  # the one that was interrupted
    assert len(trained) == len(set(trained))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidate-0", "candidate-1", "candidate-refit", FILE]


def test_without_out_there_is_no_folder():
    def train(candidate, train_idx, holdout_idx, budget, folder="unset"):
        assert folder is None
        yield 0.5

    assert ab.select(train, ["a"], n=10, budget=1, **QUIET).best == "a"


KILLED = """
import sys, time, torch, absgd_fast as ab
def train(candidate, train_idx, holdout_idx, budget):
    random = torch.Generator().manual_seed(0)
    w = torch.zeros(3)
    for epoch in range(budget):
        w += candidate * torch.randn(3, generator=random)
        time.sleep(seconds)
        if seconds:
            print(candidate, len(train_idx), epoch, flush=True)
        trained.append(epoch)
        yield float(w.sum())
    return w.tolist()
chosen = ab.select(train, [0.1, 0.2, -0.1], n=30, budget=12, out=out, progress=False)
"""


def test_sigkill(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = f"out, seconds, trained = {str(tmp_path / 'killed')!r}, 0.02, []\n{KILLED}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    for _ in range(30):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()

    def here(out):
        names = {"out": tmp_path / out, "seconds": 0, "trained": []}
        exec(KILLED, names)
        return summary(names["chosen"]), len(names["trained"])

    (resumed, trained), (whole, all_of_it) = here("killed"), here("whole")
    assert resumed == whole and trained < all_of_it


def test_packing():
    for n in (1, 7, 8, 9, 100):
        right = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
        assert torch.equal(unpacked(packed(right), n), right) and len(packed(right)) == 2 * math.ceil(n / 8)


# ---- candidates ---------------------------------------------------------------------------------------------------------


def test_default_candidates():
    assert [c.name for c in default_candidates()] == ["inf", "-2", "-1", "-0.5"]
    assert [c.ramp for c in default_candidates()] == [0, 0.3, 0.3, 0.3]
    assert [c.name for c in default_candidates("balanced")] == ["inf", "ess0.95", "ess0.9", "ess0.7"]


@pytest.mark.parametrize("text", ["inf", "-2", "0.5", "ess0.7"])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_candidate_builds_what_its_code_says(text, unit):
    candidate = Candidate.named(text)
    criterion, schedule = candidate.build(ab.CrossEntropy(), 10, unit=unit)
    names = {"ab": ab, "math": math}
    exec(candidate.code(10), names)
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(10):
        losses = [float(c(x.clone().requires_grad_(), y)) for c in (criterion, names["criterion"])]
        assert losses[0] == losses[1] and torch.equal(criterion.last.weights, names["criterion"].last.weights)
        schedule.step()
        names.get("schedule", Still()).step()
    if candidate.ramp:
        assert float(criterion.lam) == candidate.lam
    assert schedule.state_dict()["count"] == 10


class Still:
    def step(self):
        pass


def test_build_passes_options_on():
    criterion, schedule = Candidate.named("-1").build(ab.GCE(), 4, unit="step", gamma=0.5)
    assert criterion.gamma == 0.5 and isinstance(criterion.criterion, ab.GCE) and schedule.unit == "step"
    criterion, _ = Candidate.named("-1").build(None, 4, loss=ab.LinearABLoss)
    assert isinstance(criterion, ab.LinearABLoss)


@pytest.mark.parametrize("text", ["", "lam", "0", "nan", "ess", "ess0", "ess1", "ess2", "essx"])
def test_unknown_candidates(text):
    with pytest.raises(ValueError, match=re.escape(f"candidates: got {text!r}")):
        Candidate.named(text)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("", -1.0), ValueError),
        (("a", 0.0), ValueError),
        (("a", -1.0, 1.5), ValueError),
        (("a", ab.TargetESS(0.5), 0.3), TypeError),
    ],
)
def test_bad_candidates(arguments, error):
    with pytest.raises(error):
        Candidate(*arguments)


# ---- a training of one's own -------------------------------------------------------------------------------------------


def blobs(n=400, noise=0.4):
    """Four separable classes, `noise` of whose labels are wrong, and the right labels."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    x = 4 * torch.eye(4)[y] + torch.randn(n, 4, generator=random)
    wrong = torch.rand(n, generator=random) < noise
    return x, torch.where(wrong, (y + torch.randint(1, 4, (n,), generator=random)) % 4, y), y


def test_a_training_of_ones_own(tmp_path):
    x, y, _ = blobs()

    def train(candidate, train_idx, holdout_idx, budget):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        criterion, schedule = candidate.build(ab.CrossEntropy(), budget)
        optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(budget):
            for batch in train_idx[torch.randperm(len(train_idx))].split(50):
                optimizer.zero_grad()
                criterion(model(x[batch]), y[batch]).backward()
                optimizer.step()
            schedule.step()
            yield model(x[holdout_idx]).argmax(1)
        return model

    seen = []
    chosen = ab.select(train, labels=y, budget=10, out=tmp_path, progress=lambda *event: seen.append(event))
    assert isinstance(chosen.best, Candidate) and isinstance(chosen.result, torch.nn.Sequential)
    assert len(chosen.table) == 4 and len(chosen.holdout_idx) == 40
    assert sum(row["epochs"] for row in chosen.table) + 10 == len(seen) and seen[0][:2] == ("inf", 1)
    assert seen[-1][0] == f"{chosen.name}, all samples"
    assert all(0 <= score <= 1 for _, _, score in seen)


def test_the_bar_is_for_terminals(capsys):
    selected(flat(a=0.5), progress=True)
    assert capsys.readouterr() == ("", "")


def test_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert selected(flat(a=0.5, b=0.1, c=0.5), progress=True).best == "a"
    assert selected(flat(**{"[/red]": 0.5, "[b]": 0.1}), progress=True).best == "[/red]"  # no markup


def test_constants_of_the_rule():
    """What docs/choosing-lambda.md says of the rule."""
    assert (rule.RUNGS, rule.WINDOW, rule.STOPPED, rule.CHOSEN) == ((0.7, 0.85), 0.1, 2.0, 0.5)


@pytest.mark.parametrize("number", [-1, -1.0, np.float64(-1), np.int64(-1), torch.tensor(-1), torch.tensor(-1.0)])
def test_the_code_of_any_number(number):
    candidate = Candidate("y", number, ramp=0.3)
    assert type(candidate.lam) is float and candidate == Candidate("y", -1.0, 0.3)
    assert candidate.code(10).splitlines() == [
        "criterion = ab.ABLoss(lam=-1.0)",
        "schedule = ab.Ramp(criterion, lam=-1.0, length=3)  # schedule.step() after each epoch",
    ]


@pytest.mark.parametrize("lam", [-1, math.inf, ab.RelativeLam(-0.5), ab.TargetESS(0.7, sign=-1)])
@pytest.mark.parametrize("loss", [ab.ABLoss, ab.LinearABLoss])
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.5, "alpha": 1.0}, {"normalizer": "batch", "max_weight": None}, {"mix": 0.5}])
def test_the_code_has_the_options_that_differ_from_the_defaults(lam, loss, unit, options):
    if (isinstance(lam, ab.TargetESS) and "gamma" in options) or (loss is ab.LinearABLoss and "mix" in options):
        with pytest.raises(ValueError, match=r"gamma: got|mix: got"):  # as build refuses it
            Candidate("a", lam).code(10, loss=loss, unit=unit, **options)
        return
    candidate = Candidate("a", lam, 0.0 if isinstance(lam, ab.TargetESS) else 0.3)
    code = candidate.code(10, loss=loss, unit=unit, **options)
    criterion, schedule = candidate.build(None, 10, loss=loss, unit=unit, **options)
    exec(code, names := {"ab": ab})
    made = names["criterion"]
    assert type(made) is loss and all(getattr(made, n) == getattr(criterion, n) for n in ("gamma", "mix", "normalizer"))
    assert "alpha" not in code and "max_weight" not in code and ("gamma" in code) == ("gamma" in options)
    if "schedule" in names:
        assert names["schedule"].unit == schedule.unit and names["schedule"].length == schedule.length
