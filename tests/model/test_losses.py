"""Losses of tasks: against formulas in plain loops, their predictions, the whole mean, and losses of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ssr_rec.common.errors import UserError
from ssr_rec.config.losses import CrossEntropyConfig, FocalConfig, LogNormalConfig, MSEConfig
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.schema import Schema
from ssr_rec.metrics.links import Link
from ssr_rec.model.loss import MeanLoss
from ssr_rec.model.losses.contract import check_loss
from ssr_rec.model.losses.pointwise import MSE, CrossEntropy, Focal, LogNormal
from ssr_rec.model.losses.registry import build_losses
from ssr_rec.training.own_metrics import check_metric, own_metrics
from ssr_rec.training.setup import check_train_config

SECONDS = NumberLabel(name="watch_s", mean=20.0, std=30.0, log_mean=2.5, log_std=1.25, low=0.0, high=400.0)
DEGREES = NumberLabel(name="degrees", mean=5.0, std=10.0, low=-20.0, high=40.0)
FEATURE = Feature(name="user", kind="categorical", num_embeddings=9, encoding=Drawn(column="user"))
SCHEMA = Schema(name="x", dataset_id="x", features=[FEATURE], labels=["click", "watch_s"], numbers=[SECONDS], splits={})


def drawn(rows: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 2, generator=rng)
    clicks = (torch.rand(rows, generator=rng) < 0.4).float()
    seconds = torch.exp(torch.randn(rows, generator=rng) + 2)
    return logits, torch.stack([clicks, seconds], 1), 3 * torch.rand(rows, 2, generator=rng)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.5, 0.9), (0.0, None), (3.0, None)])
def test_focal_is_the_papers(gamma: float, alpha: float | None) -> None:
    logits, labels, _ = drawn()
    found = Focal(FocalConfig(gamma=gamma, alpha=alpha))(logits[:, 0], labels[:, 0])
    for x, y, loss in zip(logits[:, 0].tolist(), labels[:, 0].tolist(), found.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p_t = p if y == 1 else 1 - p
        a_t = 1.0 if alpha is None else alpha if y == 1 else 1 - alpha
        assert loss == pytest.approx(-a_t * (1 - p_t) ** gamma * math.log(p_t), rel=1e-5)


def test_focal_of_extreme_logits_has_finite_gradients() -> None:
    x = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    loss = Focal(FocalConfig(gamma=0.5))(x, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    loss.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and loss.tolist() == pytest.approx([0, 0, 50, 150])


def test_smoothing_is_torchs_of_two_classes() -> None:
    logits, labels, _ = drawn()
    mine = CrossEntropy(CrossEntropyConfig(label_smoothing=0.2))(logits[:, 0], labels[:, 0])
    two = torch.stack([torch.zeros(50), logits[:, 0]], 1)
    theirs = cross_entropy(two, labels[:, 0].long(), label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(mine, theirs)


def test_squared_errors_are_of_scaled_labels_and_predictions_in_their_units() -> None:
    logits, labels, _ = drawn()
    x, y = logits[:, 1], labels[:, 1]
    mse = MSE(MSEConfig(), SECONDS)
    predicted = mse.link().predict(x.numpy())
    np.testing.assert_allclose(predicted, 20 + 30 * x.double().numpy(), rtol=1e-12)
    np.testing.assert_allclose(mse(x, y), ((predicted - y.numpy()) / 30) ** 2, rtol=1e-4, atol=1e-6)
    log = LogNormal(LogNormalConfig(), SECONDS)
    wanted = (x.double() - (y.double().log1p() - 2.5) / 1.25) ** 2
    np.testing.assert_allclose(log(x, y).detach(), wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        log.log_variance.fill_(math.log(0.4) / log.RATE)
    means = np.exp(2.5 + 1.25 * x.double().numpy() + 0.4 * 1.25**2 / 2) - 1
    np.testing.assert_allclose(log.link().predict(x.numpy()), np.maximum(means, 0), rtol=1e-6)


def test_log_normal_learns_the_variance_and_with_it_the_mean_of_the_label() -> None:
    """Of rows drawn from two log-normals the predictions have the means of the draws, which exp(mu) would not."""
    rng = torch.Generator().manual_seed(3)
    kind = torch.arange(40_000) % 2
    y = torch.exp(1.0 + kind + 0.8 * torch.randn(40_000, generator=rng)) - 1
    y = y.clamp(min=0)
    logs = y.double().log1p()
    number = NumberLabel(
        name="y", mean=1, std=1, log_mean=float(logs.mean()), log_std=float(logs.std()), low=0, high=float(y.max())
    )
    loss, x = LogNormal(LogNormalConfig(), number), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [x], "lr": 0.05}, {"params": loss.parameters(), "lr": 1e-3}])
    for _ in range(300):
        optimizer.zero_grad()
        loss(x[kind], y).mean().backward()
        optimizer.step()
    means = loss.link().predict(x.detach().numpy())
    for one, mean in enumerate(means):
        assert mean == pytest.approx(float(y[kind == one].double().mean()), rel=0.03)
    medians = np.exp(number.log_mean + number.log_std * x.detach().numpy()) - 1
    assert (medians < 0.8 * means).all()


def mean_of(weighting: str, losses: dict[str, str], weights: torch.Tensor | None) -> tuple[MeanLoss, torch.Tensor]:
    config = TrainConfig.model_validate({"losses": losses, "task_weighting": weighting, "monitor_task": "click"})
    mean = MeanLoss([1.0, 3.0], build_losses(config, SCHEMA), weighting == "uncertainty")
    logits, labels, _ = drawn()
    return mean, mean(logits, labels, weights, len(logits))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_over_weights_and_tasks(weighted: bool) -> None:
    logits, labels, drawn_weights = drawn()
    weights = drawn_weights if weighted else None
    of_rows = torch.stack(
        [
            Focal(FocalConfig())(logits[:, 0], labels[:, 0]),
            LogNormal(LogNormalConfig(), SECONDS)(logits[:, 1], labels[:, 1]).detach(),
        ],
        dim=1,
    ).double()
    w = drawn_weights.double() if weighted else torch.ones(50, 2).double()
    of_tasks = (of_rows * w).sum(0) / w.sum(0)
    losses = {"click": "focal", "watch_s": "log_normal"}
    mean, found = mean_of("fixed", losses, weights)
    assert found.item() == pytest.approx((of_tasks[0] + 3 * of_tasks[1]).item() / 4, rel=1e-5)
    assert mean.figures() == {}
    mean, _ = mean_of("uncertainty", losses, weights)
    s = torch.tensor([0.5, -1.0])
    with torch.no_grad():
        mean.log_variances.copy_(s)
    terms = [of_tasks[0] * math.exp(-0.5) + 0.25, of_tasks[1] * math.e / 2 - 0.5]
    found = mean(logits, labels, weights, 50)
    assert found.item() == pytest.approx((terms[0] + 3 * terms[1]).item() / 4, rel=1e-5)
    found.backward()
    wanted = [(-of_tasks[0] * math.exp(-0.5) + 0.5) / 4, 3 * (-of_tasks[1] * math.e / 2 + 0.5) / 4]
    assert mean.log_variances.grad.tolist() == pytest.approx([float(one) for one in wanted], rel=1e-4)
    assert mean.figures()["task_weights"] == pytest.approx({"click": math.exp(-0.5), "watch_s": math.e})


def test_weights_of_two_and_zero_are_copies_and_absence_and_a_task_without_rows_adds_nothing() -> None:
    logits, labels, _ = drawn()
    weights = torch.ones(50, 2)
    weights[:10], weights[40:] = 2, 0
    order = [*range(10), *range(40)]
    for weighting in ("fixed", "uncertainty"):
        mean, found = mean_of(weighting, {"click": "focal", "watch_s": "mse"}, weights)
        plain = mean(logits[order], labels[order], None, 50)
        assert found.item() == pytest.approx(plain.item(), rel=1e-6)
        masked = torch.ones(50, 2)
        masked[:, 1] = 0
        x = logits.clone().requires_grad_()
        mean(x, labels, masked, 50).backward()
        gradients = [x.grad.T, *(parameter.grad for parameter in mean.parameters())]
        assert all(gradient[0].any() and not gradient[1].any() for gradient in gradients)


def test_cross_entropy_is_computed_as_before_to_the_bit() -> None:
    logits, labels, weights = drawn()
    labels = (labels > 1).float()
    both = Schema(name="x", dataset_id="x", features=[FEATURE], labels=["a", "b"], splits={})
    named = build_losses(TrainConfig.model_validate({"losses": {"a": "cross_entropy"}}), both)
    for given in (None, weights):
        before = MeanLoss([1.0, 3.0])(logits, labels, given, 50)
        assert torch.equal(MeanLoss([1.0, 3.0], named)(logits, labels, given, 50), before)


OWN = """
import torch
from pydantic import BaseModel, Field

from ssr_rec.metrics.links import Link
from ssr_rec.model.losses import TaskLoss


class Settings(BaseModel):
    delta: float = Field(1.0, gt=0)


class Huber(TaskLoss):
    settings_class = Settings
    kinds = ("number",)

    def forward(self, logits, labels):
        target = (labels - self.number.mean) / self.number.std
        return torch.nn.functional.huber_loss(logits, target, reduction="none", delta=self.settings.delta)

    def link(self):
        return Link(function="identity", scale=self.number.std, shift=self.number.mean)


class Hinge(Huber):
    kinds = ("binary",)

    def link(self):
        return Link(function="identity")


class Together(Huber):
    def forward(self, logits, labels):
        return super().forward(logits - logits.mean(), labels)


class Unused(Huber):
    def __init__(self, settings, number=None):
        super().__init__(settings, number)
        self.scale = torch.nn.Parameter(torch.ones(1))


def share(scores, labels, weights, groups):
    return (scores > labels).mean()


def few(scores, labels):
    return 0.0


def changes(scores, labels, weights, groups):
    scores[:] = 0
    return 0.0


def auc(scores, labels, weights, groups):
    return 0.5


number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_loss.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_loss_of_ones_own_keeps_the_contract_or_is_told_where_not(own: None) -> None:
    check_loss("my_loss:Huber", {"delta": 2.0})
    with pytest.raises(AssertionError, match="depends on the other rows"):
        check_loss("my_loss:Together")
    with pytest.raises(AssertionError, match="scale gets no gradient"):
        check_loss("my_loss:Unused")
    with pytest.raises(UserError, match="a binary label's link must be a sigmoid, this loss's is identity"):
        check_loss("my_loss:Hinge")
    for path, said in (("my_loss:Nothing", "my_loss has no Nothing"), ("my_loss:Settings", "must be a subclass of")):
        with pytest.raises(UserError, match=said):
            check_loss(path)
    with pytest.raises(UserError, match=r"settings\.delta: Input should be greater than 0"):
        check_loss("my_loss:Huber", {"delta": 0})
    config = TrainConfig.model_validate({"losses": {"watch_s": "my_loss:Huber"}})
    assert build_losses(config, SCHEMA).links() == {"watch_s": Link(function="identity", scale=30.0, shift=20.0)}


def test_a_measure_of_ones_own_keeps_the_contract_or_is_told_where_not(own: None) -> None:
    check_metric("my_loss:share")
    with pytest.raises(AssertionError, match="it changes its arguments"):
        check_metric("my_loss:changes")
    for path, said in (
        ("my_loss:auc", "auc is a measure already"),
        ("my_loss:number", "int is no function"),
        ("my_loss:nothing", "my_loss has no nothing"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("my_loss:few", "few must take scores, labels, weights and groups: too many positional arguments"),
    ):
        with pytest.raises(UserError, match=said):
            own_metrics([path])


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"losses": {"buy": "focal"}}, r"train\.losses names 'buy'; the labels are click, watch_s"),
        (
            {"losses": {"watch_s": "focal"}},
            r"train\.losses\.watch_s: focal is for binary labels, this one is number: mse",
        ),
        (
            {"losses": {"click": "mse"}},
            r"train\.losses\.click: mse is for number labels, this one is binary: cross_entropy",
        ),
        ({"monitor": "rmse", "monitor_task": "click"}, r"train\.monitor: rmse, but click is binary: use auc"),
        ({"monitor_task": "watch_s"}, r"train\.monitor: auc, but watch_s is numbers: use rmse"),
        ({"monitor": "rmse", "task_weights": {"watch_s": 0}}, r"train\.monitor: rmse, but click is binary"),
        ({"entire_space": {"watch_s": "click"}}, r"train\.entire_space: 'watch_s' is a number"),
    ],
)
def test_what_does_not_fit_is_refused(train: dict, said: str) -> None:
    config = TrainConfig.model_validate(train)
    with pytest.raises(UserError, match=said):
        check_train_config(config, SCHEMA)
        build_losses(config, SCHEMA)


def test_labels_of_any_names_have_losses() -> None:
    labels = ["is.click", "is%2Eclick", "keys", "is/click"]
    losses = build_losses(TrainConfig(), Schema(name="x", dataset_id="x", features=[FEATURE], labels=labels, splits={}))
    assert losses.names == labels and len(losses.all) == 4


def test_log_normal_needs_labels_from_0_on() -> None:
    schema = Schema(name="x", dataset_id="x", features=[FEATURE], labels=["degrees"], numbers=[DEGREES], splits={})
    config = TrainConfig.model_validate({"losses": {"degrees": "log_normal"}})
    with pytest.raises(
        UserError, match=r"train\.losses\.degrees: log_normal: it is for labels from 0 on, and 'degrees'"
    ):
        build_losses(config, schema)
