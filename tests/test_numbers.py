"""Every number that a user gives may be a scalar of NumPy, a Fraction or a Decimal, and is kept as Python's own."""

import inspect
import io
import math
import pickle
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import absgd_fast as ab
from absgd_fast import functional, weights
from absgd_fast.compat import losses as compat_losses
from absgd_fast.compat import optimizers as compat_optimizers
from absgd_fast.compat import repository
from absgd_fast.experiments import data, models, train

INTEGERS = (np.int8, np.int32, np.int64, np.uint8)
FLOATS = (np.float16, np.float32, np.float64, np.longdouble, Fraction, Decimal)
REFUSED = (True, np.bool_(True), np.str_("1"), "1", 1j, np.complex64(1), object(), torch.tensor(True), torch.tensor(0.5 + 9j))
NO_FLOATS = (10**400, -(10**400), Fraction(10**400), Decimal("sNaN"))  # numbers that a float cannot hold

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
LOSSES = torch.rand(8, generator=torch.Generator().manual_seed(1)) * 3
GROUPS = torch.arange(8) % 2
COUNTS = [50, 20, 7, 3]


# ---- what an object with this number computes ----


def two_forwards(criterion):
    """The results of two training forwards, and the state after them."""
    results = [criterion(X, Y), criterion(2 * X, Y)]
    return [*results, *criterion.state_dict().values()]


def two_steps(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    for i in (1, 2):
        p.grad = torch.full_like(p, 0.3 * i)
        optimizer.step()
    return [p.detach(), *(t for t in optimizer.state[p].values() if t is not None)]


def two_epochs(pair):
    """The losses before and after each step of a schedule, and its state."""
    loss, schedule = pair
    results = [loss(X, Y)]
    for _ in range(2):
        schedule.step()
        results.append(loss(X, Y))
    return [*results, torch.tensor(list(schedule.state_dict().values())) if hasattr(schedule, "count") else loss.weight]


def itself(value):
    return [value]


def of_pure_head(log_s=-math.inf, lam=0.7, **given):
    return torch.stack(ab.linear_robust_loss(X, torch.eye(4), Y, log_s, lam, **given))


def of_head(criterion):
    return [criterion(X, torch.eye(4), Y)]


# ---- the table ----


class Row:
    """One numeric argument: how to make an object, or a result, with this number; and what the object computes.

    values: floats and ints that the argument takes. An argument without a float takes only integers.
    """

    def __init__(self, make, computes, *values):
        self.make, self.computes, self.values = make, computes, values
        self.whole = all(isinstance(value, int) for value in values)


def optimizer(cls, backend, **given):
    return cls([nn.Parameter(torch.linspace(-1, 1, 6))], backend=backend, **given)


def scheduled(make_loss, make_schedule):
    def make(value):
        loss = make_loss()
        return loss, make_schedule(loss, value)

    return make


def weighted_step(**given):
    """What functional.weighted_momentum_step_ writes."""
    w, b = torch.ones(3), torch.ones(3)
    per_sample = torch.stack([LOSSES, LOSSES + 1, LOSSES * 2], 1)
    log_s = functional.weighted_momentum_step_([w], [b], [per_sample], LOSSES, **(dict(log_s=0.0, lam=0.7, lr=0.1) | given))
    return torch.cat([w, b, log_s.reshape(1)])


def of_weights(log_s=-math.inf, lam=0.7, **given):
    return torch.cat([t.reshape(-1) for t in functional.robust_weights(LOSSES, log_s, lam, **given)])


def rows():
    """name of the object, name of the argument -> Row."""
    table = {}

    def add(owner, computes, make, **arguments):
        for name, values in arguments.items():
            values = values if isinstance(values, tuple) else (values,)
            table[owner, name] = Row(partial(make, name), computes, *values)

    one = lambda call, **fixed: lambda name, value: call(**fixed | {name: value})  # noqa: E731
    robust = dict(gamma=(0.3, 1), alpha=(0.7, 1), mix=(0.3, 2), max_weight=(1.1, 2), loss_divisor=(1.7, 3))
    add("ABLoss", two_forwards, one(ab.ABLoss, lam=0.7), lam=(-0.3, 2), **robust)
    per_row = partial(torch.nn.functional.cross_entropy, reduction="none")
    add("ABLoss", two_forwards, one(ab.ABLoss, criterion=per_row, lam=0.7), ignore_index=2)
    add("ABLoss", two_forwards, lambda _, v: _with_lam(v), set_lam=(-0.3, 2))
    add("ABLoss", two_forwards, lambda _, v: _with_divisor(v), divisor=(1.7, 3))
    add("RelativeLam", two_forwards, lambda _, v: ab.ABLoss(lam=ab.RelativeLam(v)), r=(-0.3, 2))
    add("TargetESS", two_forwards, lambda _, v: ab.ABLoss(lam=ab.TargetESS(v)), share=(0.3,))
    add("TargetESS", two_forwards, lambda _, v: ab.ABLoss(lam=ab.TargetESS(0.7, v)), sign=(-1.0, 1))
    add("LabelAudit", lambda audit: audit.sums, lambda _, v: ab.LabelAudit(v), n_samples=(3,))
    linear = {name: values for name, values in robust.items() if name not in ("mix", "max_weight")}
    add("LinearABLoss", of_head, one(ab.LinearABLoss, lam=0.7), lam=(-0.3, 2), chunk=3, **linear)
    add("LinearABLoss", of_head, one(ab.LinearABLoss, lam=0.7, normalizer="none"), max_weight=(1.1, 2))

    numbers = dict(log_s=(0.3, 1), lam=(-0.3, 2), gamma=(0.3, 1), alpha=(0.7, 1))
    add("linear_robust_loss", itself, one(of_pure_head), **numbers, label_smoothing=(0.3, 1), ignore_index=2)

    call = lambda loss: [loss(X, Y)]  # noqa: E731
    add("CrossEntropy", call, one(ab.CrossEntropy), label_smoothing=(0.3, 1), ignore_index=2)
    add("CrossEntropy", call, lambda _, v: ab.CrossEntropy([0.5, v, 1.5, 1.0]), weight=(0.7, 1))
    add("Focal", call, one(ab.Focal), gamma=(0.3, 1), ignore_index=2)
    add("GCE", call, one(ab.GCE), q=(0.3, 1), k=0.3, ignore_index=2)
    add("SCE", call, one(ab.SCE), alpha=(0.3, 1), beta=(0.3, 1), ignore_index=2)
    counted = dict(cls_num_list=COUNTS)
    add("LDAM", call, one(ab.LDAM, **counted), max_m=(0.3, 1), s=(2.3, 3), ignore_index=2)
    add("VS", call, one(ab.VS, **counted), gamma=(0.7, 1), tau=(0.7, 1), ignore_index=2)
    add("LogitAdjusted", call, one(ab.LogitAdjusted, **counted), tau=(0.7, 1), ignore_index=2)
    add("CDT", call, one(ab.CDT, **counted), gamma=(0.7, 1), ignore_index=2)
    for name in ("LDAM", "VS", "LogitAdjusted", "CDT"):
        add(name, call, lambda _, v, name=name: getattr(ab, name)([50, v, 7, 3]), cls_num_list=(20.3, 20))
    add(
        "CosineClassifier",
        lambda m: [torch.tensor(m.weight.shape)],
        one(ab.CosineClassifier, in_features=4, out_features=2),
        in_features=3,
        out_features=3,
    )
    add("class_balanced_weights", itself, one(ab.class_balanced_weights, **counted), beta=(0.3, 0))
    add("class_balanced_weights", itself, lambda _, v: ab.class_balanced_weights([50, v, 7, 3]), cls_num_list=(20.3, 20))
    add("adrw_weights", itself, one(ab.adrw_weights, **counted), nu=(0.3, 1))
    add("adrw_weights", itself, lambda _, v: ab.adrw_weights([50, v, 7, 3], 1.0), cls_num_list=(20.3, 20))

    add(
        "TwoStage", two_epochs, lambda _, v: scheduled(partial(ab.ABLoss, lam=1), lambda c, v: ab.TwoStage(c, 0.3, v))(v), start=1
    )
    add(
        "TwoStage",
        two_epochs,
        lambda _, v: scheduled(partial(ab.ABLoss, lam=1), lambda c, v: ab.TwoStage(c, v, 1))(v),
        lam=(-0.3, 2),
    )
    add("Ramp", two_epochs, lambda _, v: scheduled(partial(ab.ABLoss, lam=1), lambda c, v: ab.Ramp(c, 0.3, v))(v), length=2)
    add("Ramp", two_epochs, lambda _, v: scheduled(partial(ab.ABLoss, lam=1), lambda c, v: ab.Ramp(c, v, 2))(v), lam=(-0.3, 2))
    add("DRW", two_epochs, lambda _, v: scheduled(ab.CrossEntropy, lambda c, v: ab.DRW(c, [0.5, 1.5, 1.0, 1.0], v))(v), start=1)
    add(
        "DRW",
        two_epochs,
        lambda _, v: scheduled(ab.CrossEntropy, lambda c, v: ab.DRW(c, [0.5, v, 1.5, 1.0], 1))(v),
        weight=(0.7, 1),
    )
    add("TLA", two_epochs, lambda _, v: scheduled(lambda: ab.VS(COUNTS), ab.TLA)(v), start=1)
    add(
        "vs_tla_adrw",
        two_epochs,
        one(ab.vs_tla_adrw, cls_num_list=COUNTS, start=1),
        start=1,
        gamma=(0.7, 1),
        tau=(0.7, 1),
        nu=(0.7, 1),
        ignore_index=2,
    )
    add("vs_tla_adrw", two_epochs, lambda _, v: ab.vs_tla_adrw([50, v, 7, 3], start=1), cls_num_list=(20.3, 20))

    for backend in (None, "reference"):
        of = lambda name, backend=backend: f"{name}, {backend}"  # noqa: E731
        common = dict(lr=(0.3, 1), weight_decay=(0.3, 1), max_norm=(0.3, 1))
        step = lambda cls, backend=backend, **fixed: one(partial(optimizer, cls, backend), **fixed)  # noqa: E731
        add(of("ABSGD"), two_steps, step(ab.ABSGD), momentum=(0.3, 1), dampening=(0.3, 1), **common)
        for cls in (ab.ABAdam, ab.ABAdamW):
            add(of(cls.__name__), two_steps, step(cls), eps=(0.3, 1), **common)
            pair = lambda _, v, cls=cls, backend=backend: optimizer(cls, backend, betas=(v, v))  # noqa: E731
            add(of(cls.__name__), two_steps, pair, betas=0.3)
        add(of("ABRMSprop"), two_steps, step(ab.ABRMSprop), alpha=(0.3, 1), eps=(0.3, 1), momentum=(0.3, 1), **common)
        add(
            of("ABAdagrad"),
            two_steps,
            step(ab.ABAdagrad),
            lr_decay=(0.3, 1),
            eps=(0.3, 1),
            initial_accumulator_value=(0.3, 1),
            **common,
        )
        fixed = dict(backend=backend)
        add(of("robust_weights"), itself, one(of_weights, **fixed), log_s=(0.3, 1), lam=(-0.3, 2), gamma=(0.3, 1), alpha=(0.7, 1))
        add(
            of("weighted_momentum_step_"),
            itself,
            one(weighted_step, **fixed),
            log_s=(0.3, 1),
            lam=(-0.3, 2),
            lr=(0.3, 1),
            gamma=(0.3, 1),
            momentum=(0.3, 1),
            weight_decay=(0.3, 1),
            dampening=(0.3, 1),
            alpha=(0.7, 1),
            mix=(0.3, 2),
            max_weight=(1.1, 2),
        )
        for kind, arguments in {
            "ce": dict(label_smoothing=(0.3, 1), ignore_index=2),
            "focal": dict(gamma=(0.3, 1)),
            "gce": dict(q=(0.3, 1), k=0.3),
            "sce": dict(alpha=(0.3, 1), beta=(0.3, 1)),
        }.items():
            add(of("logit_loss"), itself, one(functional.logit_loss, logits=X, target=Y, kind=kind, **fixed), **arguments)
        add(of("term"), itself, one(weights.term, losses=LOSSES, **fixed), t=(-0.3, 2))
        add(of("term"), itself, one(weights.term, losses=LOSSES, t=1.0, groups=GROUPS, **fixed), t_group=(-0.3, 2))
        add(of("cvar"), itself, one(weights.cvar, losses=LOSSES, beta=0.3, **fixed), beta=(0.3, 1), reg=(0.3, 1))
        add(of("chi2"), itself, one(weights.chi2, losses=LOSSES, **fixed), rho=(0.3, 1))
        add(
            of("GroupDRO"),
            lambda rule: [rule(LOSSES, GROUPS)],
            one(weights.GroupDRO, n_groups=2, **fixed),
            n_groups=3,
            eta=(0.3, 1),
        )

    late = lambda criterion: (criterion.updateLambda(), two_forwards(criterion.loss))[1]  # noqa: E731
    add(
        "compat.losses.ABLoss",
        late,
        one(compat_losses.ABLoss, mylambda=0.7),
        mylambda=(-0.3, 2),
        milestone=1,
        abgamma=(0.3, 1),
        abalpha=(0.7, 1),
    )
    for name in ("ABSGD", "ABAdam"):
        make = lambda **given: getattr(compat_optimizers, name)([nn.Parameter(torch.ones(3))], **given)  # noqa: E731
        add(f"compat.optimizers.{name}", two_steps, one(make, lr=0.1), lr=(0.3, 1), weight_decay=(0.3, 1))
    add("compat.repository.Focal", call, one(repository.Focal), gamma=(0.3, 1), ignore_index=2)
    add(
        "compat.repository.ABLoss",
        two_forwards,
        one(repository.ABLoss, lam=0.7),
        lam=(-0.3, 200),
        **{name: robust[name] for name in ("gamma", "alpha", "max_weight", "loss_divisor")},
    )
    as_tensor = lambda value: [torch.as_tensor(value)]  # noqa: E731
    add("class_counts", as_tensor, one(data.class_counts, n_max=100, n_classes=4), n_max=50, n_classes=3, rho=(2.3, 3))
    noise = dict(labels=Y, kind="background", rate=0.5, n_classes=4, seed=3)
    add("add_noise", as_tensor, one(data.add_noise, **noise), rate=(0.3, 0), n_classes=5, seed=5, background=2)
    sizes = lambda model: list(model.state_dict().values())  # noqa: E731
    add("make_model", sizes, one(models.make_model, name="linear", shape=(1, 2, 2), classes=3, seed=0), classes=2, seed=5)
    numbers = {f: v for f, v in vars(train.Config()).items() if isinstance(v, (int, float))}
    add("Config", lambda c: [torch.tensor([getattr(c, f) for f in numbers], dtype=torch.float64)], one(train.Config), **numbers)
    return table


def _with_lam(value):
    criterion = ab.ABLoss(lam=1.0)
    criterion.set_lam(value)
    return criterion


def _with_divisor(value):
    criterion = ab.ABLoss(lam=1.0)
    criterion.loss_divisor = value
    return criterion


TABLE = rows()
IDS = [f"{owner}: {argument}" for owner, argument in TABLE]
OF_TORCH = ("ABSGD", "ABAdam", "ABAdamW", "ABRMSprop", "ABAdagrad")


def the_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.dtype == b.dtype and torch.equal(a, b)


def forms(value):
    """The number in every type that can hold it, beside the Python number of the same value."""
    types = INTEGERS + FLOATS if isinstance(value, int) else FLOATS
    for of in types:
        if isinstance(value, int) and of in INTEGERS and not np.iinfo(of).min <= value <= np.iinfo(of).max:
            continue
        form = of(value)
        yield form, int(form) if of in INTEGERS else float(form)


@pytest.mark.covering(1)
@pytest.mark.parametrize("row", TABLE.values(), ids=IDS)
def test_numbers_of_any_type(row):
    """They give the same results as Python's, and nothing of their types is kept."""
    for value in row.values:
        for form, plain in forms(value):
            if row.whole and not isinstance(form, np.integer):
                continue
            made = row.make(form)
            if not isinstance(made, torch.Tensor):
                content = pickle.dumps(made)
                assert not any(word in content for word in (b"numpy", b"fractions", b"decimal"))
            the_same(row.computes(made), row.computes(row.make(plain)))


@pytest.mark.parametrize("row", TABLE.values(), ids=IDS)
def test_state_dicts_are_plain(row):
    """torch.load takes only plain values, unless the caller trusts the file."""
    made = row.make(np.int64(row.values[0]) if row.whole else np.float32(row.values[0]))
    made = made[0] if isinstance(made, tuple) else made
    if not hasattr(made, "state_dict"):
        pytest.skip("it has no state_dict")
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)
    assert "np." not in repr(made)


# torch's classes check what they are given; the experiments are given what the command line has read
UNCHECKED = (*OF_TORCH, "compat.optimizers", "CosineClassifier", "class_counts", "add_noise", "make_model", "Config")
CHECKED = {key: row for key, row in TABLE.items() if not key[0].startswith(UNCHECKED) and key[1] != "milestone"}
SHOWN = {"set_lam": "lam", "divisor": "loss_divisor", "mylambda": "lam", "abgamma": "gamma", "abalpha": "alpha"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("key", CHECKED, ids=": ".join)
def test_what_is_no_number_is_refused_by_name(key):
    for value in REFUSED:
        with pytest.raises((TypeError, ValueError), match=f"^{SHOWN.get(key[1], key[1])}: got "):
            CHECKED[key].computes(CHECKED[key].make(value))


@pytest.mark.parametrize("key", [key for key, row in CHECKED.items() if not row.whole], ids=": ".join)
def test_numbers_that_no_float_holds_are_refused_by_name(key):
    for value in NO_FLOATS:
        with pytest.raises(ValueError, match=f"^{SHOWN.get(key[1], key[1])}: got "):
            CHECKED[key].computes(CHECKED[key].make(value))


@pytest.mark.parametrize("key", [key for key in CHECKED if key[1] == "ignore_index"], ids=": ".join)
def test_ignore_index_is_a_label(key):
    for value in (2**63, -(2**63) - 1, 10**400, np.uint64(2**63)):
        with pytest.raises(ValueError, match="^ignore_index: got "):
            CHECKED[key].make(value)
    for value in (2**63 - 1, -(2**63)):
        CHECKED[key].computes(CHECKED[key].make(value))


@pytest.mark.parametrize("key", [key for key, row in CHECKED.items() if row.whole], ids=": ".join)
def test_integers_are_not_rounded_from_floats(key):
    for value in (2.5, 2.0, np.float32(2), Fraction(2), Decimal(2)):
        with pytest.raises(ValueError, match=f"^{key[1]}: got "):
            CHECKED[key].make(value)


@pytest.mark.parametrize(
    "key", [key for key, row in CHECKED.items() if not row.whole and key[1] not in ("weight", "log_s")], ids=": ".join
)
def test_nan_of_any_type_is_refused_with_its_value(key):
    for value in (math.nan, np.float32("nan"), np.float64("nan"), Decimal("nan")):
        with pytest.raises(ValueError, match=rf"^{SHOWN.get(key[1], key[1])}: got (\[.*)?(.*\()?'?[Nn]a[Nn]"):
            CHECKED[key].computes(CHECKED[key].make(value))


@pytest.mark.parametrize("of", [np.int32, np.int64, np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.filterwarnings("error")
def test_arrays_of_numbers(of):
    """They may be read-only, as those of a memory map are. Class weights keep the dtype of a floating array."""
    counts, class_weight = np.array(COUNTS, dtype=of), np.array([0.5, 1.5, 1.0, 1.0], dtype=of)
    for array in (counts, class_weight):
        array.flags.writeable = False
    assert ab.VS(counts).cls_num_list == COUNTS and torch.equal(ab.adrw_weights(counts, 1.0), ab.adrw_weights(COUNTS, 1.0))
    loss = ab.CrossEntropy(class_weight)
    assert loss.weight.dtype == (torch.float32 if np.issubdtype(of, np.integer) else torch.from_numpy(class_weight.copy()).dtype)
    the_same([loss(X, Y)], [ab.CrossEntropy(class_weight.tolist())(X, Y)])


SEQUENCES = {
    "tuple": tuple,
    "integers": lambda numbers: list(map(int, numbers)),
    "0-d tensors": lambda numbers: [torch.tensor(number) for number in numbers],
    "0-d integer tensors": lambda numbers: [torch.tensor(int(number)) for number in numbers],
    "0-d arrays": lambda numbers: [np.array(number) for number in numbers],
    "reversed array": lambda numbers: np.array(numbers[::-1], dtype=np.float32)[::-1],
    "long doubles": lambda numbers: np.array(numbers, dtype=np.longdouble),
    "objects": lambda numbers: np.array([Fraction(number) for number in numbers], dtype=object),
    "big endian": lambda numbers: np.array(numbers, dtype=">f4"),
    "values of a dict": lambda numbers: dict(enumerate(numbers)).values(),
}
NO_SEQUENCES = {
    "dict": lambda numbers: dict(enumerate(numbers, 1)),
    "Counter": lambda numbers: Counter([1, 1, 2]),
    "set": set,
    "keys": lambda numbers: dict.fromkeys(numbers).keys(),
    "none": lambda numbers: [],
    "one": lambda numbers: 3.0,
    "0-d": lambda numbers: np.array(3.0),
    "two dimensions": lambda numbers: np.array([numbers]),
    "bools": lambda numbers: np.array(numbers) > 1,
    "strings": lambda numbers: "1234",
    "sparse": lambda numbers: torch.tensor(numbers).to_sparse(),
    "without values": lambda numbers: [torch.tensor(number, device="meta") for number in numbers],
}
TAKE_SEQUENCES = {
    "cls_num_list": lambda numbers: ab.VS(numbers)._counts(),
    "weight": lambda numbers: ab.CrossEntropy(numbers).weight,
}


@pytest.mark.parametrize("name", TAKE_SEQUENCES)
@pytest.mark.parametrize("form", SEQUENCES)
def test_sequences_of_numbers(form, name):
    numbers = [5.0, 3.0, 1.0, 2.0]
    the_same([TAKE_SEQUENCES[name](SEQUENCES[form](numbers))], [TAKE_SEQUENCES[name](numbers)])


@pytest.mark.parametrize("name", TAKE_SEQUENCES)
@pytest.mark.parametrize("form", NO_SEQUENCES)
def test_what_is_no_sequence_is_refused_by_name(form, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*{'list.d.values' if form in ('dict', 'Counter') else ''}"):
        TAKE_SEQUENCES[name](NO_SEQUENCES[form]([5.0, 3.0, 1.0, 2.0]))


def test_a_sequence_that_requires_grad_is_refused():
    for make in TAKE_SEQUENCES.values():
        with pytest.raises(RuntimeError, match="requires grad"):
            make([torch.tensor(2.0), torch.tensor(1.0, requires_grad=True)])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cls", [ab.ABSGD, ab.ABAdam, ab.ABAdamW, ab.ABRMSprop, ab.ABAdagrad], ids=lambda c: c.__name__)
def test_a_schedule_may_write_a_scalar_of_numpy(cls, backend):
    """torch's LambdaLR does, if the function that it is given computes with NumPy."""
    wanted = optimizer(cls, backend, lr=0.3)
    got = optimizer(cls, backend, lr=0.3)
    for of in (np.float64, np.float32, np.float16, np.int64):
        got.param_groups[0]["lr"], wanted.param_groups[0]["lr"] = of(1.7), float(of(1.7))
        the_same(two_steps(got), two_steps(wanted))


PUBLIC = {name: getattr(ab, name) for name in ab.__all__ if not inspect.ismodule(getattr(ab, name))}
del PUBLIC["select"], PUBLIC["Selection"]  # tests/test_select.py has the numbers of the first; the second is a result
PUBLIC |= {name: getattr(functional, name) for name in ("logit_loss", "robust_weights", "weighted_momentum_step_")}
PUBLIC |= {name: getattr(weights, name) for name in weights.__all__}
PUBLIC |= {"compat.losses.ABLoss": compat_losses.ABLoss}
PUBLIC |= {f"compat.optimizers.{name}": getattr(compat_optimizers, name) for name in ("ABSGD", "ABAdam")}
PUBLIC |= {f"compat.repository.{name}": getattr(repository, name) for name in ("ABLoss", "Focal")}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_table_has_every_numeric_argument(name):
    numeric = {
        p.name for p in inspect.signature(PUBLIC[name]).parameters.values() if re.search(r"\b(float|int)\b", str(p.annotation))
    }
    assert numeric <= {argument for owner, argument in TABLE if owner.split(",")[0] == name}
