"""What changed from one record of the benchmark to another: `absgd-fast bench --compare OLD.json NEW.json`.

Times of two days cannot be compared, because the clock rates and the loads of the machine differ. The ratios of our time to those
of the competitors can: a competitor met the same conditions as we did. So a ratio that rose says that we got slower, or that the
competitor got faster. Ours counts as slower in a case if the ratios to at least half of its competitors rose.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .verdict import spread

SETTINGS = ("hardware", "versions", "compiler", "threads", "seconds_per_case", "gpu")
STATES = ("state",)  # of a GPU: its clocks and its temperature differ from run to run


class NotARecord(Exception):
    """A file that is no record of the benchmark. The message says why."""


@dataclass(frozen=True)
class Change:
    """The ratio of our time to that of a competitor, in two records."""

    suite: str
    case: str
    competitor: str
    old: dict  # quartiles
    new: dict

    @property
    def factor(self):
        """How many times the old ratio the new one is."""
        return self.new["median"] / self.old["median"]

    @property
    def moved(self):
        """Whether the ratio changed by more than it varied in either run. Up and down count alike."""
        return max(self.factor, 1 / self.factor) - 1 > max(spread(self.old), spread(self.new))


def read(path):
    """The record in a file. Raises NotARecord if it is none."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotARecord(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise NotARecord(f"{path} is not JSON: {error}") from error
    results = record.get("results") if isinstance(record, dict) else None
    if not isinstance(results, list):
        raise NotARecord(f"{path} is not a record of bench: it has no list `results`")
    try:
        if not ratios(record):
            raise NotARecord(f"{path} has no ratio: the suite memory, for example, measures none")
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise NotARecord(f"{path} is not a record of bench: its results are not those of cases ({error!r})") from error
    return record


def ratios(record):
    """{(suite, case, competitor): quartiles of the ratio} of a record. A case in which our result was wrong has none."""
    found = {}
    for result in record["results"]:
        for name, peer in result.get("peers", {}).items():
            if "ratio" in peer:
                found[result["suite"], result["case"], name] = peer["ratio"]
    for ratio in found.values():
        spread(ratio) + 1 / ratio["median"]  # raises an error if they are no quartiles of a ratio
    return found


def changes(old, new):
    """The changes of all ratios that are in both records, the largest first."""
    before, after = ratios(old), ratios(new)
    found = [Change(*key, before[key], after[key]) for key in before if key in after]
    return sorted(found, key=lambda change: -max(change.factor, 1 / change.factor))


def slower(found):
    """The (suite, case) in which ours got slower: the ratios to at least half of the competitors rose beyond the spread."""
    rose = {}
    for change in found:
        rose.setdefault((change.suite, change.case), []).append(change.moved and change.factor > 1)
    return [case for case, which in rose.items() if 2 * sum(which) >= len(which)]


def differences(old, new):
    """Lines that say in which settings the two records differ, and whether a machine was not quiet."""
    before, after = (_flat({name: record.get(name) for name in SETTINGS}) for record in (old, new))
    names = list(dict.fromkeys([*before, *after]))
    out = [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]
    for which, record in (("old", old), ("new", new)):
        if (record.get("quiet") or {}).get("quiet") is False:
            out.append(f"the machine was not quiet in the {which} run")
    return out


def _flat(settings, prefix=""):
    out = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= _flat({key: inner for key, inner in value.items() if key not in STATES}, f"{prefix}{name} ")
        else:
            out[prefix + name] = value
    return out


def lines(old, new):
    """What is printed below the table: what did not move, what is in one record only, what differs, and where ours is slower."""
    found = changes(old, new)
    still = sum(not change.moved for change in found)
    out = [f"{still} of {len(found)} ratios moved by no more than they varied in a run"]
    before, after = ratios(old), ratios(new)
    for which, keys in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        out += [f"only in the {which} record: {suite} {case}, {name}" for suite, case, name in sorted(keys)]
    out += [f"differs: {line}" for line in differences(old, new)]
    cases = slower(found)
    out += [f"ours got slower: {suite} {case}" for suite, case in cases]
    return out + ["ours got slower in no case"] * (not cases)
