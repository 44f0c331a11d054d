"""Asks of models of one kind and several sizes what a doubling of their size gives, and whether it gives ever less.

Figure 4 of the paper (4.3) reads this off a picture. Here a parabola in log2 of the size is fitted to all seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from ssr_rec.common.formatting import decimal, probability, short_number
from ssr_rec.runs.measures import title
from ssr_rec.runs.table import markdown_table

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parabola:
    """The least-squares fit ``measure = intercept(seed) + slope x + bend x**2`` with ``x = log2(size / center)``.

    Attributes:
        center: geometric mean of the sizes.
        coefficients: mean intercept over the seeds, slope and bend, (3,).
        covariance: of the three, (3, 3), from the residuals.
        freedom: residual degrees of freedom, at least 1.
    """

    center: float
    coefficients: Array
    covariance: Array
    freedom: int

    def combined(self, weights: Array) -> tuple[Array, Array]:
        """Return ``weights @ coefficients`` and its standard error; weights (n, 3) -> (n,), (n,)."""
        variance = np.einsum("ni,ij,nj->n", weights, self.covariance, weights)
        return weights @ self.coefficients, np.sqrt(variance)

    def mean(self, sizes: Array) -> tuple[Array, Array]:
        """Return the curve at sizes and its standard error: (n,) -> (n,), (n,)."""
        x = np.log2(sizes / self.center)
        return self.combined(np.stack([np.ones_like(x), x, x * x], axis=1))

    def gain(self, sizes: Array) -> tuple[Array, Array]:
        """Return what a doubling gives at sizes, the slope there, and its standard error: (n,) -> (n,), (n,)."""
        x = np.log2(sizes / self.center)
        return self.combined(np.stack([np.zeros_like(x), np.ones_like(x), 2 * x], axis=1))

    def bend(self) -> tuple[float, float, float]:
        """Return by how much the gain changes with each doubling, its standard error, and Student's two-sided p."""
        (change,), (error,) = self.combined(np.array([[0.0, 0.0, 2.0]]))
        p = 2 * stats.t.sf(abs(change) / error, self.freedom) if error > 0 else np.nan
        return float(change), float(error), float(p)


def fit_parabola(rows: pd.DataFrame, cost: str) -> Parabola | None:
    """Fit one curve's rows of ``summarise``'s frame; None where there are fewer than three sizes, or no residuals.

    Each seed has an intercept of its own, since a seed's data order and initial weights are alike at every size.

    Args:
        cost: the column with the sizes, such as ``num_parameters``.
    """
    measure = rows["measure"].iloc[0]
    columns = [name for name in rows if str(name).startswith(f"{measure}_seed")]
    long = rows.melt([cost], columns, "seed", "value").dropna()
    sizes, values = long[cost].to_numpy(float), long["value"].to_numpy(float)
    seeds = pd.get_dummies(long["seed"]).to_numpy(float)
    freedom = len(values) - seeds.shape[1] - 2
    if len({*sizes}) < 3 or freedom < 1:
        return None
    center = float(np.exp(np.log(np.unique(sizes)).mean()))
    x = np.log2(sizes / center)
    design = np.column_stack([seeds, x, x * x])
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ found
    covariance = np.linalg.pinv(design.T @ design) * (residual @ residual) / freedom
    mean_seed = np.vstack([np.r_[np.full(seeds.shape[1], 1 / seeds.shape[1]), 0, 0], np.eye(len(found))[-2:]])
    return Parabola(center, mean_seed @ found, mean_seed @ covariance @ mean_seed.T, freedom)


def doublings_text(rows: pd.DataFrame) -> str:
    """Say of each curve of one task what doubling its parameters gives; '' without a curve of three sizes."""
    measure, lines = title(rows["measure"].iloc[0]), []
    for name, curve in rows.groupby("curve", sort=False):
        fit = fit_parabola(curve, "num_parameters")
        if fit is None:
            continue
        ends = np.array([curve["num_parameters"].min(), curve["num_parameters"].max()], float)
        gains = [f"{decimal(gain)} ± {decimal(error)}" for gain, error in zip(*fit.gain(ends), strict=True)]
        change, error, p = fit.bend()
        sizes = " to ".join(map(short_number, ends))
        lines.append([name, sizes, *gains, f"{decimal(change)} ± {decimal(error)}", probability(p)])
    if not lines:
        return ""
    header = ["curve", "Params", "a doubling gives at the smallest", "at the largest", "change each doubling", "p"]
    return (
        f"What doubling the parameters gives in test {measure}, by a parabola in log2 of them through all seeds "
        f"(± standard error; p of no bend, Student's t):\n\n{markdown_table(header, lines)}"
    )
