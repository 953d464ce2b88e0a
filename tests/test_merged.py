"""`absgd-fast report`: which runs are merged, the numbers by hand, the tables to the letter, and the page in a browser."""

import copy
import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from dataclasses import asdict, fields, replace

import pytest
from test_cli import in_an_empty_folder, refused  # noqa: F401 (a fixture)

from absgd_fast import __main__ as cli
from absgd_fast.experiments import effects, merged, merged_plots, merged_report, style, summary, svg, train
from absgd_fast.experiments.train import Config

CONFIG = Config(
    model="linear", per_class=10, noise="symmetric", noise_rate=0.2, epochs=2, warmup=0.5, seeds=3, methods=("sgd", "absgd")
)
NEW = ("ess", "lam", "log_s", "flipped_as_given", "flipped_as_true")  # series that an older results.json does not have


@pytest.fixture(scope="module")
def trained():
    """{(method, seed): run} of a real training, with all series."""
    return {(run["method"], run["seed"]): run for run in train.runs(CONFIG)}


def write(folder, trained, config=CONFIG, accuracies=None, recipe=None, change=lambda run: run):
    """Writes a results.json with the methods and seeds of `config`; accuracies: {method: [of each seed]}, of both kinds."""
    runs = []
    for method in config.methods:
        for seed in range(config.seeds):
            of = "sgd" if style.base_of(method) == "sgd" else "absgd"
            run = copy.deepcopy(trained[of, seed % CONFIG.seeds]) | {"method": method, "seed": seed}
            # other settings would have made other parameters
            run["parameters"] += f"{method} {sorted(asdict(config).items() - {('seeds', config.seeds)}, key=str)}" * (
                config != CONFIG
            )
            if accuracies:
                run |= dict.fromkeys(("accuracy", "balanced_accuracy"), accuracies[method][seed])
            runs.append(change(run))
    results = summary.collect(config, runs, command=["absgd-fast", "train"], threads=1)
    folder.mkdir(parents=True)
    (folder / merged.FILE).write_text(json.dumps(results | ({"recipe": recipe} if recipe else {})))
    return folder


def merge(*folders):
    return merged.merge(merged.find(folders))


# ------------------------------------------------------------------------------------------------ numbers


def test_numbers_by_hand(tmp_path, trained):
    config = replace(CONFIG, methods=("sgd", "absgd", "sgd:sce", "absgd:sce"))
    accuracies = {"sgd": [70, 72, 74], "absgd": [71, 75, 76], "sgd:sce": [80, 80, 80], "absgd:sce": [70, 90, 68]}
    (cell,) = merged.numbers(merge(write(tmp_path / "a", trained, config, accuracies))[0])["cells"]
    of = {method["method"]: method for method in cell["methods"]}
    assert list(of) == list(config.methods) and cell["metric"] == "balanced_accuracy"
    assert of["sgd"]["accuracy"] == {"mean": 72, "std": 2, "stderr": pytest.approx(2 / math.sqrt(3)), "n": 3}
    # 1, 3, 2
    assert of["absgd"]["to_sgd"] == {"mean": 2, "std": 1, "stderr": pytest.approx(1 / math.sqrt(3)), "n": 3, "verdict": "ahead"}
    assert of["absgd"]["to_baseline"] == of["absgd"]["to_sgd"] and of["absgd"]["baseline"] == "sgd"
    # −10, 10, −12 and 0, 18, −6
    assert of["absgd:sce"]["baseline"] == "sgd:sce" and of["absgd:sce"]["to_baseline"]["mean"] == -4
    assert of["absgd:sce"]["to_baseline"]["stderr"] == pytest.approx(math.sqrt((36 + 196 + 64) / 2 / 3))
    assert of["absgd:sce"]["to_baseline"]["verdict"] == "not told apart" and of["absgd:sce"]["to_sgd"]["mean"] == 4
    assert of["sgd"]["to_sgd"] is of["sgd"]["baseline"] is of["sgd:sce"]["to_baseline"] is None
    memorised = [trained["absgd", seed]["epochs"]["flipped_as_given"][-1] for seed in range(3)]
    assert of["absgd"]["flipped_as_given"]["mean"] == pytest.approx(sum(memorised) / 3)


@pytest.mark.parametrize(
    "mine, base, verdict",
    [
        ({0: 4, 1: 2}, {0: 1, 1: 1}, "not told apart"),  # 3, 1: mean 2, standard error 1
        ({0: 4.1, 1: 2.1}, {0: 1, 1: 1}, "ahead"),
        ({0: 1, 1: 1}, {0: 4.1, 1: 2.1}, "behind"),
        ({0: 1, 1: 1}, {0: 4, 1: 2}, "not told apart"),
        ({0: 3, 1: 3}, {0: 1, 1: 1}, "ahead"),  # no spread at all
        ({0: 3, 1: 3}, {0: 3, 1: 3}, "not told apart"),
        ({0: 9}, {0: 1, 1: 1}, "not told apart"),  # a single seed shows nothing
        ({0: 9, 2: None}, {0: 1, 1: 1, 2: 5}, "not told apart"),
        ({0: 9}, {1: 1}, None),
    ],
)
def test_verdict(mine, base, verdict):
    of = merged.difference(*({seed: {"accuracy": v} for seed, v in runs.items()} for runs in (mine, base)), "accuracy")
    assert (of and of["verdict"]) == verdict


@pytest.mark.parametrize(
    "name, names, baseline",
    [
        ("absgd", ["absgd", "sgd"], "sgd"),
        ("sgd", ["absgd", "sgd"], None),
        ("absgd:sce@lam=-1", ["sgd", "sgd:sce"], "sgd:sce"),
        ("absgd:sce", ["sgd", "sgd:ce+drw", "absgd"], None),
        ("absgd:vs+tla", ["sgd:vs", "sgd:vs+tla"], "sgd:vs+tla"),
        ("absgd:vs+tla", ["sgd:vs"], None),
        ("absgd+sam:vs", ["sgd:vs", "sgd+sam:vs", "sgd+mixup:vs"], "sgd+sam:vs"),
        ("absgd:vs", ["sgd+sam:vs"], None),  # that would be the difference of two things
        ("sgd+sam", ["sgd", "sgd+sam"], "sgd"),
        ("absgd@lr=0.05@lam=2", ["sgd", "sgd@lr=0.1", "sgd@lr=0.05"], "sgd@lr=0.05"),
        ("absgd:cb-ce", ["sgd:ce", "sgd", "sgd:cb-ce"], "sgd:cb-ce"),
    ],
)
def test_baseline(name, names, baseline):
    assert merged.baseline_of(name, names) == baseline == merged.baseline_of(name, names[::-1])


@pytest.mark.parametrize(
    "name, loss, expected",
    [
        ("sgd", "ce", "sgd"),
        ("sgd:ce", "sce", "sgd"),
        ("absgd@lam=-1.0", "sce+drw", "absgd:sce+drw@lam=-1"),
        ("absgd+sam:vs+tla@vs-gamma=0.30", "ce", "absgd+sam:vs+tla@vs_gamma=0.3"),
    ],
)
def test_canonical(name, loss, expected):
    assert merged.canonical(name, loss) == expected == merged.canonical(expected, loss if ":" not in name else "ce")


# ------------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize(
    "first, second, names",
    [
        ({}, {"epochs": 3}, None),  # None: another cell
        ({}, {"lr": 0.2}, None),
        ({}, {"noise_rate": 0.3}, None),
        ({}, {"per_class": 11}, None),
        ({}, {"noise": "asymmetric"}, None),
        ({"trainable": "fc"}, {"trainable": "fc", "warmup": 0.0}, None),
        ({"noise": "background"}, {"noise": "background", "background": 1}, None),
        ({}, {"noise": "uniform"}, ["sgd", "absgd"]),
        ({}, {"rho": 5.0}, ["sgd", "absgd"]),  # without imbalance it says nothing
        ({}, {"background": 1}, ["sgd", "absgd"]),
        ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "lr_steps": (0.5,)}, ["sgd", "absgd"]),
        ({}, {"device": "cpu", "workers": 0, "audit": True}, ["sgd", "absgd"]),
        ({}, {"lam": -2.0}, ["sgd", "absgd@lam=-0.5", "absgd@lam=-2"]),
        ({}, {"warmup": 0.0, "lam": 1.0}, ["sgd", "absgd@lam=-0.5@warmup=0.5", "absgd@lam=1@warmup=0"]),
        ({}, {"lam": math.inf}, ["sgd", "absgd@lam=-0.5", "absgd@lam=inf"]),
        ({}, {"beta": 0.1, "nu": 2.0, "tau": 0.5, "share": 0.5}, ["sgd", "absgd"]),  # nobody here reads them
        ({}, {"loss": "focal", "focal_gamma": 1.0}, ["sgd", "absgd", "sgd:focal", "absgd:focal"]),
        ({}, {"methods": ("sgd", "absgd@lam=-1"), "lam": 3.0}, ["sgd", "absgd", "absgd@lam=-1"]),
    ],
    ids=str,
)
def test_cells_and_names(tmp_path, trained, first, second, names):
    """Whether two trainings are one cell, and what their methods are called. All second seeds are others, so none meets."""

    def later(run):
        return run | {"seed": run["seed"] + 3}

    write(tmp_path / "1", trained, replace(CONFIG, **first))
    write(tmp_path / "2", trained, replace(CONFIG, **second), change=later)
    cells, twice = merge(tmp_path)
    assert twice == 0 and len(cells) == (2 if names is None else 1)
    if names:
        assert list(cells[0].runs_of) == names and sum(map(len, cells[0].runs_of.values())) == 12
    else:
        assert len({cell.title for cell in cells}) == 2 and [list(cell.runs_of) for cell in cells] == [["sgd", "absgd"]] * 2


def test_free_settings_are_known():
    known = {field.name for field in fields(Config)}
    assert known >= merged._FREE and not merged._FREE & set(effects.READERS)


def test_twice_counts_once(tmp_path, trained):
    write(tmp_path / "a", trained)
    write(
        tmp_path / "b",
        trained,
        replace(CONFIG, seeds=2),
        change=lambda run: run | {"parameters": trained[run["method"], run["seed"]]["parameters"]},
    )
    cells, twice = merge(tmp_path, tmp_path / "a", tmp_path / "b")
    assert len(cells) == 1 and twice == 4 and {len(runs) for runs in cells[0].runs_of.values()} == {3}
    results = merged.numbers(cells, twice)
    assert results["runs"] == 6 and "4 runs were found twice" in merged_report.notes(cells, results)[0]


def test_same_training_with_other_parameters(tmp_path, trained, capsys):
    write(tmp_path / "a", trained)
    write(
        tmp_path / "b",
        trained,
        change=lambda run: run | {"parameters": "other" if run["method"] == "absgd" else run["parameters"]},
    )
    line = refused(capsys, "report", tmp_path)
    assert "absgd on seed 0 was trained twice" in line and f"{tmp_path / 'a'} and {tmp_path / 'b'}" in line
    assert not (tmp_path / "absgd-report").exists()


def test_without_parameters_the_results_decide(tmp_path, trained):
    none = {"parameters": None}
    write(tmp_path / "a", trained, change=lambda run: run | none)
    write(tmp_path / "b", trained, change=lambda run: run | none | {"seconds": 99.0})
    assert merge(tmp_path)[1] == 6
    write(tmp_path / "c", trained, change=lambda run: run | none | {"accuracy": 1.0})
    with pytest.raises(ValueError, match="trained twice"):
        merge(tmp_path)


def recipe(cell, order, **more):
    about = {
        "name": "table",
        "cell": cell,
        "order": order,
        "title": f"Cell {cell}",
        "recipe_title": "A table",
        "source": "Q 2023",
    }
    rows = {"sgd": "SGD", "absgd": "ABSGD"}
    return about | {"metric": "accuracy", "rows": rows, "reported": {"SGD": [70.0, 0.5], "META": [1.25, None]}} | more


def test_cells_of_a_recipe(tmp_path, trained):
    """Their order and titles are the recipe's. A training without a recipe joins the cell of its settings, or comes last."""
    later = replace(CONFIG, noise_rate=0.4)
    write(tmp_path / "a", trained, later, recipe=recipe("z", 1))
    write(tmp_path / "b", trained, recipe=recipe("y", 0))
    write(tmp_path / "0", trained, change=lambda run: run | {"seed": run["seed"] + 3})
    write(tmp_path / "1", trained, replace(CONFIG, noise="none"))
    cells, _ = merge(tmp_path)
    assert [cell.title for cell in cells] == ["Cell y", "Cell z", "digits, 10 images of each class, linear"]
    assert list(cells[0].runs_of["absgd"]) == [0, 1, 2, 3, 4, 5] and cells[0].rows == {"sgd": "SGD", "absgd": "ABSGD"}
    results = merged.numbers(cells)
    assert [(title, len(of)) for title, _, of in merged_report.groups(results)] == [("A table", 2), ("Other trainings", 1)]


# ------------------------------------------------------------------------------------------------ Markdown


MARKDOWN = """## A table

| method | Cell y | Cell z \\| 2 |
| --- | ---: | ---: |
| SGD | 72.00 ± 1.15 | 60.00 |
| ABSGD | **74.00 ± 1.53** | 50.00 |
| absgd:sce | – | 10.00 |

Accuracy. Mean ± standard error over the seeds, in percent, after the last epoch. **Bold** and ▼: ahead of or behind its \
baseline by more than two standard errors of the difference, which is paired by seed. The baseline is sgd with the same loss. \
1 to 3 seeds.

### Beside the numbers of Q 2023

| method | Cell y, here | Cell y, paper | Cell z \\| 2, here | Cell z \\| 2, paper |
| --- | ---: | ---: | ---: | ---: |
| SGD | 72.00 ± 2.00 | 70.00 ± 0.50 | 60.00 | 70.00 ± 0.50 |
| ABSGD | 74.00 ± 2.65 | – | 50.00 | – |
| absgd:sce | – | – | 10.00 | – |
| META | – | 1.25 | – | 1.25 |

Here: mean ± standard deviation over the seeds, in percent.
"""


def test_markdown(tmp_path, trained, capsys):
    write(tmp_path / "b", trained, accuracies={"sgd": [70, 72, 74], "absgd": [71, 75, 76]}, recipe=recipe("y", 0))
    other = replace(CONFIG, noise_rate=0.4, seeds=1, methods=("sgd", "absgd", "absgd:sce"))
    accuracies = {"sgd": [60], "absgd": [50], "absgd:sce": [10]}
    write(tmp_path / "a", trained, other, accuracies, recipe("z", 1, title="Cell z | 2"))
    cells, _ = merge(tmp_path)
    assert merged_report.markdown(merged.numbers(cells)) == MARKDOWN
    assert "ABSGD" in merged_report.tables(merged.numbers(cells))[0].columns[0]._cells


def test_markdown_marks_what_is_behind(tmp_path, trained):
    write(tmp_path / "a", trained, accuracies={"sgd": [70, 72, 74], "absgd": [69, 70, 73]})
    assert "| 70.67 ± 1.20 ▼ |" in merged_report.markdown(merged.numbers(merge(tmp_path)[0]))


# ------------------------------------------------------------------------------------------------ styles


NAMES = [
    f"{method}{rest}" for method in ("sgd", "absgd", "targetess") for rest in ("", ":sce", "+sam:vs+tla", "@lam=-1", ":ldam")
]


def test_styles():
    assert all(style.style_of(name, NAMES) == style.STYLES[name] for name in style.STYLES)  # as ever, when it stands alone
    styles = {name: style.style_of(name, NAMES) for name in NAMES}
    assert len({str(s) for s in styles.values()}) == len(NAMES)
    assert styles == {name: style.style_of(name, NAMES[::-1]) for name in NAMES}
    assert styles["sgd:sce"]["marker"] == styles["absgd:sce"]["marker"]
    assert styles["absgd:sce"]["color"] == style.STYLES["absgd"]["color"]
    many = [f"sgd@lam={number}" for number in range(40)]
    assert len({style.style_of(name, many)["marker"] for name in many}) == len(style.MARKERS)
    assert style.style_of("adam")["color"] == "#000000" and style.style_of("sgd:sce")["marker"] == style.MARKERS[0]
    hatches = {str(style.bar(name, NAMES)) for name in NAMES}
    assert len(hatches) == len(NAMES)


# ------------------------------------------------------------------------------------------------ plots and page


def test_series_by_hand():
    run = {
        "epochs": {
            "lam": [None, -0.5, 4.0],
            "ess": [1.0, 1.0, None],
            "log_s": [None, None, None],
            "clean_weight": [1.0, 1.5, None],
        }
    }
    assert merged_plots.inverse_lam(run) == [0, -2, 0.25]
    assert merged_plots.inverse_lam({"epochs": {"lam": [None]}}) is None is merged_plots.inverse_lam({"epochs": {}})
    assert merged_plots.weighing("ess")(run) is None is merged_plots.series("log_s")(run)
    assert merged_plots.weighing("clean_weight")(run)[:2] == [1.0, 1.5]
    average, spread = merged_plots.over_seeds([[1.0, math.nan, 3.0], [3.0, 4.0]])
    assert average == [2, 4, 3] and spread == pytest.approx([math.sqrt(2), 0, 0])


def test_short_paths():
    """Lines lose their L and their decimals; a line after a curve keeps its L, or it would be a part of the curve."""
    path = ' d="M 1.26 2.04\nL 3 4\nL -5.0001 6\nz\nM 0 0\nQ 1 2 3 4\nL 5 6\n"'
    short = re.sub(" d=.*", svg._short, path, flags=re.DOTALL)
    assert " ".join(short.split()) == 'd="M 1.3 2 3 4 -5 6 z M 0 0 Q 1 2 3 4 L 5 6 "'


def images(page):
    return [b64decode(text).decode() for text in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def report(cells):
    return merged_report.html(cells, merged.numbers(cells))


def test_page(tmp_path, trained):
    write(tmp_path / "a", trained, recipe=recipe("<b>", 0))
    cells, _ = merge(tmp_path)
    page = report(cells)
    titles = re.findall(r'<img alt="([^:"]+): Cell &lt;b&gt;"', page)
    assert titles == list(merged_plots.PLOTS)
    assert len(images(page)) == len(titles) and "No run of this experiment" not in page and "Left out" not in page
    for image in images(page):
        root = ElementTree.fromstring(image)
        assert root.tag.endswith("svg") and "nan" not in image
        assert set(re.findall(r'class="(\w+)"', image)) == set(re.findall(r"\.(s\d+){", image))
        assert set(re.findall(r'(?:href="|url\()#(\w+)', image)) <= set(re.findall(r'id="(\w+)"', image))
    words = re.sub(r'src="[^"]+"', "", page)
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "@import" not in page and "<b>" not in page
    assert "paper 70.00 ± 0.50" in words and "nan" not in words


def test_plots_without_data_are_named(tmp_path, trained):
    """An older results.json of clean labels has accuracies and weights only."""

    def older(run):
        series = {key: values for key, values in run["epochs"].items() if key not in NEW}
        series["flipped_weight"] = [None] * CONFIG.epochs
        return {key: value for key, value in run.items() if key != "flipped_confusion"} | {"epochs": series}

    write(tmp_path / "a", trained, replace(CONFIG, noise="none"), change=older)
    page = report(merge(tmp_path)[0])
    assert re.findall(r'<img alt="([^:"]+): ', page) == [
        "Accuracy while training",
        "Recall of each class",
        "Weight of each class",
    ]
    assert (
        "No run of this experiment has data for: Weight of right and wrong labels, Memorisation of wrong labels, Effective "
        "sample size, λ and log s, Predictions for wrong labels." in page
    )


@pytest.mark.parametrize("share, most, plots, left", [("BYTES", 1, 2, 2), ("MOST_CELLS", 1, 8, 1)])
def test_many_cells_have_fewer_plots(tmp_path, trained, monkeypatch, share, most, plots, left):
    for number in range(2):
        write(tmp_path / f"{number}", trained, replace(CONFIG, noise_rate=0.1 * (1 + number)))
    monkeypatch.setattr(merged_report, share, most)
    page = report(merge(tmp_path)[0])
    assert page.count("<img") == plots and page.count("Left out, because this report has many") == left
    assert page.count('<table class="matrix">') == 3


def test_many_methods_have_panels(tmp_path, trained):
    """More lines than fit are split by loss, with shared axes and few points; a class plot says what it does not show."""
    losses = ("", ":sce", ":vs+tla", ":ldam")
    config = replace(CONFIG, methods=tuple(method + loss for loss in losses for method in ("sgd", "absgd", "absgd+sam")), seeds=1)
    write(tmp_path / "a", trained, config)
    ((cell,), _) = merge(tmp_path)
    names = list(cell.runs_of)
    _, _, figure = merged_plots.accuracy(cell, names)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["ce", "sce", "vs+tla", "ldam"]
    assert len({axes.get_ylim() for axes in shown}) == 1 and len(figure.legends[0].get_texts()) == 12
    _, caption, _ = merged_plots.confusion(cell, names)
    assert "The first 6 methods; 6 more are not shown." in caption
    assert (
        merged_plots._kept(200, 30)[0] == 0 and merged_plots._kept(200, 30)[-1] == 199 and len(merged_plots._kept(200, 30)) == 30
    )
    assert merged_plots._kept(1, 30) == [0]


# ------------------------------------------------------------------------------------------------ the command


def test_command(tmp_path, trained, capsys):
    write(tmp_path / "in" / "deep" / "a", trained)
    assert cli.main(["report", tmp_path / "in", "--out", tmp_path / "new" / "out"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "absgd" in out and "written:" in out
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    results = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    assert results["cells"][0]["methods"][1]["seeds"] == [0, 1, 2] and results["cells"][0]["folders"] == [
        str(tmp_path / "in/deep/a")
    ]
    (tmp_path / "new" / "out" / "report.md").unlink()
    assert cli.main(["report", tmp_path / "in", "--out", tmp_path / "new" / "out"]) == 0  # its own files are no obstacle


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda results: None, ["has no results.json", "absgd-fast train"]),
        (lambda results: json.dumps(results)[:-9], ["results.json is damaged"]),
        (lambda results: "", ["results.json is damaged"]),
        (lambda results: '{"runs": [NaN], "config": {}}', ["results.json is damaged", "NaN"]),
        (lambda results: "[1, 2]", ["is not of `absgd-fast train`"]),
        (lambda results: json.dumps({"runs": 3, "config": {}}), ["is not of `absgd-fast train`"]),
        (
            lambda results: json.dumps(results | {"config": results["config"] | {"warp": 9}}),
            ["another version", "warp", "update"],
        ),
        (
            lambda results: json.dumps(results | {"runs": [{"method": "sgd"}]}),
            ["another version", "no seed, accuracy", "train again"],
        ),
        (lambda results: json.dumps(results | {"runs": [7]}), ["another version"]),
        (lambda results: json.dumps(results | {"runs": []}), ["no finished run", "--resume"]),
        (
            lambda results: json.dumps(results | {"recipe": recipe("a", 0, metric="f1")}),
            ["compares by f1", "accuracy or balanced_accuracy"],
        ),
        (lambda results: b"\xff\xfe", ["results.json is damaged"]),
    ],
)
def test_bad_input(tmp_path, trained, capsys, change, words):
    folder = write(tmp_path / "a", trained)
    content = change(json.loads((folder / merged.FILE).read_text()))
    (folder / merged.FILE).unlink()
    if content is not None:
        (folder / merged.FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(capsys, "report", folder, "--out", tmp_path / "out")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path, trained, capsys):
    folder = write(tmp_path / "a", trained)
    assert "nowhere is not there" in refused(capsys, "report", folder, "nowhere")
    assert "is no folder" in refused(capsys, "report", folder / merged.FILE)
    assert "DIR" in refused(capsys, "report")
    assert "is a file" in refused(capsys, "report", folder, "--out", folder / merged.FILE)


def test_older_settings_have_their_default(tmp_path, trained):
    """A results.json from before a setting existed has its default's effect."""
    write(tmp_path / "a", trained)
    file = write(tmp_path / "b", trained, change=lambda run: run | {"seed": run["seed"] + 3}) / merged.FILE
    results = json.loads(file.read_text())
    results["config"] = {name: value for name, value in results["config"].items() if name not in ("nu", "per_class", "momentum")}
    file.write_text(json.dumps(results))
    cells, _ = merge(tmp_path)
    assert len(cells) == 2  # per_class was 10, and None is the default
    results["config"]["per_class"] = 10
    file.write_text(json.dumps(results))
    assert len(merge(tmp_path)[0]) == 1


# ------------------------------------------------------------------------------------------------ in a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const errors = [];
window.addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
window.addEventListener("load", () => {
  const measured = document.createElement("pre");
  measured.id = "measured";
  const images = [...document.images];
  measured.textContent = JSON.stringify({
    errors, width: window.innerWidth, page: document.documentElement.scrollWidth,
    images: images.map(image => image.naturalWidth), shown: images.map(image => image.getBoundingClientRect().right),
    alt: images.filter(image => !image.alt).length,
  });
  parent.document.body.append(measured);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome to open the page in")
@pytest.mark.parametrize("width", [1300, 400])
def test_in_a_browser(tmp_path, trained, width):
    """The page has no errors, all its images are drawn, and nothing is wider than the window."""
    long = "absgd+sam:vs+tla+adrw@nu=1.5@lam=-1.25@warmup=0.25"
    config = replace(
        CONFIG, methods=("sgd", "absgd", "sgd:sce", "absgd:sce", "sgd:ldam", "absgd:ldam", "sgd:focal", "absgd:focal", long)
    )
    write(tmp_path / "a", trained, config, recipe=recipe("a", 0, rows={long: "A row with a very long name " * 3}))
    write(tmp_path / "b", trained, replace(config, noise_rate=0.4), recipe=recipe("b", 1, title="x" * 90))
    inner = html.escape(report(merge(tmp_path)[0]).replace("<head>", "<head>" + PROBE, 1))
    page = tmp_path / "page.html"  # in a frame, because a window of chromium is at least 500 pixels wide
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>'
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [CHROMIUM, *flags, "--enable-logging=stderr", "--window-size=1400,1000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "CONSOLE" not in shown.stderr
    measured = json.loads(re.search(r'<pre id="measured">(.*?)</pre>', shown.stdout, re.DOTALL)[1])
    assert measured["errors"] == [] and measured["alt"] == 0 and measured["width"] == width
    assert len(measured["images"]) == 16 and min(measured["images"]) > 0
    assert measured["page"] <= width and max(measured["shown"]) <= width
