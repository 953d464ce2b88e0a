"""The skorch recipe of docs/integrations.md: the parameters are those of the plain loop (truth.py), predict_proba gives
probabilities, and the state is saved."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import truth
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler

import absgd_fast as ab

EPOCHS, ROWS = 4, 12


def doubled(**options):
    """An ABLoss whose log s is float64, as the model."""
    return ab.ABLoss(**options).double()


def classifier(optimizer="SGD", clip=None, dtype=torch.float32, **more):
    """The recipe, on samples in their order and without skorch's validation split."""
    make = truth.OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    more = {"criterion__lam": truth.LAM, "criterion__report": "mean"} | more
    return NeuralNetClassifier(
        truth.network(dtype),
        criterion=ab.ABLoss if dtype == torch.float32 else doubled,
        predict_nonlinearity=partial(torch.softmax, dim=-1),
        optimizer=make,
        lr=make.keywords["lr"],
        batch_size=ROWS,
        max_epochs=EPOCHS,
        train_split=None,
        verbose=0,
        callbacks=[] if clip is None else [GradientNormClipping(clip)],
        **more,
    )


def arrays(dtype=torch.float32):
    x, y = truth.samples(30, dtype)
    return x.numpy(), y.numpy()


def wanted(dtype=torch.float32, epochs=EPOCHS, **options):
    """12, 12 and 6 samples in an epoch, as ROWS cuts them."""
    batches = truth.big_batches(truth.samples(30, dtype), 10, 4, epochs)
    return truth.train(truth.network(dtype), batches, **options)


@pytest.mark.parametrize("clip", [None, truth.CLIP])
@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_training(optimizer, dtype, clip):
    net = classifier(optimizer, clip, dtype).fit(*arrays(dtype))
    want = wanted(dtype, optimizer=optimizer, max_norm=clip)
    truth.assert_same(net.module_, want, dtype)
    means = np.average(np.reshape(want.means, (EPOCHS, 3)), axis=1, weights=[12, 12, 6])
    assert net.history[:, "train_loss"] == pytest.approx(means, rel=1e-5)


def test_our_optimizer():
    make = partial(ab.ABSGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    truth.assert_same(classifier(make).fit(*arrays()).module_, wanted())


def test_predict_proba_gives_probabilities():
    """S9: skorch knows only torch's own losses, so without predict_nonlinearity it gives logits."""
    x, y = arrays()
    net = classifier().fit(x, y)
    assert net.predict_proba(x).sum(1) == pytest.approx(np.ones(len(x)), rel=1e-6)
    assert (net.predict(x) == net.predict_proba(x).argmax(1)).all()
    logits = net.set_params(predict_nonlinearity="auto").predict_proba(x)
    assert abs(logits.sum(1) - 1).max() > 0.1


def test_a_collapse_shows_in_the_printed_loss():
    """S9: at a small |lambda| the robust loss falls to 0 while the model gets worse. report="mean" prints the plain mean."""
    printed = {}
    for report in ("robust", "mean"):
        net = classifier(criterion__report=report, criterion__lam=-0.01).fit(*arrays())
        printed[report] = net.history[-1, "train_loss"]
    assert printed["robust"] < 0.1 < 1 < printed["mean"]


def test_resume(tmp_path):
    """save_params with f_criterion: the same bits as without the interruption."""
    x, y = arrays()
    whole = classifier(clip=truth.CLIP).fit(x, y)
    files = {f"f_{part}": tmp_path / f"{part}.pt" for part in ("params", "optimizer", "criterion")}
    first = classifier(clip=truth.CLIP).set_params(max_epochs=2).fit(x, y)
    first.save_params(**files)
    second = classifier(clip=truth.CLIP).initialize()
    second.load_params(**files)
    second.set_params(max_epochs=2).partial_fit(x, y)
    assert truth.distance(second.module_, whole.module_) == 0
    assert second.criterion_.log_s == whole.criterion_.log_s


class SwitchLam(Callback):
    """As in docs/integrations.md."""

    def on_train_begin(self, net, **kwargs):
        count = net.criterion_.two_stage_count or 0
        self.schedule_ = ab.TwoStage(net.criterion_, lam=truth.LAM, start=2)
        self.schedule_.load_state_dict({"count": count})

    def on_epoch_end(self, net, **kwargs):
        self.schedule_.step()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_schedule(stop, tmp_path):
    """Stepped after each epoch; resumed before, at and after the switch of lambda it gives the same bits."""
    x, y = arrays()
    make = lambda: classifier().set_params(callbacks=[SwitchLam()])  # noqa: E731
    whole = make().fit(x, y)
    truth.assert_same(whole.module_, wanted(lam=lambda step: math.inf if step < 6 else truth.LAM))  # 3 steps in an epoch
    files = {f"f_{part}": tmp_path / f"{part}.pt" for part in ("params", "optimizer", "criterion")}
    make().set_params(max_epochs=stop).fit(x, y).save_params(**files)
    second = make().initialize()
    second.load_params(**files)
    second.set_params(max_epochs=EPOCHS - stop).partial_fit(x, y)
    assert truth.distance(second.module_, whole.module_) == 0 and second.criterion_.log_s == whole.criterion_.log_s


def test_the_scheduler_of_learning_rates_takes_no_schedule():
    """As the page says: skorch makes it from an optimizer."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'last_epoch'"):
        classifier().set_params(callbacks=[LRScheduler(policy=ab.TwoStage)]).fit(*arrays())


def test_validation_leaves_the_state_alone():
    """skorch's validation split runs the criterion in eval mode."""
    from skorch.dataset import ValidSplit

    x, y = arrays()
    net = classifier()
    net.set_params(train_split=ValidSplit(3, stratified=False)).fit(x, y)
    assert math.isfinite(net.criterion_.log_s) and net.criterion_.training is False
    split = net.get_split_datasets(x, y)[0]
    part = [torch.stack([torch.as_tensor(t) for t in column]) for column in zip(*split, strict=True)]
    batches = [tuple(t[start : start + ROWS] for t in part) for _ in range(EPOCHS) for start in range(0, len(part[0]), ROWS)]
    want = truth.train(truth.network(), batches)
    truth.assert_same(net.module_, want)
    assert float(net.criterion_.log_s) == pytest.approx(float(want.log_s), rel=1e-5)


def test_grid_search():
    """lambda is an argument of the criterion's constructor, so scikit-learn can search for it."""
    x, y = arrays()
    search = GridSearchCV(classifier(), {"criterion__lam": [-0.5, math.inf]}, cv=2, error_score="raise")
    search.fit(x, y)
    assert search.best_params_["criterion__lam"] in (-0.5, math.inf)
    assert clone(classifier()).get_params()["criterion__lam"] == truth.LAM
