"""The recipes: what the files of the package hold, what is refused in a file of the user, and smaller experiments."""

import re

import pytest

from absgd_fast.experiments import data, models, recipes, spec, train
from absgd_fast.experiments.config import Config
from absgd_fast.experiments.resnets import TORCHVISION

OURS = (
    "absgd-gamma absgd-lambda absgd-table1 absgd-table2 absgd-table3 absgd-table4 absgd-table5 absgd-table6 digits-gamma "
    "digits-imbalance digits-l2rw digits-lambda digits-noise digits-vs fashion-gamma fashion-imbalance fashion-l2rw "
    "fashion-lambda fashion-noise fashion-vs l2rw-fig2 l2rw-table1 l2rw-table2 vs-table1"
)
SMALL = """
title = "Small"
[settings]
epochs = 10
lr_steps = [0.5]
[methods]
"SGD" = "sgd:ce"
"ABSGD" = "absgd:ce@lam=5"
[cells.lt-10]
title = "LT 10"
settings = { rho = 10, imbalance = "lt" }
[cells.lt-100]
title = "LT 100"
settings = { rho = 100, imbalance = "lt", epochs = 20 }
methods = { "ABSGD" = "absgd:ce@lam=1" }
reported = { "SGD" = [71.75, 0.75], "META" = 76 }
"""


@pytest.fixture
def recipe_of(tmp_path):
    """A function that loads a recipe from its text."""

    def load(text):
        (tmp_path / "mine.toml").write_text(text)
        return recipes.load(str(tmp_path / "mine.toml"))

    return load


def cells_of(name):
    return recipes.load(name).cells


# ------------------------------------------------------------------------------------------------ our recipes


def test_names():
    assert recipes.names() == tuple(OURS.split())


@pytest.mark.parametrize("name", OURS.split())
def test_ours_can_be_trained(name):
    recipe = recipes.load(name)
    assert recipe.name == name and recipe.title and recipe.source and recipe.cells and recipe.notes
    for key, cell in recipe.cells.items():
        config = cell.config(data_root="data")
        assert cell.name == key and cell.title and config.model in models.MODELS and config.dataset in data.DATASETS
        assert config.seeds == (recipe.seeds_reported or config.seeds)  # as many runs as the paper has
        assert config.methods == tuple(cell.methods.values())
        # torchvision may be missing; its networks take images of any size
        cell.config(data_root="data", model="linear" if config.model in TORCHVISION else config.model).check()
        for text in config.methods:
            assert spec.parse(text, config).text == text
        assert set(cell.reported) & set(cell.methods) or not cell.reported


@pytest.mark.parametrize("name", OURS.split())
def test_reported_numbers_are_percentages(name):
    for cell in cells_of(name).values():
        for row, (mean, deviation) in cell.reported.items():
            assert 5 < mean < 95, row
            assert deviation is None or 0 <= deviation < 5, row


# Rows whose first is at least the second in every cell where both are reported, apart from some; the papers say so in bold.
CLAIMS = [
    ("absgd-table1", "ABSGD (CE)", "SGD (CE)", ()),
    ("absgd-table1", "ABSGD (Focal)", "SGD (Focal)", ()),
    ("absgd-table2", "ABSGD (CB-CE)", "SGD (CB-CE)", ()),
    ("absgd-table2", "ABSGD (CB-CE)", "META (CB-CE)", ("cifar10-lt-10",)),
    ("absgd-table2", "ABSGD (CB-Focal)", "SGD (CB-Focal)", ()),
    ("absgd-table2", "ABSGD (CB-Focal)", "META (CB-Focal)", ("cifar100-lt-100", "cifar100-lt-10")),
    ("absgd-table2", "ABSGD (CB-LDAM)", "SGD (CB-LDAM)", ("cifar100-step-10",)),
    ("absgd-table2", "ABSGD (CB-LDAM)", "META (CB-LDAM)", ()),
    ("absgd-table2", "SGD (CB-LDAM)", "SGD (LDAM)", ()),
    ("absgd-table3", "ABSGD", "META", ()),
    ("absgd-table4", "ABSGD", "tau-normalized", ()),
    ("absgd-table5", "ABSGD (CB-CE)", "tau-normalized (CE)", ()),
    ("absgd-table6", "ABSGD (SCE)", "EG (SCE)", ()),
    ("absgd-table6", "EG (SCE)", "SGD (SCE)", ()),
    ("absgd-table6", "SGD (SCE)", "SGD (CE)", ()),
    ("l2rw-table1", "Ours (L2RW)", "Random", ()),
    ("l2rw-table1", "Random", "Baseline", ()),
    ("l2rw-table2", "Ours (L2RW)", "S-Model + Conf + ES + FT", ()),
    ("vs-table1", "VS+TLA+ADRW", "VS+TLA+DRW", ()),
    ("vs-table1", "VS+TLA+DRW", "VS+DRW", ()),
    ("vs-table1", "CE+ADRW", "CE+DRW", ()),
    ("vs-table1", "LDAM+ADRW", "LDAM+DRW", ()),
    ("vs-table1", "VS+TLA+ADRW with SAM", "VS+TLA+ADRW", ()),
    ("vs-table1", "VS+TLA+ADRW with SAM", "VS with SAM", ()),
]


@pytest.mark.parametrize("name,better,worse,apart", CLAIMS)
def test_what_the_papers_claim(name, better, worse, apart):
    pairs = {key: (cell.reported[better][0], cell.reported[worse][0]) for key, cell in cells_of(name).items()
             if better in cell.reported and worse in cell.reported}  # fmt: skip
    assert pairs and {key for key, (one, other) in pairs.items() if one < other} == set(apart)


def test_the_numbers_of_three_cells():
    one = cells_of("absgd-table1")["cifar10-step-100"]
    assert one.reported == {
        "SGD (CE)": (63.12, 0.63),
        "ABSGD (CE)": (66.24, 0.35),
        "SGD (Focal)": (63.31, 0.61),
        "ABSGD (Focal)": (65.03, 0.33),
    }
    vs = cells_of("vs-table1")
    rows = [vs[name].reported["VS+TLA+ADRW"] for name in ("cifar10-lt-100", "cifar10-step-100", "cifar100-lt-100")]
    assert rows == [(81.1, 0.2), (80.9, 0.2), (43.4, 0.6)]
    assert cells_of("l2rw-table1")["cifar10"].reported["Ours (L2RW)"] == (86.92, 0.19)


def test_stated_hyperparameters():
    """The epochs where something changes, and the numbers of training images, as the papers state them."""
    table1 = cells_of("absgd-table1")["cifar10-lt-100"].config()
    assert (table1.switch, [table1.epochs * step for step in table1.lr_steps], table1.lr_factor) == (160, [160, 180], 0.01)
    table6 = cells_of("absgd-table6")["cifar10-symmetric-0.4"].config()
    assert ([round(table6.epochs * step) for step in table6.lr_steps], table6.lr_factor, table6.batch_size) == (
        [40, 80],
        0.1,
        128,
    )
    assert [cells_of(f"absgd-table{t}")[c].config().switch for t, c in ((3, "resnet50"), (4, "resnet152"), (5, "resnet50"))] == [
        90,
        90,
        200,
    ]
    vs = cells_of("vs-table1")["cifar100-lt-100"].config()
    assert (vs.epochs * vs.drw_start, vs.lr_factor, vs.weight_decay) == (160, 0.1, 2e-4)
    for cell in cells_of("l2rw-fig2").values():
        config = cell.config()
        counts = data.class_counts(config.per_class, 2, config.imbalance, config.rho)
        assert sum(counts) == 5000 and config.epochs * 5000 / config.batch_size == 8000, cell.name
    for name, steps in (("l2rw-table1", 60_000), ("l2rw-table2", 80_000)):
        for dataset, classes in (("cifar10", 10), ("cifar100", 100)):
            config = cells_of(name)[dataset].config()
            assert config.per_class * classes == 45_000
            assert abs(config.epochs * 45_000 / config.batch_size - steps) < 450  # less than an epoch
            assert config.clean * classes == (1000 if name == "l2rw-table1" else 10 * classes)


ON_DIGITS = [
    ("digits-noise", "asymmetric-0.3", 550),
    ("digits-imbalance", "step-100", 280),
    ("digits-gamma", "symmetric-0.4", 550),
    ("digits-lambda", "step-100", 280),
    ("digits-l2rw", "10-to-1", 55),
    ("digits-l2rw", "background", 550),
    ("digits-vs", "step-10", 300),
]


@pytest.mark.parametrize("name,cell,images", ON_DIGITS)
def test_every_method_of_digits_trains(name, cell, images):
    """Half of the training images, and one epoch."""
    cell = cells_of(name)[cell]
    config = cell.config()
    n_max = data.load_source(config.dataset).n_max
    settings = recipes.scaled(cell.settings, 0.5, 0.01, source_n_max=n_max)
    done = list(train.runs(cell.config(**settings | {"seeds": 1})))
    assert {run["method"] for run in done} == set(cell.methods.values())
    assert all(sum(run["train_counts"]) == images for run in done)


def test_recipes_on_other_data_have_the_rows_of_the_paper():
    """Those of ablations, L2RW and VS on digits and Fashion-MNIST compare what the paper compares, and perhaps more."""
    for kind, of_paper in (("gamma", "absgd-gamma"), ("lambda", "absgd-lambda"), ("vs", "vs-table1"), ("l2rw", "l2rw-table1")):
        rows = {row for cell in cells_of(of_paper).values() for row in cell.methods}
        for on in ("digits", "fashion"):
            assert all(rows <= set(cell.methods) for cell in cells_of(f"{on}-{kind}").values())


# ------------------------------------------------------------------------------------------------ reading a file


def test_cells_have_the_settings_and_rows_of_the_recipe(recipe_of):
    recipe = recipe_of(SMALL)
    assert (recipe.name, recipe.title, recipe.source, recipe.metric, recipe.notes) == ("mine", "Small", "", "accuracy", ())
    ten, hundred = recipe.cells.values()
    assert ten.settings == {"epochs": 10, "lr_steps": (0.5,), "rho": 10.0, "imbalance": "lt"} and isinstance(
        ten.settings["rho"], float
    )
    assert ten.methods == {"SGD": "sgd:ce", "ABSGD": "absgd:ce@lam=5"} and ten.reported == {}
    assert hundred.settings["epochs"] == 20 and hundred.methods == {"SGD": "sgd:ce", "ABSGD": "absgd:ce@lam=1"}
    assert hundred.reported == {"SGD": (71.75, 0.75), "META": (76.0, None)}
    config = hundred.config(seeds=2)
    assert config == Config(epochs=20, lr_steps=(0.5,), rho=100.0, imbalance="lt", seeds=2, methods=("sgd:ce", "absgd:ce@lam=1"))


def test_a_row_that_is_left_out(recipe_of):
    cell = recipe_of(SMALL.replace('"absgd:ce@lam=1"', '""')).cells["lt-100"]
    assert cell.methods == {"SGD": "sgd:ce"} and cell.config().methods == ("sgd:ce",)


# old text of SMALL, new text, the message after "recipe PATH: ", or its beginning if it ends in …
BAD = [
    (
        'title = "Small"',
        'titel = "Small"',
        "unknown key 'titel'; did you mean title? use one of title, source, metric, …",
    ),
    ('title = "Small"', "", "it has no title; expected title, methods, cells"),
    ('title = "Small"', "title = 3", "title: expected a text, got 3"),
    ('title = "Small"', 'title = "a"\nmetric = "recall"', "unknown metric 'recall'; use one of accuracy, balanced_accuracy"),
    ('title = "Small"', 'title = "a"\nnotes = ["b", 3]', "notes: expected a list of texts, got ['b', 3]"),
    ('title = "Small"', 'title = "a"\nnotes = "b"', "notes: expected a list, got 'b'"),
    ('title = "Small"', 'title = "a"\nseeds_reported = 0', "seeds_reported: got 0, expected at least 1"),
    ('title = "Small"', 'title = "a"\nseeds_reported = true', "seeds_reported: expected a whole number, got True"),
    ('title = "Small"', 'title = "Small', "it is not TOML: …"),
    ("epochs = 10\n", "epoch = 10\n", "[settings]: unknown setting 'epoch'; did you mean epochs? use one of dataset, …"),
    ("epochs = 10\n", "epochs = 1.5\n", "[settings] epochs: expected a whole number, got 1.5"),
    ("epochs = 10\n", "epochs = true\n", "[settings] epochs: expected a whole number, got True"),
    ("epochs = 10\n", 'lr = "fast"\n', "[settings] lr: expected a number, got 'fast'"),
    ("epochs = 10\n", "model = 1\n", "[settings] model: expected a text, got 1"),
    ("epochs = 10\n", "audit = 1\n", "[settings] audit: expected true or false, got 1"),
    ("epochs = 10\n", "per_class = 1.0\n", "[settings] per_class: expected a whole number, got 1.0"),
    ("lr_steps = [0.5]", 'lr_steps = [0.5, "a"]', "[settings] lr_steps: expected a list of numbers, got [0.5, 'a']"),
    ("lr_steps = [0.5]", "lr_steps = 0.5", "[settings] lr_steps: expected a list of numbers, got 0.5"),
    (
        "epochs = 10\n",
        'methods = ["sgd"]\n',
        "[settings]: methods are no setting of a recipe; give each of them a row in [methods]",
    ),
    ('"SGD" = "sgd:ce"', '"SGD" = 1', "[methods] 'SGD': expected a specification such as \"absgd:ce@lam=5\", got 1"),
    ('"SGD" = "sgd:ce"', '"SGD" = ""', '[methods]: only a cell can leave a row out with ""'),
    ('"SGD" = "sgd:ce"', '"SGD" = "sdg:ce"', "[cells.lt-10] 'SGD': unknown method 'sdg' in 'sdg:ce'; did you mean sgd? …"),
    (
        '"SGD" = "sgd:ce"',
        '"SGD" = "sgd:ce@lamb=1"',
        "[cells.lt-10] 'SGD': unknown setting of a method 'lamb' in 'sgd:ce@lamb=1'; did you mean lam? …",
    ),
    (
        '"SGD" = "sgd:ce"',
        '"SGD" = "absgd:ce@lam=5"',
        "[cells.lt-10]: 'SGD' and 'ABSGD' are both 'absgd:ce@lam=5'; results are named by it, so give one of them",
    ),
    ('title = "LT 10"\n', "", "[cells.lt-10]: it has no title; expected title"),
    ("[cells.lt-10]", '[cells."lt,10"]', "[cells.lt,10]: the name of a cell has no comma, which separates names"),
    ("[cells.lt-10]\n", "[cells]\nb = 3\n[cells.lt-10]\n", "[cells.b]: expected a table, got 3"),
    (
        "settings = { rho = 10,",
        "setings = { rho = 10,",
        "[cells.lt-10]: unknown key 'setings'; did you mean settings? use one of title, settings, methods, reported",
    ),
    (
        "settings = { rho = 10,",
        "settings = { rho = nan, roh = 1,",
        "[cells.lt-10.settings]: unknown setting 'roh'; did you mean rho? use one of dataset, …",
    ),
    (
        '{ "ABSGD" = "absgd',
        '{ "ABSDG" = "absgd',
        "[cells.lt-100.methods]: unknown row 'ABSDG'; did you mean ABSGD? use one of SGD, ABSGD, which stand in [methods]",
    ),
    ('{ "ABSGD" = "absgd:ce@lam=1" }', '{ "ABSGD" = "", "SGD" = "" }', "[cells.lt-100]: all rows are left out"),
    ("[71.75, 0.75]", '"71.75"', "[cells.lt-100.reported] 'SGD': expected a number, or [mean, deviation], got '71.75'"),
    ("[71.75, 0.75]", "[]", "[cells.lt-100.reported] 'SGD': expected a number, or [mean, deviation], got []"),
    ("[71.75, 0.75]", "[1, 2, 3]", "[cells.lt-100.reported] 'SGD': expected a number, or [mean, deviation], got [1, 2, 3]"),
    ("[71.75, 0.75]", "nan", "[cells.lt-100.reported] 'SGD': expected a number, or [mean, deviation], got nan"),
]


@pytest.mark.parametrize("old,new,message", BAD, ids=[f"{i}: {message[:40]}" for i, (_, _, message) in enumerate(BAD)])
def test_a_mistake_is_one_line(recipe_of, tmp_path, old, new, message):
    assert SMALL.count(old) == 1
    # a message that ends in … goes on in the same line
    expected = re.escape(f"recipe {tmp_path / 'mine.toml'}: {message}").replace("…", ".*")
    with pytest.raises(ValueError, match=rf"\A{expected}\Z"):
        recipe_of(SMALL.replace(old, new))


@pytest.mark.parametrize("part", ["methods", "cells"])
def test_an_empty_recipe(recipe_of, part):
    text = 'title = "a"\n' + {"methods": '[methods]\n[cells.a]\ntitle = "b"', "cells": '[methods]\na = "sgd"\n[cells]'}[part]
    with pytest.raises(ValueError, match=rf"\[{part}\] is empty; a recipe has at least one"):
        recipe_of(text)


def test_toml_errors_say_where(recipe_of):
    with pytest.raises(ValueError, match=r"it is not TOML: .*line 3"):
        recipe_of('title = "a"\n\nsource\n[methods]')


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b'title = "\xff"')
    with pytest.raises(ValueError, match="it is not a text in UTF-8 .*at byte 9"):
        recipes.load(str(tmp_path / "mine.toml"))


def test_unknown_recipes(tmp_path):
    near = f"did you mean absgd-table1? use one of {', '.join(OURS.split())}, or the path of a file that ends in .toml"
    with pytest.raises(ValueError, match=f"^unknown recipe 'absgd-tabel1'; {re.escape(near)}$"):
        recipes.load("absgd-tabel1")
    with pytest.raises(FileNotFoundError, match=r"^no recipe file nowhere/mine\.toml; give the path"):
        recipes.load("nowhere/mine.toml")


# ------------------------------------------------------------------------------------------------ cells and scale

CHOICES = [
    ("lt-10", ["lt-10"]),  # the whole name, although lt-100 begins like it
    ("lt-100", ["lt-100"]),
    ("step", ["step-10"]),
    (" step , lt-10,step-10", ["step-10", "lt-10"]),
]


@pytest.fixture
def three(recipe_of):
    return recipe_of(SMALL + '[cells.step-10]\ntitle = "c"\n')


@pytest.mark.parametrize("text,names", CHOICES)
def test_choose(three, text, names):
    assert three.choose(text) == tuple(three.cells[name] for name in names)


@pytest.mark.parametrize(
    "text,message",
    [
        ("lt", "recipe mine: 'lt' begins 2 cells: lt-10, lt-100; name one of them"),
        ("setp-10", "recipe mine: unknown cell 'setp-10'; did you mean step-10? use one of lt-10, lt-100, step-10"),
        (" ,", "recipe mine: no cell is named; use some of lt-10, lt-100, step-10"),
    ],
)
def test_choose_refuses(three, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        three.choose(text)


@pytest.mark.parametrize(
    "text,shares",
    [
        ("0.1", (0.1, 0.1)),
        ("1", (1, 1)),
        ("data=0.1,epochs=0.2", (0.1, 0.2)),
        ("epochs = 0.5", (1, 0.5)),
        ("data=.25", (0.25, 1)),
    ],
)
def test_parse_scale(text, shares):
    assert recipes.parse_scale(text) == shares


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "-1", "nan", "a", "data", "data=", "data=0", "dat=1", "data=1,data=1", "0.1,0.2", "0.1,data=1"]
)
def test_parse_scale_refuses(text):
    message = f"scale: got {text!r}, expected a share in (0, 1] such as 0.1, or data=0.1,epochs=0.2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        recipes.parse_scale(text)


SCALED = [
    ({"epochs": 200, "lr": 0.1}, 1, 1, {"epochs": 200, "lr": 0.1}),
    ({"epochs": 200}, 0.1, 1, {"epochs": 200, "per_class": 500}),
    ({"epochs": 200, "per_class": 4500}, 0.1, 1, {"epochs": 200, "per_class": 450}),  # of the images that the recipe takes
    ({"epochs": 25, "batch_size": 64}, 1, 0.5, {"epochs": 12, "batch_size": 64, "stage_epochs": 5}),
    ({"stage_epochs": 4}, 1e-9, 1e-9, {"epochs": 1, "stage_epochs": 1, "per_class": 1}),
    ({}, 1, 0.5, {"epochs": 60, "stage_epochs": 5}),  # half of what Config has
]


@pytest.mark.parametrize(
    "settings, expected", [({"epochs": 9}, {"epochs": 9, "data_share": 0.1}), ({"per_class": 50}, {"per_class": 5})]
)
def test_scaled_keeps_a_natural_imbalance(settings, expected):
    assert recipes.scaled(settings, 0.1, 1, 5, natural=True) == expected


@pytest.mark.parametrize("settings,share,epochs,expected", SCALED)
def test_scaled(settings, share, epochs, expected):
    before = dict(settings)
    assert recipes.scaled(settings, share, epochs, 5000) == expected and settings == before
