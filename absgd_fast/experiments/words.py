"""The results of a training in sentences. Every one is computed from the results, whichever way they point."""

from statistics import mean, median

from .methods import OF_LAM
from .summary import BASELINE, by_method, head_to_tail, judged, stderr, time_ratios


def answers(results):
    """What the report says first: {"verdict": "better" | "worse" | "unclear" | "none", "help", "classes", "cost"}.

    The method judged is absgd, or else the first other in the order of METHODS, by its balanced accuracy against plain SGD. Its
    difference counts as one only when 0 lies outside the 95 % interval of Student's t over the paired seeds.
    """
    runs_of = by_method(results["runs"])
    method = judged(runs_of)
    pairs = results["paired"].get(method)
    if pairs is None:
        reached = "; ".join(f"{m} {plus_minus(s['balanced_accuracy'], 'std')} %" for m, s in results["summary"].items())
        return {
            "verdict": "none",
            "help": f"Cannot be said: it takes a seed that both {BASELINE} and another method have finished. "
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


def _judge(method, mine, base, seeds):
    values = [(mine[s]["balanced_accuracy"], base[s]["balanced_accuracy"]) for s in seeds]
    differences = [a - b for a, b in values]
    gap, level = mean(differences), [mean(column) for column in zip(*values)]
    levels = f"{level[0]:.1f} % against {level[1]:.1f} %"
    if len(seeds) == 1:
        return "unclear", (
            f"One seed cannot tell: {method} came out {_signed(gap)} points of balanced accuracy from {BASELINE} "
            f"({levels}), and how much of that is chance takes more seeds to see."
        )
    from scipy.stats import t  # comes with scikit-learn; a second to import

    error = stderr(differences)
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


def _classes(mine, base, seeds):
    order, counts = head_to_tail(mine.values())
    gains = {}
    for c in order:
        pairs = [(mine[s]["per_class_recall"][c], base[s]["per_class_recall"][c]) for s in seeds]
        if pairs := [(a, b) for a, b in pairs if a is not None and b is not None]:
            gains[c] = mean(a - b for a, b in pairs)

    def listed(classes):
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


def _cost(method, runs_of, seeds):
    text = f"{method} trained for {median(runs_of[method][s]['seconds'] for s in seeds):.3g} s per run"
    others = [BASELINE] + [m for m in runs_of if m not in (BASELINE, method)]
    parts = []
    for other in others:
        if ratios := time_ratios(runs_of[method], runs_of[other]):
            parts.append(
                f"{median(ratios):.2f} times {other}'s time (median of {len(ratios)} paired runs, "
                f"{min(ratios):.2f} to {max(ratios):.2f})"
            )
    return f"{text}: {', and '.join(parts)}. Only forward, loss, backward and step are timed."


def changes_note(changed):
    """A sentence about changes() that are not empty."""
    parts = [f"{name} ({', then '.join(map(str, values))})" for name, values in changed.items()]
    return f"Training was resumed with another {', '.join(parts)}: its last bits need not be those of one never stopped."


def notes(results):
    """Things a reader must know before trusting the numbers, as sentences; often none."""
    runs_of, found = by_method(results["runs"]), []
    if results["changes"]:
        found.append(changes_note(results["changes"]))
    if results["partial"]:
        found.append(
            f"Training was interrupted: {len(results['runs'])} of "
            f"{len(results['config']['methods']) * results['config']['seeds']} runs were finished, and only these count."
        )
    for method, mine in runs_of.items():
        if broken := sum(run["train_loss"] is None for run in mine.values()):
            found.append(f"{broken} of {len(mine)} runs of {method} ended with a loss that is not a finite number.")
        # one class gets every image: the others are too rare, or a step was too large and ReLUs no longer answer
        if stuck := sum(sorted(r or 0 for r in run["per_class_recall"])[-2:] == [0, 100] for run in mine.values()):
            hint = " Weights that rest on few samples make large steps: a smaller learning rate may help." * (method == "l2rw")
            found.append(f"{stuck} of {len(mine)} runs of {method} ended with one answer for every image.{hint}")
    losses = [run["train_loss"] for run in runs_of.get(BASELINE, {}).values() if run["train_loss"] is not None]
    if losses and mean(losses) < 0.01:
        found.append(
            f"Plain SGD ended with a training loss of {mean(losses):.2g}: the model fits its training set, and where "
            "all losses vanish there is nothing left to reweight. A smaller model, more weight decay or fewer epochs "
            "leave something."
        )
    return found


def title(results):
    """The experiment in one line."""
    c = results["config"]
    parts = [c["dataset"]]
    if c["imbalance"] != "none":
        parts.append(f"{ {'lt': 'long-tailed', 'step': 'step-imbalanced'}[c['imbalance']] } ρ = {c['rho']:g}")
    if c["noise"] != "none":
        parts.append(f"{100 * c['noise_rate']:g} % {c['noise']} label noise")
    seeds = len({run["seed"] for run in results["runs"]})
    if set(c["methods"]) & set(OF_LAM):
        lam = c["lam"] if isinstance(c["lam"], str) else f"{c['lam']:g}"
        lams = [f"λ = {_minus(lam)}"]
    else:
        lams = []
    return ", ".join([*parts, c["model"], *lams, f"{seeds} seed{'s' * (seeds != 1)}"])


def _images(count):
    return f"{count:g} training image{'s' * (count != 1)}"


def _minus(text):
    return text.replace("-", "−")


def _signed(value, digits=1):
    return _minus(f"{value:+.{digits}f}")


def plus_minus(entry, error, digits=1, signed=False):
    """ "71.0 ± 1.4", or "71.0" where one seed has no error."""
    text = _signed(entry["mean"], digits) if signed else f"{entry['mean']:.{digits}f}"
    return text if entry[error] is None else f"{text} ± {entry[error]:.{digits}f}"
