"""Prepare a raw click log for training; see docs/data.md.

python tools/prepare_data.py criteo --input train.txt --output data/criteo
python tools/prepare_data.py table --spec configs/data/kuairand.yaml --input logs/ --output data/kuairand
python tools/prepare_data.py table --input logs/2022-05-09.parquet --add-to data/kuairand_days
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ssr_rec.common import stopping
from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local, place
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.engines import EngineSettings, SparkSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.presets import PRESETS
from ssr_rec.data.preparation.sources import Read, read_table
from ssr_rec.data.preparation.spec import DaySplit, RandomSplit, TableSpec, TimeSplit, make_spec, read_spec
from ssr_rec.data.schema import Schema

SETTLED = (
    *("spec", "seed", "ratios", "time_column", "boundaries", "days", "fit_days"),
    *("negatives", "min_count", "num_buckets", "hash_buckets", "hash_min_count", "spread_ids", "max_list_length"),
)
"""Options that a dataset was made with, and rows added later follow."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        schema = _add(options) if options.add_to else _prepare(options)
    except (Exception, KeyboardInterrupt) as error:
        place_of = options.output or options.add_to
        return stopping.exit_status(error, f": {place_of} is as it was before; the same command starts anew")
    seconds = time.perf_counter() - started
    splits = {name: split.num_rows for name, split in schema.splits.items()}
    if options.add_to:
        splits = {day: splits[day] for day in schema.additions[-1].days}
    rows = sum(splits.values())
    figures = {"rows": rows, "seconds": round(seconds, 3), "rows_per_s": round(rows / seconds), "splits": splits}
    print(json.dumps({**figures, "dataset_id": schema.dataset_id, "output": str(options.output or options.add_to)}))
    return 0


def _prepare(options: argparse.Namespace) -> Schema:
    if options.extend_vocabulary:
        raise UserError("--extend-vocabulary is for --add-to; with --output vocabularies are fitted anew")
    read, spec = _chosen(options)
    return prepare(
        options.input,
        place(options.output),
        spec,
        read=read,
        seed=options.seed or 0,
        preset=options.preset,
        settings=EngineSettings(options.memory_limit, options.threads, _spark(options)),
    )


def _add(options: argparse.Namespace) -> Schema:
    for key in SETTLED:
        if getattr(options, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} is settled by the dataset that --add-to names; leave it out")
    if not is_local(place(str(options.add_to))):
        raise UserError(f"--add-to {options.add_to}: a dataset grows on a local or mounted disk alone; copy it there")
    return add(
        options.input,
        Path(options.add_to),
        preset=options.preset,
        extend=options.extend_vocabulary,
        settings=EngineSettings(options.memory_limit, options.threads, _spark(options)),
    )


def _chosen(options: argparse.Namespace) -> tuple[Read, TableSpec]:
    """Return how to read, and the spec with the command line's changes."""
    read: Read = read_table
    if options.preset == "table":
        if options.spec is None:
            raise UserError("preset table needs --spec, a YAML file that says what each column is; see docs/data.md")
        spec = read_spec(options.spec)
    elif options.spec is not None:
        raise UserError(f"--spec is for preset table; {options.preset} has its own")
    else:
        read, spec = PRESETS[options.preset].read, PRESETS[options.preset].spec
    changes: dict[str, Any] = {
        name: value
        for name in ("negatives", "min_count", "num_buckets", "hash_buckets", "hash_min_count", "spread_ids")
        if (value := getattr(options, name)) is not None
    }
    if options.max_list_length is not None:
        changes["lists"] = {
            name: {**column.model_dump(), "max_length": options.max_list_length} for name, column in spec.lists.items()
        }
    if split := _split(options, spec.split):
        changes["split"] = split
    return read, make_spec({**spec.model_dump(), **changes}, "command line") if changes else spec


def _spark(options: argparse.Namespace) -> SparkSettings | None:
    if options.engine == "spark":
        for entry in options.spark_conf:
            if "=" not in entry:
                raise UserError(f"--spark-conf {entry}: not key=value, as in spark.executor.memory=8g")
        return SparkSettings(options.spark_master, dict(entry.split("=", 1) for entry in options.spark_conf))
    if options.spark_master or options.spark_conf:
        raise UserError("--spark-master and --spark-conf are for --engine spark")
    return None


def _split(options: argparse.Namespace, split: RandomSplit | TimeSplit | DaySplit) -> dict[str, Any] | None:
    if options.days or options.fit_days:
        column = options.days or (split.column if isinstance(split, DaySplit) else None)
        if column is None:
            raise UserError("--fit-days needs --days, the column the days are in")
        if options.time_column or options.boundaries or options.ratios:
            raise UserError("--days makes every day a split: --time-column, --boundaries and --ratios are not for it")
        return {"type": "days", "column": column, "fit_days": options.fit_days or 1}
    column = options.time_column or (split.column if isinstance(split, TimeSplit) else None)
    if options.boundaries:
        if column is None:
            raise UserError("--boundaries needs --time-column, the column they are in")
        moments = [int(moment) if moment.lstrip("-").isdigit() else moment for moment in options.boundaries]
        return {"type": "time", "column": column, "boundaries": moments}
    if options.time_column:
        return {"type": "time", "column": column, "ratios": options.ratios or [0.8, 0.1, 0.1]}
    if options.ratios:
        rule = {"type": "time", "column": column} if column else {"type": "random"}
        return {**rule, "ratios": options.ratios}
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prepare a raw click log for training, as docs/data.md says.")
    parser.add_argument("preset", choices=[*PRESETS, "table"])
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or glob patterns; text also as .gz")
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--output", metavar="DATASET", help="dataset folder or URL, new or empty")
    made.add_argument("--add-to", metavar="DATASET", help="add further days to this dataset (docs/ids.md)")
    parser.add_argument(
        "--extend-vocabulary", action="store_true", help="with --add-to: ids for values frequent on an added day"
    )
    parser.add_argument("--spec", type=Path, help="preset table: YAML that says what each column is")
    parser.add_argument("--seed", type=int, help="of the random split and of the shuffle (default 0)")
    shares = ("TRAIN", "VALIDATION", "TEST")
    parser.add_argument("--ratios", nargs=3, type=float, metavar=shares, help="shares of the splits, as in 8 1 1")
    parser.add_argument("--time-column", help="split by this column instead of at random")
    parser.add_argument("--boundaries", nargs=2, metavar=("A", "B"), help="train < A <= validation < B <= test")
    parser.add_argument("--days", metavar="COLUMN", help="split by the days in this column, for day-by-day training")
    parser.add_argument("--fit-days", type=int, metavar="N", help="days that fit vocabularies and ranges (default 1)")
    parser.add_argument(
        "--negatives", type=float, metavar="SHARE", help="keep this share of the negative training rows (default 1)"
    )
    parser.add_argument("--min-count", type=int, help="training occurrences that earn a value an id (default 6)")
    parser.add_argument("--num-buckets", type=int, help="buckets of a numeric column (default 64)")
    parser.add_argument("--hash-buckets", type=int, metavar="N", help="hash every column instead of a vocabulary")
    parser.add_argument(
        "--hash-min-count", type=int, metavar="N", help="training occurrences that admit a value to its hash bucket"
    )
    parser.add_argument(
        "--spread-ids",
        action="store_true",
        default=None,
        help="spread frequent values over the ids, for row-wise shards",
    )
    parser.add_argument("--max-list-length", type=int, metavar="N", help="items kept of every list")
    parser.add_argument(
        "--memory-limit",
        default="3GB",
        help="of the engine, which spills beyond (default 3GB: the process stays below 4GB)",
    )
    parser.add_argument("--engine", choices=["duckdb", "spark"], default="duckdb", help="same result on both")
    parser.add_argument("--spark-master", metavar="URL", help="as local[2], spark://host:7077 or yarn")
    parser.add_argument("--spark-conf", action="append", default=[], metavar="KEY=VALUE", help="a setting of Spark")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    return parser


def command() -> int:
    """Run the command line of this process."""
    # So that a polite kill, like Ctrl-C, removes what is half-written.
    stopping.listen()
    return main()
