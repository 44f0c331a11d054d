"""Says how a logit becomes a prediction in the units of its label, the same in evaluation and in serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from ssr_rec.common.settings import Settings

MOST = float(np.log(np.finfo(np.float32).max))
"""Exponents are cut here, so that a prediction fits a float32."""


class Link(Settings):
    """Maps a logit x to ``scale * f(inner_scale * x + inner_shift) + shift``, at least ``least``.

    It is plain numbers, so that a report, an artifact and a server in another process predict alike.
    """

    function: Literal["sigmoid", "identity", "exp", "softplus"] = "sigmoid"
    scale: float = 1.0
    shift: float = 0.0
    inner_scale: float = 1.0
    inner_shift: float = 0.0
    least: float | None = Field(None, description="no prediction is below it")

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Return predictions float64 of logits of any shape."""
        x = self.inner_scale * np.asarray(logits, dtype=np.float64) + self.inner_shift
        if self.function == "sigmoid":
            x = np.exp(-np.logaddexp(0.0, -x))
        elif self.function == "exp":
            x = np.exp(np.minimum(x, MOST))
        elif self.function == "softplus":
            x = np.logaddexp(0.0, x)
        found: np.ndarray = self.scale * x + self.shift
        return found if self.least is None else np.maximum(found, self.least)


SIGMOID = Link()
"""Of every binary label: its logit is that of a probability."""
Links = Mapping[str, Link]
"""Task whose label is a number -> its link; the other tasks are binary, and theirs is ``SIGMOID``."""


def predictions(logits: np.ndarray, tasks: list[str], links: Links) -> np.ndarray:
    """Return predictions (N, T) float64 of logits (N, T)."""
    columns = [links.get(name, SIGMOID).predict(logits[:, place]) for place, name in enumerate(tasks)]
    return np.stack(columns, axis=1)
