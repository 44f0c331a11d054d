"""What doubling a model's size gives, against least squares done in another way."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ssr_rec.studies.doublings import doublings_text, fit_parabola
from ssr_rec.studies.figure import draw_costs

SIZES = np.array([20_000, 50_000, 130_000, 260_000])


def rows_of(curve, values, sizes=SIZES):
    """``summarise``'s frame of one curve: values (sizes, seeds)."""
    frame = pd.DataFrame({"task": "click", "system": [f"{curve} {size}" for size in sizes], "curve": curve})
    frame = frame.assign(baseline=True, measure="auc", num_parameters=sizes, flops_1024=2048 * sizes)
    frame["auc_mean"], frame["auc_sd"] = np.mean(values, axis=1), np.ptp(values, axis=1)
    return frame.assign(**{f"auc_seed{seed}": values[:, seed] for seed in range(values.shape[1])})


def noisy(seeds=3, bend=-0.0006):
    generator = np.random.default_rng(5)
    x = np.log2(SIZES / 80_000)[:, None]
    seed_effect = generator.normal(0, 0.002, seeds)
    return 0.71 + 0.003 * x + bend * x * x + seed_effect + generator.normal(0, 0.0002, (len(SIZES), seeds))


def by_demeaning(values, sizes, at):
    """Gain at a size, bend, errors and p by regression after each seed's mean is taken off (Frisch, Waugh)."""
    x = np.log2(sizes / at)
    columns = np.stack([x, x * x], axis=1)
    design = np.concatenate([columns - columns.mean(0)] * values.shape[1])
    target = (values - values.mean(0)).T.ravel()
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ target
    freedom = values.size - values.shape[1] - 2
    variance = inverse * ((target - design @ found) ** 2).sum() / freedom
    p = 2 * stats.t.cdf(-abs(found[1]) / variance[1, 1] ** 0.5, freedom)
    return found[0], variance[0, 0] ** 0.5, 2 * found[1], 2 * variance[1, 1] ** 0.5, p


def test_gains_and_errors_equal_a_regression_without_seed_columns():
    values = noisy()
    fit = fit_parabola(rows_of("MLP", values), "num_parameters")
    for size in SIZES[[0, -1]]:
        gain, error, change, change_error, p = by_demeaning(values, SIZES, size)
        assert [float(v[0]) for v in fit.gain(np.array([size], float))] == pytest.approx([gain, error], rel=1e-9)
        assert fit.bend() == pytest.approx((change, change_error, p), rel=1e-7)
    # The gain is the slope of the mean curve.
    (low, high), _ = fit.mean(np.array([2.0**-0.01, 2.0**0.01]) * 90_000)
    assert (high - low) / 0.02 == pytest.approx(fit.gain(np.array([90_000.0]))[0][0], rel=1e-6)


def test_a_shift_of_a_whole_seed_changes_no_bend():
    values = noisy()
    shifted = values + np.array([0.0, 0.05, -0.05])
    fits = [fit_parabola(rows_of("MLP", found), "num_parameters") for found in (values, shifted)]
    assert fits[0].bend() == pytest.approx(fits[1].bend(), rel=1e-6)


def test_one_seed_and_four_sizes_leave_one_residual():
    values = noisy(seeds=1)
    fit = fit_parabola(rows_of("MLP", values), "num_parameters")
    expected = np.polynomial.Polynomial.fit(np.log2(SIZES / fit.center), values[:, 0], 2).convert().coef
    assert fit.freedom == 1
    assert fit.coefficients == pytest.approx(expected, rel=1e-6)


def test_a_seed_that_lacks_a_size_still_counts():
    rows = rows_of("MLP", noisy())
    rows.loc[rows.index[1], "auc_seed2"] = np.nan
    assert fit_parabola(rows, "num_parameters").freedom == 11 - 3 - 2


@pytest.mark.parametrize("keep, seeds", [([0, 3], 3), ([0, 1, 2], 1), ([0], 3)])
def test_too_few_sizes_or_no_residual_is_no_fit(keep, seeds):
    rows = rows_of("MLP", noisy(seeds)[keep], SIZES[keep])
    assert fit_parabola(rows, "num_parameters") is None
    assert doublings_text(rows) == ""


def test_the_table_and_the_picture_have_the_curve(tmp_path):
    flat = rows_of("Dense MLP", noisy(bend=0.0))
    frame = pd.concat([rows_of("SSR-S", noisy()), flat, flat.assign(curve=None, system="alone").head(1)])
    frame = frame.reset_index(drop=True)
    text = doublings_text(frame)
    line = next(line for line in text.splitlines() if line.startswith("| SSR-S")).split("|")
    gain, error, change, change_error, p = by_demeaning(noisy(), SIZES, SIZES[0])
    assert [cell.strip() for cell in line[2:4]] == ["20.0k to 260k", f"{gain:.4f} ± {error:.4f}".replace("0.", ".")]
    assert p < 0.0001
    assert [cell.strip() for cell in line[5:7]] == [f"{change:.4f} ± {change_error:.4f}".replace("0.", "."), "<.0001"]
    assert "alone" not in text
    draw_costs(frame, "Sizes", tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 20_000
