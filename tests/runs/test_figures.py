"""The pictures: right size, something in them, and no failure on short or empty histories."""

import math
import warnings

import numpy as np
import pytest
from matplotlib.image import imread

from ssr_rec.runs.curves import COLORS, _series, _smooth, draw_comparison, draw_curves, style
from ssr_rec.runs.event_shares import draw_event_shares, shares_of
from ssr_rec.runs.filter_curves import draw_filter_curves, filter_rows
from ssr_rec.runs.report import Report, Run
from tests.cases import one_quick, slow

TASKS = ("click", "like")


def history(lines: int) -> list[dict]:
    rows = []
    for i in range(1, lines + 1):
        common = {"step": i, "samples": 1000 * i}
        rows.append({**common, "split": "train", "loss": 0.5 + 0.2 / i, "samples_per_s": 2e4, "data_wait": 0.01})
        if i % 10 == 0 or lines == 1:
            tasks = {task: {"auc": 0.7 - 0.1 / i} for task in TASKS}
            rows.append({**common, "split": "validation", "loss": 0.5, "tasks": tasks})
    return rows


def report(name: str = "a", auc: float | None = 0.72, ceiling: bool = True) -> Report:
    values = {
        "name": name,
        "over_arch": {"name": "ssr", "kind": f"SSR-S {name}", "num_parameters": 1_234_567, "flops_per_sample": 10},
        "test": {task: {"auc": auc} for task in TASKS},
        "ceiling": {task: {"auc": 0.76, "logloss": 0.4} for task in TASKS} if ceiling else {},
        "dataset": {"name": "synthetic", "dataset_id": "x", "num_rows": 1000},
        "world_size": 2,
    }
    return Report.model_validate(values)


BARE = Report.model_validate({"name": None, "over_arch": {}, "test": {}, "dataset": {}})


def ink(path) -> tuple[tuple[int, int], int]:
    """Width and height of a PNG, and how many pixels have the colour of the first curve."""
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    first = [int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)]
    return (pixels.shape[1], pixels.shape[0]), int((pixels == first).all(axis=2).sum())


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "lines, about",
    [(0, report()), slow((1, report())), (60, report()), slow((60, report(ceiling=False))), slow((1, BARE))],
    ids=["empty", "one row", "many rows", "no ceiling", "bare report"],
)
def test_curves_of_any_history(tmp_path, lines, about):
    draw_curves(history(lines), about, tmp_path / "curves.png")
    size, drawn = ink(tmp_path / "curves.png")
    assert size == (1560, 540)
    assert drawn == 0 if lines == 0 else drawn > (30 if lines == 1 else 500)


def test_curves_skip_what_is_null_or_missing(tmp_path):
    rows = history(30)
    rows[3]["loss"] = None
    rows[4] = {"step": 5, "samples": 5000, "split": "train", "loss": math.nan}
    rows.append({"step": 31, "samples": 31_000, "split": "validation", "loss": 0.5, "tasks": {"click": {"auc": None}}})
    draw_curves(rows, report(auc=None), tmp_path / "curves.png")
    samples, losses = _series(rows, "train", "loss")
    assert 4000 not in samples and 5000 not in samples and len(losses) == 28
    assert len(_series(rows, "validation", "auc", "click")[0]) == 3


@pytest.mark.parametrize("count, height", one_quick((12, 1200), (1, 864)))
def test_comparison_grows_with_runs_and_tasks(tmp_path, count, height):
    runs = [Run(report(str(i), 0.7 + i / 1000), history(20)) for i in range(count)]
    draw_comparison(runs, tmp_path / "runs.png")
    size, drawn = ink(tmp_path / "runs.png")
    assert size == (1560, height) and drawn > 200


def test_comparison_without_histories_or_values(tmp_path):
    draw_comparison([Run(report(auc=None, ceiling=False), [])], tmp_path / "runs.png")
    assert ink(tmp_path / "runs.png")[0] == (1560, 864)
    draw_comparison([Run(report("a"), []), Run(report("b", None), history(1))], tmp_path / "runs.png")
    with pytest.raises(ValueError, match="no runs to compare"):
        draw_comparison([], tmp_path / "none.png")


def test_smoothing_keeps_a_constant_and_lowers_noise():
    np.testing.assert_allclose(_smooth(np.full(100, 0.5)), 0.5)
    noise = np.random.default_rng(0).normal(size=400)
    assert len(_smooth(noise)) == 400 and _smooth(noise).std() < 0.4 * noise.std()


def test_many_runs_keep_different_looks():
    assert len({tuple(style(index).values()) for index in range(64)}) == 64


def test_event_shares_of_any_sequences(tmp_path):
    """With and without ages, with places that no event had; none of an encoder without weights."""
    part = {"kind": "DIN", "shares": [1.5, 0.5, None], "events": [200, 40, 0], "spread": 0.4}
    aged = {**part, "ages": [0, 3, 11], "age_shares": [1.2, 1.0, 0.7], "age_events": [100, 100, 40]}
    none = {"kind": "MyEncoder"}
    found = report().model_copy(update={"sequences": {"clicked": aged, "seen": part, "own": none}})
    assert list(shares_of(found)) == ["clicked", "seen"] and not shares_of(report())
    draw_event_shares(found, tmp_path / "shares.png")
    picture = imread(tmp_path / "shares.png")
    assert picture.shape == (936, 1320, 4) and picture[..., :3].min() < 0.5


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [slow(((0.5, 0.8), "linear")), ((0.01, 0.8), "log"), slow(((0.0, 0.8), "linear"))],
    ids=["alike", "apart", "dead"],
)
def test_filters_are_drawn_on_a_scale_that_shows_every_layer(tmp_path, monkeypatch, sizes, scale):
    seen = []
    monkeypatch.setattr("ssr_rec.runs.filter_curves.legend_below", lambda ax, _: seen.append(ax))
    layers = [{"sparsity": 0.5, "magnitude": size} for size in sizes]
    rows = filter_rows([{"step": 1, "split": "train", "filters": layers}, {"step": 2, "split": "validation"}])
    draw_filter_curves(rows, "a run", tmp_path / "filters.png")
    assert imread(tmp_path / "filters.png").ndim == 3
    assert [ax.get_yscale() for ax in seen] == ["linear", scale]
