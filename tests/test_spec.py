"""The specification of a method, METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...]: its meaning, and what is refused."""

import copy
import math
import re

import pytest
import torch

import absgd_fast as ab
from absgd_fast.experiments import criteria, data, methods, stages, train, words
from absgd_fast.experiments.config import Config
from absgd_fast.experiments.mixup import Mixup
from absgd_fast.experiments.placing import Placing
from absgd_fast.experiments.sam import SAM
from absgd_fast.experiments.spec import parse

RIGHT = {
    "sgd": ("sgd", (), "ce", (), {}),
    "absgd:sce": ("absgd", (), "sce", (), {}),
    "absgd:sce@lam=-1": ("absgd", (), "sce", (), {"lam": -1.0}),
    "sgd+sam:vs+tla+adrw@nu=1.5@sam_rho=0.1": ("sgd", ("sam",), "vs", ("tla", "adrw"), {"nu": 1.5, "sam_rho": 0.1}),
    "absgd:cb-ce@lam=5@gamma=0.5": ("absgd", (), "cb-ce", (), {"lam": 5.0, "gamma": 0.5}),
    "sgd+balanced+crt@stage-epochs=3": ("sgd", ("balanced", "crt"), "ce", (), {"stage_epochs": 3}),
    "absgd@lr_steps=0.5/0.9": ("absgd", (), "ce", (), {"lr_steps": (0.5, 0.9)}),
    "absgd@trainable=fc": ("absgd", (), "ce", (), {"trainable": "fc"}),
}
WRONG = {
    "sdg": "unknown method 'sdg'; did you mean sgd? use one of",
    "sgd+smaa": "unknown extra 'smaa' in 'sgd+smaa'; use one of sam, mixup, balanced, tau, crt, lws",
    "sgd:focl": "unknown loss 'focl'; did you mean focal? use one of ce, focal, ldam",
    "sgd:focal+drv": "unknown schedule 'drv' in 'focal+drv'; did you mean drw? use one of drw, adrw, tla",
    "sgd:vs+tla+tla": "loss vs+tla+tla: a schedule is named twice",
    "sgd:ce+tla": "loss ce+tla: tla switches a scale of the logits off, which only vs and cdt have",
    "sgd:cb-ce+drw": "use ce+drw",
    "sgd:ce+drw+adrw": "drw and adrw are two choices of the class weights",
    "sgd+sam+sam": "method 'sgd+sam+sam': an extra is named twice",
    "l2rw+sam": "sam does not go with l2rw, whose step has three passes of its own",
    "proportion+mixup": "mixup does not go with proportion",
    "resample+balanced": "balanced does not go with resample, which samples like this already",
    "sgd+tau+lws": "tau and lws each replace the classifier; give one of them",
    "sgd+tau:ldam": "ldam's cosine classifier has no norms, so tau has nothing to change",
    "sgd@lam": "got @lam, expected @SETTING=VALUE",
    "sgd@lma=1": "unknown setting of a method 'lma' in 'sgd@lma=1'; did you mean lam? use one of",
    "sgd@epochs=3": "unknown setting of a method 'epochs'",
    "sgd@lam=x": "method 'sgd@lam=x': lam is a number, got 'x'",
    "sgd@clean=1.5": "clean is a whole number, got '1.5'",
    "sgd@lr_steps=a": "lr_steps is numbers with / between them, got 'a'",
    "": "unknown method ''",
}


@pytest.mark.parametrize("text", RIGHT)
def test_parts(text):
    found = parse(text, Config())
    assert (found.method, found.extras, found.loss, found.schedules, found.settings) == RIGHT[text]


def test_loss_of_the_experiment():
    config = Config(loss="vs+tla", lam=2.0)
    assert parse("absgd", config).config(config).loss == "vs+tla"
    own = parse("absgd:focal@lam=3", config).config(config)
    assert (own.loss, own.lam, config.lam) == ("focal", 3.0, 2.0)


@pytest.mark.parametrize("text", WRONG)
def test_refused(text):
    for check in (lambda: parse(text, Config()), Config(methods=(text,)).check):
        with pytest.raises(ValueError, match=re.escape(WRONG[text])) as raised:
            check()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "methods, expected",
    {
        ("absgd@lam=0",): "lam: got 0.0, expected a number other than 0",
        ("absgd@gamma=2",): "gamma: got 2.0, expected a number in (0, 1]",
        ("absgd", "absgd"): "expected each method at most once",
        ("absgd:sce", "absgd:sce@sce_alpha=-1"): "sce-alpha: got -1.0",
        ("reference@mix=1",): "mix: got 1.0, but method reference supports only 0",
        ("reference@momentum=0",): "momentum: got 0.0, but method reference supports only 0.9",
    }.items(),
)
def test_settings_of_a_method_are_checked(methods, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        Config(methods=methods).check()


# ---------------------------------------------------------------------------------------------- losses

COUNTS = [50, 9, 1]
START = 8  # of 10 epochs: drw_start = 0.8
BALANCED, BY_NU = ab.class_balanced_weights(COUNTS, 0.99), ab.adrw_weights(COUNTS, 1.5)
MADE = {
    "ce": ab.CrossEntropy(),
    "focal": ab.Focal(1.5),
    "ldam": ab.LDAM(COUNTS, 0.4, 20.0),
    "la": ab.LogitAdjusted(COUNTS, 0.8),
    "vs": ab.VS(COUNTS, 0.2, 0.8),
    "cdt": ab.CDT(COUNTS, 0.2),
    "gce": ab.GCE(0.6),
    "tce": ab.GCE(0.6, 0.4),
    "sce": ab.SCE(0.3, 0.7),
    "cb-ce": ab.CrossEntropy(BALANCED),
    "cb-focal": ab.Focal(1.5, BALANCED),
    "cb-ldam": ab.LDAM(COUNTS, 0.4, 20.0, BALANCED),
}
NUMBERS = dict(
    focal_gamma=1.5,
    ldam_margin=0.4,
    ldam_scale=20.0,
    vs_gamma=0.2,
    vs_tau=0.8,
    gce_q=0.6,
    gce_k=0.4,
    sce_alpha=0.3,
    sce_beta=0.7,
    cb_beta=0.99,
    nu=1.5,
    epochs=10,
)
X = torch.tensor([[0.3, -0.2, 0.9], [-0.5, 0.1, 0.4], [0.8, 0.6, -0.7]])
Y = torch.tensor([0, 2, 1])


def test_every_loss_is_in_the_table():
    assert set(MADE) == set(criteria.LOSSES)


@pytest.mark.parametrize("name", MADE)
def test_loss(name):
    made, schedules = criteria.make(Config(loss=name, **NUMBERS), COUNTS)
    torch.testing.assert_close(made(X, Y), MADE[name](X, Y), rtol=0, atol=0)
    assert list(schedules) == ["tce"] * (name == "tce")
    plain, _ = criteria.make(Config(loss=name, epochs=10), COUNTS)  # with the default numbers it is another loss
    assert (name == "ce") == torch.equal(plain(X, Y), MADE[name](X, Y))


@pytest.mark.parametrize(
    "loss, later",
    {
        "focal+drw": ab.Focal(1.5, BALANCED),
        "ldam+adrw": ab.LDAM(COUNTS, 0.4, 20.0, BY_NU),
        "tce": ab.GCE(0.6, 0.4, prune=True),
        "cdt+tla": ab.CrossEntropy(),
        "vs+tla+adrw": ab.LogitAdjusted(COUNTS, 0.8, BY_NU),
    }.items(),
)
def test_schedules_switch(loss, later):
    made, schedules = criteria.make(Config(loss=loss, **NUMBERS), COUNTS)
    for epoch in range(10):
        torch.testing.assert_close(made(X, Y), (MADE[loss.split("+")[0]] if epoch < START else later)(X, Y))
        for schedule in schedules.values():
            schedule.step()


@pytest.mark.parametrize("loss", [*MADE, "vs+tla+adrw", "focal+drw"])
def test_printed_code_makes_the_same_loss(loss):
    config = Config(loss=loss, **NUMBERS)
    expression, lines = criteria.code(config)
    scope = {"ab": ab, "counts": COUNTS}
    exec(f"loss = {expression}\n{lines}", scope)
    made, schedules = criteria.make(config, COUNTS)
    for epoch in range(10):
        if loss == "tce" and epoch == START:
            words, _, later = lines.partition(": ")
            assert words == f"# after {START} epochs"
            exec(later, scope)
        assert torch.equal(scope["loss"](X, Y), made(X, Y))
        for name, schedule in schedules.items():
            schedule.step(), name == "tce" or scope[name].step()


def test_truncation_leaves_samples_out():
    """With p <= k the gradient is 0, as in Zhang & Sabuncu 2018, Sec. 3.3; the others keep theirs. A checkpoint knows it."""
    made, schedules = criteria.make(Config(loss="tce", **NUMBERS), COUNTS)
    gradients = []
    for state in ({"epoch": START - 1}, {"epoch": START}):
        schedules["tce"].load_state_dict(state)
        assert schedules["tce"].state_dict() == state
        x = X.clone().requires_grad_()
        made(x, Y).sum().backward()
        gradients.append(x.grad)
    small = X.softmax(1).gather(1, Y[:, None]).squeeze(1) <= 0.4
    assert small.tolist() == [True, False, False]
    assert (gradients[0].abs().sum(1) > 0).all()
    assert torch.equal(gradients[1], gradients[0] * ~small[:, None])


def test_an_empty_loss_and_a_setting_given_twice_are_refused():
    for text, expected in (("sgd:", "expected a loss behind the colon"), ("absgd@lam=1@lam=2", "a setting is given twice")):
        with pytest.raises(ValueError, match=expected):
            parse(text, Config())


@pytest.mark.parametrize("method", ["sgd@lr-schedule=cosin", "absgd@trainable=everything", "l2rw@l2rw-method=fast"])
def test_names_among_the_settings_of_a_method_are_checked(method):
    with pytest.raises(ValueError, match=f"^unknown {method.partition('@')[2].partition('=')[0]} '"):
        Config(methods=(method,)).check()


def test_a_class_without_labels_counts_as_one():
    assert criteria.class_sizes(torch.tensor([0, 0, 2]), 4) == [2, 1, 1, 1]


# ---------------------------------------------------------------------------------------------- methods made of them

SPLIT = data.draw(data.load_source("digits"), 0, per_class=12, imbalance="step", rho=4, noise="symmetric", rate=0.2)


def setup(text, **options):
    config = Config(epochs=10, **options)
    found = parse(text, config)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    made = methods.Setup(list(model.parameters()), found.config(config), SPLIT, 10, 0, found.extras)
    return model, methods.build(found.method, made)


def test_balanced_sampling_gives_each_class_its_share():
    _, method = setup("absgd+balanced")
    order = torch.arange(len(SPLIT.y)).repeat(50)
    shares = torch.bincount(SPLIT.y[method.choose(order)], minlength=10) / len(order)
    assert (shares - 0.1).abs().max() < 0.015
    assert not torch.equal(SPLIT.y.bincount() / len(SPLIT.y), torch.full((10,), 0.1))
    assert torch.equal(setup("absgd")[1].choose(order), order)


def test_sam_and_mixup_are_built_in():
    assert isinstance(setup("absgd+sam@sam_rho=0.2")[1].sam, SAM) and setup("absgd+sam@sam_rho=0.2")[1].sam.rho == 0.2
    assert isinstance(setup("absgd+mixup:focal")[1].loss.criterion, Mixup)
    assert setup("absgd")[1].sam is None


def test_sam_moves_the_normaliser_once_and_at_the_worst_point():
    model, method = setup("absgd+sam@gamma=0.3@warmup=0@lam=0.7")
    first = copy.deepcopy(model)
    x, y = SPLIT.x[:30], SPLIT.y[:30]
    method.step(model, x, y)
    loss = torch.nn.functional.cross_entropy(first(x), y, reduction="none")
    weights = torch.softmax(loss.detach() / 0.7, 0)  # of the first batch
    gradients = torch.autograd.grad((weights * loss).sum(), list(first.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(first.parameters(), gradients):
            p += 0.05 * g / norm
    there = torch.nn.functional.cross_entropy(first(x), y, reduction="none")
    expected = torch.logsumexp(there / 0.7, 0) - math.log(len(y))
    torch.testing.assert_close(method.robust.log_s, expected.detach())


@pytest.mark.parametrize("stage", stages.STAGES)
def test_stage_replaces_the_classifier_after_the_training(stage):
    config = Config(methods=(f"sgd+{stage}", "sgd"), per_class=30, imbalance="step", rho=10, epochs=3, seeds=1, model="mlp")
    staged, plain = train.runs(config)
    assert staged["method"] == f"sgd+{stage}" and staged["epochs"] == plain["epochs"] | {"lam": [None] * 3}
    assert staged["parameters"] != plain["parameters"]
    assert staged["accuracy"] != staged["epochs"]["accuracy"][-1]  # that of the training itself
    assert plain["accuracy"] == plain["epochs"]["accuracy"][-1]


@pytest.mark.parametrize(
    "text", ["absgd:focal+drw", "absgd+sam+mixup:vs+tla", "sgd+balanced", "l2rw:ldam@lr=0.01", "reference:sce", "term:la"]
)
def test_trains_on_digits(text):
    config = Config(methods=(text,), per_class=60, epochs=12, seeds=1, lam=5.0, lr=0.1 if "sam" in text else 0.05, warmup=0.2)
    (run,) = train.runs(config)
    assert run["accuracy"] > 60


def test_frozen_features_after_the_warm_up():
    config = Config(methods=("absgd@trainable=fc",), epochs=2, warmup=0.5, model="cnn")
    config.check()
    training = train.Training("absgd@trainable=fc", config, data.load_source("digits"), SPLIT, 0)
    states = [copy.deepcopy(training.model.state_dict()) for _ in training.epochs(lambda: None)]
    fresh = train.make_model("cnn", (1, 8, 8), 10, 0).state_dict()
    moved = [{name for name in fresh if not torch.equal(a[name], b[name])} for a, b in ((fresh, states[0]), (*states,))]
    assert moved[0] == set(fresh) and moved[1] == {"7.weight", "7.bias"}


def test_precision_and_memory_format_are_used():
    plain, half = (
        next(train.runs(Config(methods=("absgd",), per_class=20, epochs=2, seeds=1, model="cnn", **options)))
        for options in ({}, dict(amp="bf16", channels_last=True))
    )
    assert plain["parameters"] != half["parameters"]
    assert plain["train_loss"] == pytest.approx(half["train_loss"], rel=0.05)
    assert Placing("cpu").device == torch.device("cpu")


def test_class_counts_in_words():
    counted = lambda *counts: {"runs": [{"train_counts": list(counts)}] * 2}  # noqa: E731
    assert words.class_counts(counted(110, 11)) == "training images of each class: 110, 11"
    assert words.class_counts(counted(*[5] * 20, 30)) == "training images: 130 in 21 classes, 30 to 5 of a class"
