"""experiments/effects.py: the table of readers against trainings; and settings without effect are refused."""

import copy
import importlib.util
import re
from dataclasses import fields, replace

import pytest
from test_cli import in_an_empty_folder, refused  # noqa: F401 (a fixture)
from test_recipe_command import RECIPE, recipe  # noqa: F401 (a fixture)

from absgd_fast.experiments import criteria, data, effects, methods, spec, train
from absgd_fast.experiments.train import Config

# Every METHOD, EXTRA, LOSS and SCHEDULE, in a specification
SPECS = (
    {name: name for name in methods.METHODS}
    | {name: f"sgd+{name}" for name in methods.EXTRAS}
    | {name: f"sgd:{name}" for name in criteria.LOSSES if name != "ce"}
    | {"drw": "sgd:ce+drw", "adrw": "sgd:ce+adrw", "tla": "sgd:vs+tla"}
)
# Another value of each setting that a method may read. The first one that changes the training will do.
OTHER = {
    "lam": -2.0,
    "gamma": 0.3,
    "mix": 0.5,
    "warmup": 2 / 3,
    "share": 0.5,
    "sign": -1,
    "beta": 0.25,
    "reg": 1.0,
    "chi2_rho": 2.0,
    "eta": 0.5,
    "clean": 2,
    "l2rw_method": "finite_difference",
    "focal_gamma": 0.5,
    "gce_q": 0.2,
    "gce_k": 0.15,
    "sce_alpha": 2.0,
    "sce_beta": 0.1,
    "cb_beta": 0.5,
    "ldam_margin": 0.1,
    "ldam_scale": 5.0,
    "vs_gamma": 1.0,
    "vs_tau": 0.2,
    "nu": 0.2,
    "drw_start": 2 / 3,
    "sam_rho": 0.5,
    "mixup_alpha": 0.2,
    "tau": 0.3,
    "stage_epochs": 1,
    "stage_lr": 0.01,
}
SMALL = Config(
    model="linear",
    epochs=3,
    seeds=1,
    per_class=8,
    imbalance="lt",
    rho=4.0,
    noise="symmetric",
    batch_size=16,
    warmup=1 / 3,
    drw_start=1 / 3,
    clean=1,
    stage_epochs=2,
    test_images=10,
    gce_k=0.05,
)


@pytest.fixture(scope="module")
def digits():
    return data.load_source("digits")


def test_every_setting_is_known():
    """Each setting that a method can read names its readers, and they exist."""
    known = {field.name for field in fields(Config)}
    assert set(effects.READERS) | set(effects._NEEDS) <= known
    words = {*methods.METHODS, *methods.EXTRAS, *criteria.LOSSES, *criteria.SCHEDULES}
    assert {reader for readers in effects.READERS.values() for reader in readers} <= words
    assert set(OTHER) == set(effects.READERS) - {"loss"}


@pytest.mark.parametrize("word", SPECS)
def test_readers_are_those_that_train_otherwise(word, digits):
    """A method ends with other parameters or another accuracy if a setting that it reads has another value, and only then."""
    if word == "reference" and importlib.util.find_spec("absgd") is None:
        pytest.skip("the reference package absgd is not installed")

    def trained(**changes):
        (run,) = train.runs(replace(SMALL, methods=(SPECS[word],), **changes), digits)
        return run["parameters"], run["accuracy"]

    before, words = trained(), effects.words_of(SPECS[word])
    tried = OTHER.keys() - ({"mix"} if word == "reference" else {})  # the package knows mix = 0 only
    found = {name for name in tried if trained(**{name: OTHER[name]}) != before}
    assert found == {name for name in tried if words & set(effects.READERS[name])}


@pytest.mark.parametrize(
    "text, config, words",
    [
        ("sgd@lam=5", {}, "method 'sgd@lam=5': lam changes nothing here; it is a setting of absgd, ramp, reference, term, eg"),
        ("absgd@share=0.5", {}, "share changes nothing here; it is a setting of targetess"),
        ("targetess@gamma=0.5", {}, "gamma changes nothing here; it is a setting of absgd, ramp, reference"),
        ("absgd:gce@sce-alpha=0.5", {}, "sce_alpha changes nothing here; it is a setting of sce"),
        ("absgd@sce-alpha=0.5", {}, "sce_alpha changes nothing here"),
        ("sgd:ce@cb_beta=0.9", {}, "cb_beta changes nothing here; it is a setting of cb-ce, cb-focal, cb-ldam, drw"),
        ("sgd@warmup=0.5", {}, "warmup changes nothing here"),
        ("sgd@trainable=all@warmup=0.5", {"trainable": "fc"}, "warmup changes nothing here"),
        ("sgd@lr-schedule=cosine@lr-steps=0.5", {}, "lr_steps changes nothing here; it needs --lr-schedule steps"),
        ("sgd@lr-factor=0.5", {"lr_schedule": "cosine"}, "lr_factor changes nothing here; it needs --lr-schedule steps"),
    ],
)
def test_a_specification_with_a_setting_without_effect(text, config, words):
    """It is refused, but not where a training goes on that was begun before it was refused."""
    config = Config(methods=(text,), **config)
    with pytest.raises(ValueError, match=re.escape(words)):
        config.check()
    config.check(resumed=True)


@pytest.mark.parametrize(
    "text, config",
    [
        ("sgd@warmup=0.5", {"trainable": "fc"}),  # what is trained changes after the warm-up
        ("sgd@trainable=fc@warmup=0.5", {}),
        ("sgd@sce_alpha=0.5", {"loss": "sce"}),
        ("sgd:cb-focal@cb_beta=0.9@focal_gamma=1", {}),
        ("sgd:focal+drw@cb_beta=0.9@drw_start=0.5", {}),
        ("sgd@lr-steps=0.5", {}),
        ("sgd@lr-schedule=steps@lr-steps=0.5", {"lr_schedule": "cosine"}),
    ],
)
def test_a_specification_whose_settings_are_read(text, config):
    Config(methods=(text,), **config).check()


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize(
    "options, words",
    [
        (["--noise-rate", "0.2"], "noise-rate: got 0.2, which changes nothing here; it needs --noise symmetric, asymmetric or"),
        (["--rho", "10"], "rho: got 10.0, which changes nothing here; it needs --imbalance lt or step"),
        (
            ["--noise", "symmetric", "--background", "3"],
            "background: got 3, which changes nothing here; it needs --noise background",
        ),
        (["--lr-schedule", "cosine", "--lr-factor", "0.5"], "lr-factor: got 0.5, which changes nothing here"),
        (["--image-size", "64"], "image-size: got 64, which changes nothing here; it needs --dataset folder or imagenet-lt"),
        (["--workers", "3"], "workers: got 3, which changes nothing here"),
        (["--data-root", "pictures"], "data-root: got pictures, which changes nothing here; it needs a --dataset that is read"),
        (["--no-digests"], "digests: got no, which changes nothing here; it needs a --dataset that is read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_option_without_effect(command, options, words, capsys, in_an_empty_folder):
    assert words in refused(capsys, command, *options)
    assert list(in_an_empty_folder.iterdir()) == []


OWN = "each method that reads it has its own"


@pytest.mark.parametrize(
    "options, methods, words",
    [
        (["--lam", "3"], "sgd,absgd@lam=2,ramp@lam=-1", f"lam: got 3.0, which changes nothing here; {OWN}"),
        (["--loss", "sce"], "sgd:ce,absgd:gce", f"loss: got sce, which changes nothing here; {OWN}"),
        (["--lr", "0.5"], "sgd@lr=1,absgd@lr=2", f"lr: got 0.5, which changes nothing here; {OWN}"),
        (["--lr-factor", "0.5"], "sgd@lr-schedule=cosine,absgd@lr-schedule=cosine", "lr-factor: got 0.5, which changes nothing"),
        (["--lam", "3"], "sgd,absgd@lam=2,ramp", None),
        (["--lam", "3", "--share", "0.5", "--gce-q", "0.3"], "sgd", None),  # of methods and losses that are not there
        (["--loss", "sce"], "sgd:ce,absgd", None),
        (["--lr-schedule", "cosine", "--lr-steps", "0.5"], "sgd@lr-schedule=steps,absgd", None),
    ],
)
def test_an_option_that_each_method_overrides(options, methods, words, capsys):
    argv = ["train", "--methods", methods, *options]
    if words is None:  # it stands; what is refused then is the model
        words, argv = "unknown model 'x'", [*argv, "--model", "x"]
    assert words in refused(capsys, *argv)


def test_a_training_that_was_begun_before_goes_on(digits, monkeypatch):
    """From a checkpoint with a setting that changes nothing, which is refused at the beginning only."""
    config, states = replace(SMALL, methods=("sgd@lam=5",)), []
    with pytest.raises(ValueError, match="lam changes nothing here"):
        next(train.runs(config, digits))
    with monkeypatch.context() as earlier:
        earlier.setattr(spec, "check_effects", lambda one, config: None)
        (whole,) = train.runs(config, digits, keep=lambda take, finished: states.append(copy.deepcopy(take())))
    (continued,) = train.runs(config, digits, state=states[3])
    assert states[3]["running"] and continued["parameters"] == whole["parameters"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            'model = "linear"',
            'model = "linear"\nrho = 10',
            "recipe two.toml: [settings]: rho = 10.0 changes nothing here; it needs --imbalance",
        ),
        (
            '"Digits"',
            '"Digits"\nsettings = { noise_rate = 0.2 }',
            "[cells.clean.settings]: noise_rate = 0.2 changes nothing here",
        ),
        ('model = "linear"', 'model = "linear"\nsce_alpha = 0.2\nlam = 3', f"[settings]: lam = 3.0 changes nothing here; {OWN}"),
        ('"sgd"', '"sgd@lam=2"', "clean: method 'sgd@lam=2': lam changes nothing here"),
    ],
)
def test_a_recipe_with_a_setting_without_effect(old, new, words, recipe, capsys):
    (recipe / "two.toml").write_text(RECIPE.replace(old, new, 1))
    assert words in refused(capsys, "train", "--recipe", "two.toml")


def test_an_option_of_a_recipe_needs_an_effect_in_one_cell(recipe, capsys):
    line = refused(capsys, "train", "--recipe", "two.toml", "--cell", "clean", "--noise-rate", "0.2")
    assert "noise-rate: got 0.2, which changes nothing here" in line
    assert "rho: got 10.0" in refused(capsys, "train", "--recipe", "two.toml", "--rho", "10")
    assert f"lam: got 3.0, which changes nothing here; {OWN}" in refused(capsys, "train", "--recipe", "two.toml", "--lam", "3")
    # "noisy" has wrong labels, so that the option stands; what is refused is the epochs
    line = refused(capsys, "train", "--recipe", "two.toml", "--noise-rate", "0.2", "--epochs", "0")
    assert "epochs: got 0" in line
