"""The names and numbers of _codes.py against those in csrc/, and what Python makes of them."""

import re
from pathlib import Path

import pytest

from absgd_fast import _codes, ops, reference
from absgd_fast.functional import loss_spec

SOURCES = [p for p in (Path(__file__).resolve().parent.parent / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
TEXT = "\n".join(re.sub(r"//.*", "", p.read_text()) for p in SOURCES)


def enums():
    """Every enum of csrc: name of a value -> its number."""
    out = []
    for body in re.findall(r"\benum\b[^;{}()]*\{([^}]*)\}", TEXT):
        values, following = {}, 0
        for entry in filter(None, (re.sub(r"/\*.*?\*/", "", part).strip() for part in body.split(","))):
            name, _, number = map(str.strip, entry.partition("="))
            values[name] = int(number) if number else following
            following = values[name] + 1
        out.append(values)
    return out


def constant(name):
    (number,) = re.findall(rf"constexpr \w+ {name} = ([\d.]+);", TEXT)
    return float(number)


def in_python(name):
    """kInitFirst -> INIT_FIRST"""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("k")).upper()


@pytest.mark.parametrize("names", [_codes.KINDS, _codes.NORMALIZERS, _codes.RULES, _codes.RULES_OF_LOSSES], ids=" ".join)
def test_order(names):
    assert {name: number for number, name in enumerate(names)} in enums()


@pytest.mark.parametrize("one", ["kInitFirst", "kMaximize"])
def test_bits(one):
    """Those of an operator's flags, and those of a step: every bit that C++ knows, and Python has no other that C++ reads."""
    (values,) = [values for values in enums() if one in values]
    assert values == {name: getattr(_codes, in_python(name), None) for name in values}
    read_by_python_alone = {"HARD", "KIND"}
    sections = Path(_codes.__file__).read_text().split("# ---- ")[1:]
    section = next(text for text in sections if f"\n{in_python(one)} =" in text)
    written = set(re.findall(r"^([A-Z_]+) = \d+", section, re.MULTILINE))
    assert written - read_by_python_alone == {in_python(name) for name in values}
    assert 1 << int(constant("kKindShift")) == _codes.KIND and _codes.HARD == _codes.KIND // 2 not in values.values()


def test_bits_do_not_overlap():
    bits = [_codes.NORMALIZER, _codes.INIT_FIRST, _codes.UPDATE, _codes.WITH_GRAD, _codes.WITH_STATS, _codes.PRUNE, _codes.HARD]
    assert sum(bits) == _codes.KIND - 1 and len(_codes.NORMALIZERS) <= _codes.NORMALIZER + 1


def test_the_numbers_of_a_settled_normaliser():
    """Python reads by place what C++ writes by name."""
    fields = re.search(r"struct Normalizer \{(.*?)\n\};", TEXT, re.DOTALL)[1]
    fields = re.findall(r"\bdouble ([\w, ]+);", re.sub(r"//.*", "", fields))
    names = [name.strip() for line in fields for name in line.split(",")]
    assert [getattr(reference, name.upper()) for name in names] == list(range(6))


def test_constants():
    assert constant("kMaxZGap") == reference.MAX_Z_GAP
    assert constant("kTeamThreads") == ops.ONE_BLOCK
    assert ops.lanes_of_a_row(int(constant("kTeamClasses"))) == 1 < ops.lanes_of_a_row(int(constant("kTeamClasses")) + 1)


@pytest.mark.parametrize("kind", _codes.KINDS)
def test_numbers_of_a_kind(kind):
    """What a loss is given under their names are hyper_a and hyper_b, and goes back to the names in plain torch."""
    given = dict(label_smoothing=0.0, gamma=2.5, q=0.6, k=0.3, prune=False, alpha=0.2, beta=0.8)
    given |= {"label_smoothing": 0.1} if kind == "ce" else {}
    spec = loss_spec(kind, None, None, ignore_index=-100, **given)
    numbers = [given[name] for name in _codes.HYPERPARAMETERS[kind]]
    assert [spec.hyper_a, spec.hyper_b] == [*numbers, 0.0][:2]
    assert spec.smoothing == (0.1 if kind == "ce" else 0.0) and spec.bits // ops.KIND == _codes.KINDS.index(kind)
