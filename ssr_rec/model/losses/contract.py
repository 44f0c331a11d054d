"""Checks that a loss of one's own keeps the contract on which training, measures and export rely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ssr_rec.common.own_classes import own_class, own_settings
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.model.losses.base import TaskLoss
from ssr_rec.model.losses.registry import check_link
from ssr_rec.over_archs.contract import require, require_gradient

ROWS = 12
NUMBER = NumberLabel(name="seconds", mean=20.0, std=30.0, log_mean=2.5, log_std=1.2, low=0.0, high=400.0)
TOLERANCE = 1e-5


def check_loss(path: str, settings: Mapping[str, Any] | None = None) -> None:
    """Build the loss at ``MODULE:CLASS`` for each kind of label that it names, and check what it must do.

    That is: a finite loss of each row by itself, also of a batch without rows, gradients for the logits and for every
    parameter, weights from a state dict, and a link whose predictions rise with the logit. In a test of your own:
    ``check_loss("my_package.my_module:MyLoss", {"delta": 2.0})``.

    Args:
        settings: of the class.

    Raises:
        UserError: the class cannot be imported or built, or its link does not fit binary labels.
        AssertionError: it does not keep the contract; the message says which part.
    """
    found: Any = own_class(path, TaskLoss, "loss")
    own = own_settings(found, dict(settings or {}), f"loss {path}")
    require(bool(found.kinds) and {*found.kinds} <= {"binary", "number"}, f"its kinds are {found.kinds}")
    for kind in found.kinds:
        number = NUMBER if kind == "number" else None
        loss: TaskLoss = found(own, number)
        check_link(loss, f"loss {path}", number)
        if not loss.within_groups:
            _check_rows(loss, kind)
            other: TaskLoss = found(own, number)
            other.load_state_dict(loss.state_dict())
            require(other.link() == loss.link(), "its state_dict does not hold all that its link depends on")
        predicted = loss.link().predict(np.linspace(-4, 4, 9))
        require(bool((np.diff(predicted) >= 0).all()) and predicted[0] < predicted[-1], "its predictions do not rise")


def _check_rows(loss: TaskLoss, kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, generator=rng)).requires_grad_()
    labels = torch.rand(ROWS, generator=rng)
    labels = (labels < 0.5).float() if kind == "binary" else 100 * labels * (labels > 0.2)
    together = loss(logits, labels)
    for rows in (ROWS, 1, 0):
        alone = loss(logits[:rows], labels[:rows])
        require(alone.shape == (rows,), f"forward of {rows} rows gives {tuple(alone.shape)}, not ({rows},)")
        require(bool(alone.isfinite().all()), "a loss is not finite")
        worst = (alone - together[:rows]).abs().max().item() if rows else 0.0
        require(worst < TOLERANCE, f"a row's loss depends on the other rows, by {worst:.1e}")
    together.sum().backward()
    for name, tensor in [("logits", logits), *loss.named_parameters()]:
        require_gradient(name, tensor)
