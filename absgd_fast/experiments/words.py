"""The results of a training in sentences. Each sentence follows from the results, whether they are good or bad."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from .methods import OF_LAM
from .spec import base, given_settings
from .summary import BASELINE, RunsOf, by_method, head_to_tail, judged, stderr, time_ratios
from .train import Run


def answers(results: dict[str, Any]) -> dict[str, str]:
    """The first sentences of the report: {"verdict": "better" | "worse" | "unclear" | "none", "help", "classes", "cost"}.

    The report judges absgd, or else the first other method in the order of METHODS, by its balanced accuracy against plain SGD.
    The verdict is "better" or "worse" only if 0 lies outside the 95 % interval of Student's t over the paired seeds.
    """
    runs_of = by_method(results["runs"])
    method = judged(runs_of)
    if method is None or method not in results["paired"]:
        reached = "; ".join(f"{m} {plus_minus(s['balanced_accuracy'], 'std')} %" for m, s in results["summary"].items())
        return {
            "verdict": "none",
            "help": f"Cannot be said, because no seed was finished by both {BASELINE} and another method. "
            f"Balanced accuracy: {reached}.",
            "classes": "Cannot be said without that comparison.",
            "cost": "Cannot be said without that comparison.",
        }
    mine, base = runs_of[method], runs_of[BASELINE]
    seeds = sorted(mine.keys() & base.keys())
    verdict, sentence = _judge(method, mine, base, seeds)
    return {
        "verdict": verdict,
        "help": sentence,
        "classes": _classes(mine, base, seeds),
        "cost": _cost(method, runs_of, seeds),
    }


def _judge(method: str, mine: dict[int, Run], base: dict[int, Run], seeds: Sequence[int]) -> tuple[str, str]:
    """The verdict, and a sentence with its numbers."""
    values = [(mine[s]["balanced_accuracy"], base[s]["balanced_accuracy"]) for s in seeds]
    differences = [a - b for a, b in values]
    gap, level = mean(differences), [mean(column) for column in zip(*values)]
    levels = f"{level[0]:.1f} % against {level[1]:.1f} %"
    if len(seeds) == 1:
        return "unclear", (
            f"One seed cannot tell: {method} came out {_signed(gap)} points of balanced accuracy against {BASELINE} "
            f"({levels}). Only more seeds can show how much of that is chance."
        )
    from scipy.stats import t  # comes with scikit-learn; here and not above, because this import takes a second

    error = stderr(differences) or 0.0
    margin = float(t.ppf(0.975, len(seeds) - 1)) * error
    wins = sum(d > 0 for d in differences)
    size = f"{abs(gap):.1f} ± {error:.1f} points of balanced accuracy"
    tail = f"({levels}; mean ± standard error over {len(seeds)} paired seeds, better in {wins} of them)"
    if gap - margin > 0:
        return "better", f"Yes. {method} beat {BASELINE} by {size} {tail}."
    if gap + margin < 0:
        return "worse", f"No, it did harm. {method} fell behind {BASELINE} by {size} {tail}."
    return "unclear", (
        f"Not shown. {method} and {BASELINE} differ by {_signed(gap)} ± {error:.1f} points of balanced accuracy "
        f"{tail}; the 95 % interval, {_signed(gap - margin)} to {_signed(gap + margin)}, contains 0."
    )


def _classes(mine: dict[int, Run], base: dict[int, Run], seeds: Sequence[int]) -> str:
    """Sentences about the recall of the classes and the weights of right and wrong labels."""
    order, counts = head_to_tail(mine.values())
    gains = {}
    for c in order:
        pairs = [(mine[s]["per_class_recall"][c], base[s]["per_class_recall"][c]) for s in seeds]
        if pairs := [(a, b) for a, b in pairs if a is not None and b is not None]:
            gains[c] = mean(a - b for a, b in pairs)

    def listed(classes: Sequence[int]) -> str:
        return ", ".join(f"class {c} ({_signed(gains[c])} points, {_images(counts[c])})" for c in classes)

    risen = sorted((c for c in gains if gains[c] > 0), key=lambda c: -gains[c])
    fallen = sorted((c for c in gains if gains[c] < 0), key=lambda c: gains[c])
    text = f"Recall rose on {len(risen)} of {len(gains)} classes"
    text += f", most on {listed(risen[:3])}. " if risen else ". "
    text += f"It fell on {len(fallen)}, most on {listed(fallen[:3])}." if fallen else "It fell on none."
    if max(counts) > min(counts):
        half = len(order) // 2
        head, tail = ([gains[c] for c in part if c in gains] for part in (order[:half], order[half:]))
        if head and tail:
            text += (
                f" Averaged over the {half} largest classes: {_signed(mean(head))} points; over the "
                f"{len(order) - half} smallest: {_signed(mean(tail))}."
            )
    right, wrong = (
        [w for s in seeds if (w := mine[s]["epochs"][key][-1]) is not None] for key in ("clean_weight", "flipped_weight")
    )
    if right and wrong:
        text += f" In the last epoch right labels weighed {mean(right):.2f} on average, wrong ones {mean(wrong):.2f}."
    return text


def _cost(method: str, runs_of: RunsOf, seeds: Sequence[int]) -> str:
    """A sentence about the time of a method, beside plain SGD's and the reference package's. The table has those of all."""
    text = f"{method} trained for {median(runs_of[method][s]['seconds'] for s in seeds):.3g} s per run"
    others = [BASELINE] + [m for m in runs_of if base(m) == "reference" and m != method]
    ratios_to = {other: time_ratios(runs_of[method], runs_of[other]) for other in others}
    parts = [
        f"{median(r):.2f} times {other}'s time (median of {len(r)} paired runs, {min(r):.2f} to {max(r):.2f})"
        for other, r in ratios_to.items()
        if r
    ]
    return f"{text}: {', and '.join(parts)}. Only forward, loss, backward and step are timed."


def class_counts(results: dict[str, Any]) -> str:
    """The number of training images of each class, by its right label; of more than 20 classes, their range."""
    _, counts = head_to_tail(results["runs"])
    if len(counts) > 20:
        return f"training images: {sum(counts):g} in {len(counts)} classes, {max(counts):g} to {min(counts):g} of a class"
    return f"training images of each class: {', '.join(f'{count:g}' for count in counts)}"


def changes_note(changed: dict[str, list[Any]]) -> str:
    """Sentences about summary.changes(), which must not be empty."""
    parts = [f"{name} ({', then '.join(map(str, values))})" for name, values in changed.items()]
    return (
        f"Training was resumed with another {', '.join(parts)}. The last bits of its results may differ from those of a training "
        "that was never stopped."
    )


def notes(results: dict[str, Any]) -> list[str]:
    """Warnings that a reader must know before trusting the numbers, one or two sentences each. Often there are none."""
    runs_of = by_method(results["runs"])
    found: list[str] = []
    if results["changes"]:
        found.append(changes_note(results["changes"]))
    if results["partial"]:
        found.append(
            f"Training was interrupted: {len(results['runs'])} of "
            f"{len(results['config']['methods']) * results['config']['seeds']} runs were finished, and only these are reported."
        )
    for method, mine in runs_of.items():
        if broken := sum(run["train_loss"] is None for run in mine.values()):
            found.append(f"{broken} of {len(mine)} runs of {method} ended with a loss that is not a finite number.")
        # every image gets the same class: the other classes are too rare, or a large step has switched off all ReLUs
        if stuck := sum(sorted(r or 0 for r in run["per_class_recall"])[-2:] == [0, 100] for run in mine.values()):
            hint = " Weights that depend on few samples make large steps. A smaller learning rate may help." * (method == "l2rw")
            found.append(f"{stuck} of {len(mine)} runs of {method} ended with the same answer for every image.{hint}")
    losses = [run["train_loss"] for run in runs_of.get(BASELINE, {}).values() if run["train_loss"] is not None]
    if losses and mean(losses) < 0.01:
        found.append(
            f"Plain SGD ended with a training loss of {mean(losses):.2g}. The model fits all its training samples, so there is "
            "nothing left to reweight. Use a smaller model, more weight decay or fewer epochs."
        )
    return found


def tested_on(config: dict[str, Any]) -> str:
    """The images behind the accuracies of the epochs, in words."""
    count = config.get("test_images")  # results of an older version have no such setting
    return "the test set" if count is None else f"at most {count} test images"


def setting(config: dict[str, Any]) -> str:
    """The data and the model of an experiment in one line."""
    parts = [config["dataset"]]
    if config.get("per_class") is not None:  # results of an older version have no such setting
        parts.append(f"{config['per_class']} images of each class")
    if config["imbalance"] != "none":
        parts.append(f"{ {'lt': 'long-tailed', 'step': 'step-imbalanced'}[config['imbalance']] } ρ = {config['rho']:g}")
    if config["noise"] != "none":
        parts.append(f"{100 * config['noise_rate']:g} % {config['noise']} label noise")
    if config.get("loss", "ce") != "ce":
        parts.append(f"loss {config['loss']}")
    return ", ".join([*parts, config["model"]])


def title(results: dict[str, Any]) -> str:
    """The experiment in one line."""
    c = results["config"]
    seeds = len({run["seed"] for run in results["runs"]})
    lams = []
    lam, share, sign = (_of_all(c, key, of) for key, of in (("lam", OF_LAM), ("share", _ESS), ("sign", _ESS)))
    if lam is not None:
        lams.append(f"λ = {minus(f'{lam:g}')}")
    if share is not None and sign is not None:
        lams.append(f"ESS/n = {share:g}" + " with λ < 0" * (sign < 0))
    return ", ".join([setting(c), *lams, f"{seeds} seed{'s' * (seeds != 1)}"])


_ESS = ("targetess",)


def _of_all(config: dict[str, Any], key: str, of: Sequence[str]) -> float | None:
    """The value of a setting in all methods that have it; None if they differ, or there are none."""
    found = set()
    for method in (method for method in config["methods"] if base(method) in of):
        found.add(float(given_settings(method).get(key, config[key])))
    return found.pop() if len(found) == 1 else None


def _images(count: float) -> str:
    return f"{count:g} training image{'s' * (count != 1)}"


def minus(text: str) -> str:
    """The text with minus signs in place of hyphens."""
    return text.replace("-", "−")


def _signed(value: float, digits: int = 1) -> str:
    return minus(f"{value:+.{digits}f}")


def plus_minus(entry: dict[str, Any], error: str, digits: int = 1, signed: bool = False) -> str:
    """The mean of an entry and its `error` ("std" or "stderr") as text: "71.0 ± 1.4", or "71.0" for a single seed."""
    text = _signed(entry["mean"], digits) if signed else f"{entry['mean']:.{digits}f}"
    return text if entry[error] is None else f"{text} ± {entry[error]:.{digits}f}"
