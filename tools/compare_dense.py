"""Compares raw floats with buckets on a drawn log whose truth depends on them: AUC of every way, by seed.

    python tools/compare_dense.py --folder /tmp/dense --rows 100000 --seeds 3

Each seed draws another log of six floats and two ids, prepared twice: floats under ``dense`` (half of them with the
scale log), or under ``numeric``, that is in 64 buckets. The probability of a click is a smooth function of the floats
and their products and of the ids, so that what a bucket rounds away is lost. A Dense MLP of one shape is trained on
both; the table's spread is the standard deviation over the seeds, its last line what the true probabilities reach. The
last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ssr_rec.common.formatting import decimal
from ssr_rec.config.run import load_config
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.metrics.exact import auc

SCALES = {"score": "standard", "rate": "standard", "offset": "standard", "price": "log", "views": "log", "age": "log"}
WAYS: dict[str, list[str]] = {
    "64 buckets": [],
    "scaled, bottom MLP": [],
    "scaled, linear": ["--dense.arch=linear"],
    "piecewise-linear, bottom MLP": ["--dense.encoding=piecewise"],
    "piecewise-linear, linear": ["--dense.encoding=piecewise", "--dense.arch=linear"],
}
TRAINING = [
    *("--over_arch.name=mlp", "--over_arch.hidden=[128, 64]", "--embeddings.dim=16", "--train.batch_size=1024"),
    *("--train.epochs=6", "--train.log_every=100", "--embeddings.learning_rate=0.1", "--optimizer.learning_rate=0.003"),
]


def draw(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a log of ``rows`` and the true probabilities (rows,) of its clicks."""
    rng = np.random.default_rng(seed)
    score, offset = rng.normal(size=(2, rows))
    rate = rng.beta(2, 40, rows)
    price, views, age = np.exp(rng.normal([[3.0], [5.0], [1.0]], [[1.0], [2.0], [1.5]], (3, rows)))
    user, item = rng.integers(0, 200, rows), rng.integers(0, 100, rows)
    z = {"rate": (rate - 2 / 42) * 31, "price": np.log(price) - 3, "views": (np.log(views) - 5) / 2}
    z["age"] = (np.log(age) - 1) / 1.5
    logit = (
        0.8 * score * z["price"] + 0.8 * np.sin(3 * offset) + 0.6 * z["rate"] * z["views"] + 0.6 * np.cos(2 * z["age"])
    )
    logit += 0.5 * rng.normal(size=200)[user] + 0.5 * rng.normal(size=100)[item] + 0.4 * score * offset - 1.2
    probability = 1 / (1 + np.exp(-logit))
    frame = pd.DataFrame({"score": score, "rate": rate, "offset": offset, "price": price, "views": views, "age": age})
    frame.loc[rng.random(rows) < 0.05, "age"] = np.nan
    click = (rng.random(rows) < probability).astype(np.int8)
    return frame.assign(user=user, item=item, click=click, row=np.arange(rows)), probability


def compare(folder: Path, rows: int, seeds: int, more: list[str]) -> dict[str, list[float]]:
    """Return way -> test AUC of each seed; ``truth`` is what the true probabilities reach."""
    from ssr_rec.train import train

    found: dict[str, list[float]] = {way: [] for way in [*WAYS, "truth"]}
    for seed in range(seeds):
        here = folder / f"seed{seed}"
        here.mkdir(parents=True)
        frame, probability = draw(rows, seed)
        frame.to_parquet(here / "log.parquet")
        split = {"type": "time", "column": "row", "boundaries": [int(0.8 * rows), int(0.9 * rows)]}
        common = {"name": "floats", "labels": ["click"], "categorical": ["user", "item"], "split": split}
        kinds = {"numeric": {"numeric": list(SCALES)}, "dense": {"dense": SCALES}}
        for kind, roles in kinds.items():
            prepare([str(here / "log.parquet")], here / kind, make_spec({**common, **roles}, "tool"))
        test = slice(int(0.9 * rows), rows)
        found["truth"].append(auc(probability[test], frame["click"].to_numpy()[test]))
        for way, overrides in WAYS.items():
            data = here / ("numeric" if "buckets" in way else "dense")
            options = [f"--data.path={data}", f"--runs={here / 'runs'}", f"--name={way}", f"--seed={seed}"]
            report = train(load_config(None, [*TRAINING, *options, *overrides, *more]))
            found[way].append(float(report.values()["test"]["click"]["auc"]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for logs, datasets and runs; new")
    parser.add_argument("--rows", type=int, default=100_000, help="of a log; 80 %% of them are trained on")
    parser.add_argument("--seeds", type=int, default=3, help="logs, each with a run of every way")
    parser.add_argument("config", nargs="*", help="further keys of the runs' config, as --train.epochs=4 after --")
    options = parser.parse_args(arguments)
    try:
        found = compare(options.folder, options.rows, options.seeds, options.config)
    except (ValueError, OSError) as error:
        print(f"compare_dense: {error}", file=sys.stderr)
        return 2
    print(f"{'way':32} {'test AUC':>8} {'spread':>7}")
    for way, of in found.items():
        spread = float(np.std(of, ddof=1)) if len(of) > 1 else float("nan")
        print(f"{way:32} {decimal(float(np.mean(of))):>8} {decimal(spread):>7}")
    print(json.dumps({"rows": options.rows, "seeds": options.seeds, "auc": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
