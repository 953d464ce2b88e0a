"""LabelAudit: its sums against float64 loops, what does not count, rankings, state, devices and processes; its file and pages."""

import copy
import csv
import dataclasses
import io
import json
import math
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_processes import needs_gloo, run

import absgd_fast as ab
from absgd_fast import __main__ as cli
from absgd_fast.experiments import audit as files
from absgd_fast.experiments import audit_report, checkpoint, train

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(cli.__file__).resolve().parents[1])
    from benchmarks import audit as benchmark

N = 7
INF, NAN = math.inf, math.nan
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_hand(batches, n=N):
    """[sum of losses, sum of weights, count] of each sample, by loops over Python's floats."""
    sums = [[0.0, 0.0, 0] for _ in range(n)]
    for index, losses, weights in batches:
        for i, loss, weight in zip(index, losses, weights):
            if math.isfinite(loss) and math.isfinite(weight):
                sums[i] = [sums[i][0] + loss, sums[i][1] + weight, sums[i][2] + 1]
    return sums


def filled(batches, n=N):
    audit = ab.LabelAudit(n)
    for batch in batches:
        audit.update(*map(torch.as_tensor, batch))
    return audit


# three batches: one has a sample twice, one has a loss and a weight that are not finite; sample 6 never comes
BATCHES = [
    ([2, 0, 2, 5], [1.5, 0.25, 2.5, 4.0], [0.5, 1.0, 1.5, 1.0]),
    ([1, 3, 4], [NAN, 2.0, INF], [NAN, 2.0, 1.0]),
    ([1, 0, 3], [0.5, 0.125, 3.0], [1.0, 0.0, INF]),
]


def test_sums_are_those_of_a_loop():
    audit, truth = filled(BATCHES), torch.tensor(by_hand(BATCHES), dtype=torch.float64)
    assert torch.equal(audit.sums.double().T, truth)
    assert audit.count.tolist() == [2, 1, 2, 1, 0, 1, 0]
    mean = truth[:, :2] / truth[:, 2:]
    for found, true in ((audit.mean_loss, mean[:, 0]), (audit.mean_weight, mean[:, 1])):
        assert torch.equal(found.double().nan_to_num(-1), true.nan_to_num(-1))


def test_long_trainings_keep_their_sums():
    """Against float64, over 300 epochs."""
    draw = torch.Generator().manual_seed(0)
    audit, truth = ab.LabelAudit(50), torch.zeros(50, dtype=torch.float64)
    for _ in range(300):
        losses = torch.rand(50, generator=draw) * 3
        audit.update(torch.arange(50), losses)
        truth += losses.double()
    assert torch.allclose(audit.mean_loss.double(), truth / 300, rtol=1e-5)
    assert torch.equal(audit.mean_weight, torch.ones(50))


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("floating", FLOATS, ids=str)
def test_dtypes(integer, floating):
    audit = ab.LabelAudit(N)
    audit.update(
        torch.tensor([2, 2, 0], dtype=integer), torch.tensor([0.5, 1.5, 3.0], dtype=floating), torch.ones(3).to(floating)
    )
    assert audit.mean_loss[:3].nan_to_num(-1).tolist() == [3.0, -1.0, 1.0] and audit.sums.dtype == torch.float32


@pytest.mark.parametrize("shape, other", [((), (1,)), ((3,), (3, 1)), ((2, 3), (2, 3)), ((3, 1), (1, 3)), ((0,), (0,))])
def test_shapes(shape, other):
    index = torch.zeros(shape, dtype=torch.long)
    ab_audit = ab.LabelAudit(N)
    ab_audit.update(index, torch.full(other, 2.0), mask=torch.ones(other, dtype=torch.bool))
    assert ab_audit.count[0] == index.numel() and ab_audit.sums[0, 0] == 2.0 * index.numel()


def test_tokens_of_a_sample():
    """The mean of its tokens, and each token with the index of its sample."""
    losses, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 5.0, 7.0]]), torch.tensor([[True, True, False], [True, True, True]])
    index, first, second = torch.tensor([4, 1]), ab.LabelAudit(N), ab.LabelAudit(N)
    first.update(index, (losses * mask).sum(1) / mask.sum(1))
    second.update(index[:, None].expand_as(losses), losses, mask=mask)
    assert torch.equal(first.mean_loss.nan_to_num(-1), second.mean_loss.nan_to_num(-1))
    assert second.count.tolist() == [0, 3, 0, 0, 2, 0, 0]
    with pytest.raises(ValueError, match="one number per sample first"):
        first.update(index, losses)


REFUSED = {
    "floating index": (TypeError, "index", lambda a: a.update(torch.ones(2), torch.ones(2))),
    "bool index": (TypeError, "index", lambda a: a.update(torch.ones(2, dtype=torch.bool), torch.ones(2))),
    "list": (TypeError, "index: got list", lambda a: a.update([1, 2], torch.ones(2))),
    "integer losses": (TypeError, "losses: got torch.int64", lambda a: a.update(torch.arange(2), torch.arange(2))),
    "no losses": (TypeError, "losses: got NoneType", lambda a: a.update(torch.arange(2), None)),
    "floating mask": (TypeError, "mask", lambda a: a.update(torch.arange(2), torch.ones(2), mask=torch.ones(2))),
    "too few": (ValueError, "losses: got shape", lambda a: a.update(torch.arange(3), torch.ones(2))),
    "too many weights": (ValueError, "weights: got shape", lambda a: a.update(torch.arange(2), torch.ones(2), torch.ones(3))),
    "another device": (ValueError, "meta", lambda a: a.update(torch.arange(2), torch.ones(2, device="meta"))),
    "too large": (IndexError, f"got {N}, expected 0 <= index < {N}", lambda a: a.update(torch.tensor([0, N]), torch.ones(2))),
    "negative": (IndexError, "got -1", lambda a: a.update(torch.tensor([-1, 0]), torch.ones(2))),
    "ranking": (ValueError, "by: got 'size'", lambda a: a.ranked("size")),
    "no samples": (ValueError, "n_samples", lambda a: ab.LabelAudit(0)),
}


@pytest.mark.parametrize("error, words, call", REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused_changes_nothing(error, words, call):
    audit = filled(BATCHES)
    before = audit.sums.clone()
    with pytest.raises(error, match=words):
        call(audit)
    assert torch.equal(audit.sums, before)


def test_masked_rows_may_have_any_index():
    audit = ab.LabelAudit(N)
    audit.update(torch.tensor([-1, 3, 99]), torch.tensor([5.0, 1.0, 5.0]), mask=torch.tensor([False, True, False]))
    assert audit.count.tolist() == [0, 0, 0, 1, 0, 0, 0] and audit.sums.sum() == 3.0


def test_out_of_range_without_looking(monkeypatch):
    """As on a GPU, where the host does not look: the row does not count."""
    monkeypatch.setattr(ab.LabelAudit, "_check_range", lambda *_: None)
    audit = ab.LabelAudit(N)
    audit.update(torch.tensor([-1, N, 2]), torch.tensor([5.0, 5.0, 1.0]))
    assert audit.count.tolist() == [0, 0, 1, 0, 0, 0, 0] and audit.sums.sum() == 3.0


def test_nothing_waits_for_a_device():
    """Every method runs where tensors have no values to look at."""
    with torch.device("meta"):
        audit = ab.LabelAudit(N)
        audit.update(torch.zeros(3, dtype=torch.long), torch.ones(3), torch.ones(3), mask=torch.ones(3, dtype=torch.bool))
    assert audit.ranked().is_meta and audit.ranked("weight").shape == (N,) and audit.mean_loss.is_meta


def test_no_graph_is_kept():
    audit, losses = ab.LabelAudit(N), torch.rand(3, requires_grad=True)
    audit.update(torch.arange(3), losses * 2, losses * 3)
    assert not audit.sums.requires_grad and audit.sums.grad_fn is None
    (losses * 2).sum().backward()
    assert torch.equal(losses.grad, torch.full((3,), 2.0))
    with torch.inference_mode():
        audit.update(torch.arange(3), torch.ones(3))
    audit.update(torch.arange(3), torch.ones(3))
    assert audit.count[:3].tolist() == [3, 3, 3]


# ---- with a criterion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.5, -0.5, INF])
def test_with_a_criterion(lam):
    logits, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 2, -100, 1, 1])
    criterion, audit = ab.ABLoss(lam=lam), ab.LabelAudit(N)
    index = torch.tensor([6, 0, 3, 2, 5])
    criterion(logits, target).backward()
    audit.update(index, criterion.last.losses, criterion.last.weights, mask=criterion.last.counted)
    assert audit.count.tolist() == [1, 0, 1, 0, 0, 1, 1]  # the ignored row, sample 3, does not count
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(audit.mean_loss[index[target >= 0]], losses[target >= 0].detach())
    assert torch.allclose(audit.mean_weight[index[target >= 0]], criterion.last.weights[target >= 0])


def test_a_loss_that_is_not_finite_does_not_count():
    criterion, audit = ab.ABLoss(lam=-1.0), ab.LabelAudit(3)
    criterion(torch.tensor([[NAN, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1, 0]))
    audit.update(torch.arange(3), criterion.last.losses, criterion.last.weights)
    assert audit.count.tolist() == [0, 1, 1] and audit.sums.isfinite().all()


def test_deferred_weights_are_known_after_the_step():
    """The recipe of docs/audit.md gives the weights of one large batch."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    weights = {}
    for parts in (1, 3):
        torch.manual_seed(1)
        model, audit = torch.nn.Linear(4, 3), ab.LabelAudit(12)
        criterion = ab.ABLoss(lam=-0.5, deferred=True)
        optimizer = ab.ABSGD(model.parameters(), lr=0.1, robust=criterion)
        for _ in range(2):
            optimizer.zero_grad()
            held = []
            for index in torch.arange(12).chunk(parts):
                criterion(model(x[index]), y[index]).backward()
                held.append((index, criterion.last.losses, criterion.last.weights))
            optimizer.step()
            factor = criterion.last.weights.nansum() / held[-1][2].nansum()
            for index, losses, relative in held:
                audit.update(index, losses, relative * factor)
        weights[parts] = audit.mean_weight
    assert torch.allclose(weights[1], weights[3], rtol=1e-4)


# ---- rankings ------------------------------------------------------------------------------------------------------------


def test_ties_keep_their_order_and_unseen_samples_come_last():
    audit = filled([([5, 1, 3, 0, 2], [1.0, 2.0, 1.0, 2.0, -3.0], [1.0] * 5)])
    assert audit.ranked().tolist() == [0, 1, 3, 5, 2, 4, 6]
    assert audit.ranked("weight").tolist() == [0, 1, 2, 3, 5, 4, 6]
    assert ab.LabelAudit(3).ranked().tolist() == [0, 1, 2]


@pytest.mark.parametrize("lam", [1.0, -1.0])
def test_the_weight_that_marks_large_losses_comes_first(lam):
    """Under either sign the ranking by weights is that by losses, as weights are a function of the losses."""
    losses = torch.tensor([0.5, 3.0, 0.1, 2.0, 1.0, 0.7])
    audit = ab.LabelAudit(N)
    audit.update(torch.arange(6), losses, (losses / lam).softmax(0) * 6)
    assert audit.ranked("weight").tolist() == audit.ranked("loss").tolist() == [1, 3, 4, 5, 0, 2, 6]


def test_it_finds_wrong_labels():
    """A linear model on two clouds, in which a tenth of the labels is wrong."""
    torch.manual_seed(0)
    true = torch.arange(200) % 2
    wrong = torch.arange(200) % 10 == 3
    x, y = torch.randn(200, 2) + 4.0 * (2 * true[:, None] - 1), torch.where(wrong, 1 - true, true)
    model, criterion, audit = torch.nn.Linear(2, 2), ab.ABLoss(lam=INF), ab.LabelAudit(200)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(10):
        for index in torch.randperm(200).split(20):
            optimizer.zero_grad()
            criterion(model(x[index]), y[index]).backward()
            optimizer.step()
            audit.update(index, criterion.last.losses, criterion.last.weights)
    assert set(audit.ranked()[:20].tolist()) == set(wrong.nonzero().flatten().tolist())


# ---- state ---------------------------------------------------------------------------------------------------------------


def restored(audit):
    other = ab.LabelAudit(N)
    other.load_state_dict(audit.state_dict())
    return other


def saved(audit):
    buffer = io.BytesIO()
    torch.save(audit.state_dict(), buffer)
    other = ab.LabelAudit(N)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES = {
    "state_dict": restored,
    "saved": saved,
    "deepcopy": copy.deepcopy,
    "pickle": lambda audit: pickle.loads(pickle.dumps(audit)),
    "to": lambda audit: copy.deepcopy(audit).to("cpu"),
    "half": lambda audit: copy.deepcopy(audit).half(),
    "double": lambda audit: copy.deepcopy(audit).double().float(),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_a_copy_goes_on_exactly(copied):
    whole, audit = filled(BATCHES + BATCHES[:1]), filled(BATCHES)
    other = copied(audit)
    other.update(*map(torch.tensor, BATCHES[0]))
    assert torch.equal(other.sums, whole.sums) and other.sums.dtype == torch.float32
    assert torch.equal(audit.sums, filled(BATCHES).sums)


def test_the_state_is_no_buffer_and_has_its_size():
    audit = ab.LabelAudit(N)
    assert list(audit.state_dict()) == ["sums"] and not list(audit.buffers()) and repr(audit) == f"LabelAudit({N})"
    with pytest.raises(RuntimeError, match="size mismatch"):
        audit.load_state_dict(ab.LabelAudit(N + 1).state_dict())
    filled_audit = filled(BATCHES)
    filled_audit.reset_parameters()
    assert not filled_audit.sums.any()


def _uneven(rank):
    """Rank 0 has two batches, rank 1 one; sample 2 is on both, as a DistributedSampler's padding."""
    audit = filled(BATCHES[:2] if rank == 0 else [([2, 6], [4.0, 5.0], [1.0, 1.0])])
    before = audit.sums.clone()
    merged = audit.merged()
    assert torch.equal(merged.sums, (filled([*BATCHES[:2], ([2, 6], [4.0, 5.0], [1.0, 1.0])])).sums)
    assert torch.equal(audit.sums, before) and torch.equal(audit.merged().sums, merged.sums)  # twice adds nothing
    assert torch.equal(audit.merged(process_group=None).sums, before)
    own = dist.new_group([0, 1])
    assert torch.equal(audit.merged(own).sums, merged.sums)
    with pytest.raises(ValueError, match=r"n_samples of LabelAudit: got \[7, 8\]"):
        ab.LabelAudit(N + rank).merged()


@needs_gloo
def test_processes_are_added_up(tmp_path):
    run(_uneven, tmp_path)


def test_one_process_alone():
    audit = filled(BATCHES)
    assert torch.equal(audit.merged().sums, audit.sums) and audit.merged() is not audit
    with pytest.raises(TypeError, match="process_group"):
        audit.merged("all")


# ---- the file ------------------------------------------------------------------------------------------------------------


def parts(**more):
    return {"audit": filled(BATCHES).state_dict(), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0])} | more


def test_a_file_of_ones_own(tmp_path):
    torch.save(parts(), tmp_path / "audit.pt")
    found = files.load(tmp_path / "audit.pt")
    assert torch.equal(found.audit.sums, filled(BATCHES).sums) and found.flipped is None and found.name(2) == "2"
    images = torch.rand(N, 4, 4)
    more = dict(
        predictions=torch.zeros(N, dtype=torch.uint8),
        true_labels=torch.tensor([0, 1, 0, 0, 1, 2, 0]),
        images=images,
        classes=["a", "b", "c"],
        title="mine",
    )
    files.save(tmp_path / "new" / "audit.pt", parts(**more))
    found = files.load(tmp_path / "new" / "audit.pt")
    assert found.name(2) == "c" and found.precision("loss") == (1, 0.0) and found.images.shape == (N, 1, 4, 4)
    assert found.images.min() == 0 and found.images.max() == 255


class Evil:
    def __reduce__(self):
        return print, ("run",)


WRONG_FILES = {
    "no labels": ({"audit": {}}, "no audit and labels"),
    "no state": (parts(audit={"sums": torch.ones(2, 3)}), "audit: got no such state"),
    "floating labels": (parts(labels=torch.ones(N)), "labels: got torch.float32"),
    "too few labels": (parts(labels=torch.arange(3)), "labels: got 3 of them, but 7 samples"),
    "too few images": (parts(images=torch.rand(3, 4, 4)), "image_index"),
    "an image too far": (parts(images=torch.rand(1, 4, 4), image_index=torch.tensor([N])), "image_index"),
    "two channels": (parts(images=torch.rand(N, 2, 4, 4)), "images: got torch.float32"),
    "classes": (parts(classes=[1, 2]), "classes: got"),
    "unknown key": (parts(pictures=1), "'pictures'"),
    "an object": (parts(title=Evil()), r"lists and dicts \(\S*print\)"),
    "no title": (parts(title=None), "title: got NoneType"),
    "complex images": (parts(images=torch.ones(N, 4, 4) * 1j), "images: got torch.complex64"),
    "images without pixels": (parts(images=torch.ones(N, 0, 4)), "images: got torch.float32"),
    "a NaN": (parts(audit={"sums": torch.full((3, N), NAN)}), "not finite"),
    "an infinite loss": (parts(audit={"sums": torch.tensor([[INF], [1.0], [1.0]])}), "not finite"),
    "a negative count": (parts(audit={"sums": -torch.ones(3, N)}), "counts that are not 0, 1, 2"),
    "a broken count": (parts(audit={"sums": torch.full((3, N), 0.5)}), "counts that are not 0, 1, 2"),
}
# tensors that are not what they seem: {name: function of an ordinary one}
ODD = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x.flatten()[:1].expand((*x.shape[:-1], 10**9)),  # a kilobyte that would need terabytes
}


@pytest.mark.parametrize("key", ["audit", "labels", "predictions", "true_labels", "image_index", "images"])
@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_a_tensor_without_its_numbers_is_refused(key, odd, tmp_path):
    full = parts(images=torch.rand(N, 4, 4), **dict.fromkeys(("predictions", "true_labels", "image_index"), torch.arange(N)))
    full[key] = {"sums": odd(full[key]["sums"])} if key == "audit" else odd(full[key])
    torch.save(full, tmp_path / "audit.pt")
    with pytest.raises(ValueError, match=f"{key}: got "):
        files.load(tmp_path / "audit.pt")


PIXELS = {
    "floats": ([0.0, 0.5, 1.0], [0, 128, 255]),
    "integers": ([0, 128, 255], [0, 128, 255]),
    "bools": ([False, True], [0, 255]),
    "constant": ([3.0, 3.0], [0, 0]),
    "not finite": ([NAN, -INF, -1.0, 0.0, 1.0, INF], [0, 0, 0, 128, 255, 255]),
    "nothing finite": ([NAN, INF], [0, 0]),
    "the whole range": ([-3e38, 0.0, 3e38], [0, 128, 255]),
}


@pytest.mark.parametrize("images, shown", PIXELS.values(), ids=list(PIXELS))
def test_pixels(images, shown):
    assert files.pixels(torch.tensor(images)).tolist() == shown


@pytest.mark.parametrize("content, words", WRONG_FILES.values(), ids=list(WRONG_FILES))
def test_a_wrong_file_is_refused(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "audit.pt")
    with pytest.raises(ValueError, match=words):
        files.load(tmp_path / "audit.pt")
    assert "run" not in capsys.readouterr().out


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(parts(), tmp_path / "audit.pt")
    content = (tmp_path / "audit.pt").read_bytes()
    for damaged in (b"", b"hello", content[:-9]):
        (tmp_path / "audit.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"audit\.pt"):
            files.load(tmp_path / "audit.pt")


# names as a user or a hostile file may write them; what the pages show of each
NAMES = {
    "[/red]": "[/red]",
    "[bold]b": "[bold]b",
    ":cat:": ":cat:",
    "$\\foo$": "$\\foo$",
    "a\n\x1b[2Jb": "a [2Jb",
    "": "6",
    "n" * 30: "n" * 30,
}


def test_names_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    """No markup of rich, no mathematics of matplotlib, no control characters; also in the folder's name and the title."""
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "[/x] :cat:"
    more = dict(classes=[*list(NAMES)[:5], "n" * 30, ""], images=torch.rand(N, 4, 4), title="[/t] $\\foo$\x1b")
    files.save(folder / "audit.pt", parts(labels=torch.arange(N), **more))
    assert cli.main(["audit", str(folder), "--top", str(N)]) == 0
    shown, page = capsys.readouterr().out, (folder / "audit.html").read_text()
    for name in [*NAMES.values(), "[/t] $\\foo$"]:
        assert name in shown.replace("\n", " ") and name in page, name
    assert f"written: {folder}/audit.csv" in shown and "\x1b" not in shown + page


def test_the_sheet_has_at_most_so_many_images(monkeypatch):
    monkeypatch.setattr(audit_report, "IMAGES", 3)
    found = files.Findings(filled(BATCHES), torch.zeros(N, dtype=torch.long), images=torch.zeros(N, 1, 2, 2).byte())
    found = dataclasses.replace(found, image_index=torch.arange(N))
    assert len(audit_report.sheet(found, "loss", 100).axes) == 3


def test_pages(tmp_path):
    torch.save(parts(images=torch.rand(N, 3, 4, 4), classes=["<a>", "b", "c"]), tmp_path / "audit.pt")
    found = files.load(tmp_path / "audit.pt")
    paths = audit_report.write(found, tmp_path, "loss", 3)
    assert [path.name for path in paths] == ["audit.csv", "audit.png", "audit.html"]
    rows = list(csv.DictReader((tmp_path / "audit.csv").open()))
    assert [int(row["index"]) for row in rows] == found.audit.ranked().tolist()
    assert (
        rows[0] == dict(rank="1", index="5", given="2", predicted="", mean_loss="4", mean_weight="1", seen="1", flipped="")
        and rows[-1]["mean_loss"] == ""
    )
    page = (tmp_path / "audit.html").read_text()
    assert "&lt;a&gt;" in page and "<a>" not in page and "2 of them were never seen" in page and page.count("<tr>") == 4
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"
    torch.save(parts(), tmp_path / "audit.pt")
    assert len(audit_report.write(files.load(tmp_path / "audit.pt"), tmp_path, "weight", 3)) == 2


# ---- the command line ----------------------------------------------------------------------------------------------------

QUICK = ["train", "--model", "linear", "--epochs", "3", "--noise", "symmetric", "--noise-rate", "0.2", "--audit", "--seeds", "1"]
METHODS = "sgd,absgd,term,cvar,groupdro,l2rw,proportion,resample,hard-mining,random"


def test_command_line(tmp_path, capsys, monkeypatch):
    """Every method writes its audit, and the pages show it."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([*QUICK, "--methods", METHODS, "--out", "out"]) == 0
    names = sorted(path.stem for path in (tmp_path / "out" / "audit").iterdir())
    assert names == sorted(f"{method}-0" for method in METHODS.split(","))
    for name in names:
        found = files.load(tmp_path / "out" / "audit" / f"{name}.pt")
        seen = found.audit.count
        assert seen.sum() == 3 * len(found.labels) and (name == "resample-0" or (seen == 3).all())
        assert found.precision("loss")[1] > 0.3 and 0.15 < found.flipped.double().mean() < 0.25
        assert ((found.audit.mean_weight[seen > 0] - 1).abs() < 1e-6).all() == (name in ("sgd-0", "resample-0"))
    capsys.readouterr()
    assert cli.main(["audit", "out", "--top", "5"]) == 0
    shown = capsys.readouterr().out
    assert "digits, sgd, seed 0" in shown and "written: out/audit.csv, out/audit.png, out/audit.html" in shown
    assert cli.main(["audit", "out", "--run", "l2rw-0", "--by", "weight", "--top", "5"]) == 0
    for argv, words in (
        (["audit", "nowhere"], "train --audit"),
        (["audit", "out", "--run", "adam-0"], "'adam-0'"),
        (["audit", "out", "--top", "0"], "top: got 0"),
        (["audit", "out", "--by", "weight"], "all samples of sgd-0 have the same weight"),
        (["audit", "out", "--by", "size"], "'size'"),
    ):
        capsys.readouterr()
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err


SHOWN = 200


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A folder with the audits of trainings on 1100 samples, of which the files have some images."""
    folder = tmp_path_factory.mktemp("audited")
    argv = [*QUICK[:4], "3", *QUICK[5:], "--methods", "sgd,resample,cvar", "--out", str(folder)]
    assert cli.main(argv) == 0
    return folder


@pytest.mark.parametrize("by", ["loss", "weight"])
def test_the_first_of_both_rankings_have_their_images(by, audited):
    found = files.load(audited / "audit" / "cvar-0.pt")
    first = {ranking: found.audit.ranked(ranking)[:SHOWN].tolist() for ranking in ("loss", "weight")}
    assert set(first["loss"]) != set(first["weight"])  # or else nothing is seen here
    assert sorted(found.image_index.tolist()) == sorted({*first["loss"], *first["weight"]})
    split = train.draw(train.Config(noise="symmetric", noise_rate=0.2), train.data.load_source("digits"), 0)
    assert torch.equal(found.images, files.pixels(split.x[found.image_index]))
    sheet = audit_report.sheet(found, by, SHOWN)
    ranks = [int(axes.get_title().split()[0].removeprefix("#")) for axes in sheet.axes if axes.get_title()]
    assert ranks == list(range(1, SHOWN + 1)) and "The contact sheet" not in audit_report.words(found, by, SHOWN)


@pytest.mark.parametrize("method", ["sgd", "resample"])
def test_without_weights_there_is_one_ranking(method, audited):
    found = files.load(audited / "audit" / f"{method}-0.pt")
    assert found.image_index.tolist() == found.audit.ranked()[:SHOWN].tolist()


def test_the_samples_without_an_image_are_counted(audited, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["audit", str(audited), "--top", "230"]) == 0
    sentence = "The contact sheet shows 200 of the 230 samples of the table: 30 have no image in the file."
    assert sentence in " ".join(capsys.readouterr().out.split()) and sentence in (audited / "audit.html").read_text()
    assert cli.main(["audit", str(audited), "--top", "200"]) == 0
    assert "The contact sheet shows" not in capsys.readouterr().out + (audited / "audit.html").read_text()


def test_both_reasons_to_leave_samples_out(monkeypatch):
    monkeypatch.setattr(audit_report, "IMAGES", 3)
    found = files.Findings(filled(BATCHES), torch.zeros(N, dtype=torch.long), images=torch.zeros(N, 1, 2, 2).byte())
    whole = dataclasses.replace(found, image_index=torch.arange(N))
    assert audit_report.words(whole, "loss", N).endswith(" shows 3 of the 7 samples of the table: a sheet has at most 3.")
    four = dataclasses.replace(found, images=found.images[:4], image_index=torch.arange(4))
    assert audit_report.words(four, "loss", 100).endswith(
        " shows 3 of the 7 samples of the table: 3 have no image in the file, and a sheet has at most 3."
    )
    none = dataclasses.replace(found, images=None)
    assert "The contact sheet" not in audit_report.words(none, "loss", N)


def test_another_training_in_the_same_folder_leaves_no_audits_of_the_first(tmp_path, monkeypatch):
    """Its other results are replaced too. A file of the user's own stays."""
    monkeypatch.chdir(tmp_path)
    seen = []
    for options in (["--methods", "sgd,absgd"], ["--methods", "absgd"], ["--methods", "sgd"]):
        quick = [word for word in QUICK if word != "--audit" or options[1] != "sgd"]
        assert cli.main([*quick, *options, "--out", "out"]) == 0
        (tmp_path / "out" / "audit" / "mine.pt").touch()
        seen.append(sorted(path.stem for path in (tmp_path / "out" / "audit").iterdir()))
    assert seen == [["absgd-0", "mine", "sgd-0"], ["absgd-0", "mine"], ["mine"]]


def test_how_long_it_is_recorded():
    """Half of the epochs, and at least ten."""
    seen = []
    for epochs in (4, 24):
        config = train.Config(model="linear", epochs=epochs, seeds=1, methods=("sgd",), audit=True, batch_size=256)
        list(train.runs(config, on_audit=lambda method, seed, parts: seen.append(parts["audit"]["sums"][2].unique().tolist())))
    assert seen == [[4], [12]]


def test_without_the_option_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train.Config(model="linear", epochs=1, seeds=1, methods=("sgd",))
    assert list(train.runs(config, on_audit=lambda *_: pytest.fail("an audit")))


def test_a_resumed_training_has_the_same_audit(tmp_path):
    config = train.Config(model="linear", epochs=3, seeds=1, methods=("absgd",), audit=True, noise="symmetric")
    source = train.data.load_source("digits")
    whole, states, resumed = [], [], []

    def keep(take, finished):
        if len(states) < 20 and not finished:
            states.append(checkpoint_of(take(), tmp_path))

    first = list(train.runs(config, source, keep=keep, on_audit=lambda *given: whole.append(given)))
    second = list(train.runs(config, source, state=states[-1], on_audit=lambda *given: resumed.append(given)))
    assert [run["parameters"] for run in first] == [run["parameters"] for run in second]
    assert whole[0][:2] == resumed[0][:2] == ("absgd", 0)
    assert torch.equal(whole[0][2]["audit"]["sums"], resumed[0][2]["audit"]["sums"])
    assert torch.equal(whole[0][2]["predictions"], resumed[0][2]["predictions"])


def checkpoint_of(state, folder):
    checkpoint.save(folder / "state.pt", state)
    return checkpoint.load(folder / "state.pt")


def test_the_results_do_not_depend_on_it(tmp_path, monkeypatch):
    """Neither the parameters nor the random numbers."""
    source = train.data.load_source("digits")
    options = dict(model="cnn", epochs=1, seeds=1, methods=("sgd", "l2rw"), noise="symmetric")
    with_audit, without = (
        [run["parameters"] for run in train.runs(train.Config(audit=audit, **options), source)] for audit in (True, False)
    )
    assert with_audit == without
    json.dumps(next(train.runs(train.Config(audit=True, **options), source)))  # a run stays ready for JSON


def test_inside_a_compiled_step():
    torch._dynamo.reset()
    audit = ab.LabelAudit(N)

    @torch.compile(backend="eager", fullgraph=True)
    def step(index, losses, weights):
        audit.update(index, losses * 1.0, weights)

    for batch in BATCHES:
        step(*map(torch.tensor, batch))
    assert torch.equal(audit.sums, filled(BATCHES).sums)


# ---- beside cleanlab -----------------------------------------------------------------------------------------------------


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    """One small cell, with a stand-in for cleanlab's function, whose definition this is."""
    rank = types.ModuleType("cleanlab.rank")
    rank.get_label_quality_scores = lambda labels, probabilities, method: probabilities[range(len(labels)), labels]
    monkeypatch.setitem(sys.modules, "cleanlab", types.ModuleType("cleanlab"))
    monkeypatch.setitem(sys.modules, "cleanlab.rank", rank)
    cell = benchmark.Cell("digits", "linear", "symmetric", 0.2, seeds=2, epochs=4, lr=0.1, batch_size=64)
    monkeypatch.setattr(benchmark, "CELLS", {"small": [cell]})
    assert benchmark.main(["--cells", "small", "--out", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["audit"]
    assert set(row["methods"]) == set(benchmark.METHODS)
    for name, found in row["methods"].items():
        assert all(0.2 < p < 1 for p in found["precision"]) and all(0 < s < 60 for s in found["seconds"]), name
    seconds = {name: found["seconds"][0] for name, found in row["methods"].items()}
    assert seconds["loss, first quarter"] < seconds["loss, first half"] < seconds["loss"] < seconds["cleanlab"]
    assert "digits linear" in capsys.readouterr().out


def test_the_table_is_that_of_the_record():
    root = Path(benchmark.__file__).resolve().parents[1]
    record = json.loads((root / "benchmarks" / "results" / "audit.json").read_text())
    assert benchmark.markdown(record["audit"]) in (root / "docs" / "audit.md").read_text()
