"""Runs FuxiCTR's preparation for tools/bench_pipeline.py: ``python fuxictr_prepare.py OPTIONS``, in FuxiCTR's Python.

OPTIONS are JSON: ``folder`` with ``train``, ``valid`` and ``test`` files, their ``format`` (csv or parquet), the
columns by role, ``min_count``. The last line is JSON: ``seconds`` of what ``build_dataset`` does (vocabularies of the
training file, ids of all three, parquet files), without imports and the start of Ray, and the versions. Nothing of
ssr_rec is imported.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# First of the libraries: where it is missing, the last line on stderr must be that.
import fuxictr  # noqa: F401  # isort: skip
import polars as pl
from fuxictr.preprocess import FeatureProcessor
from fuxictr.preprocess.build_dataset import build_dataset, init_ray


class Processor(FeatureProcessor):
    """Prepares with the logarithmic bucket of FuxiCTR's model zoo for Criteo, here without a Python call a row.

    FuxiCTR names a type by what ``eval`` makes of it, and polars 2 no longer takes the argument it is passed as.
    """

    def read_data(self, data_path: str, data_format: str = "csv", **options: Any) -> pl.LazyFrame:
        if data_format == "csv":
            return pl.scan_csv(data_path, schema_overrides=self.dtype_dict, low_memory=False)
        return super().read_data(data_path, data_format=data_format, **options)

    def to_bucket(self, name: str) -> pl.Expr:
        value = pl.col(name)
        squared = value.log().pow(2).floor()
        return pl.when(value > 2).then(squared).otherwise(value).cast(pl.Int64).cast(pl.String)


def columns(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return FuxiCTR's description of the features."""
    text = {"active": True, "dtype": "str", "type": "categorical"}
    number = {"active": True, "dtype": "float", "type": "categorical", "preprocess": "to_bucket", "fill_na": 0}
    items = {"active": True, "dtype": "str", "type": "sequence", "splitter": "^"}
    return [
        *({"name": name, **text} for name in options["categorical"]),
        *({"name": name, **number} for name in options["numeric"]),
        *({"name": name, "max_len": length, **items} for name, length in options["lists"].items()),
    ]


def main() -> None:
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    init_ray()
    start = time.perf_counter()
    processor = Processor(
        feature_cols=columns(options),
        label_col={"name": options["label"], "dtype": "float"},
        dataset_id="made",
        data_root=str(folder),
    )
    train, valid, test = (str(folder / f"{split}.{options['format']}") for split in ("train", "valid", "test"))
    build_dataset(
        processor,
        train_data=train,
        valid_data=valid,
        test_data=test,
        data_format=options["format"],
        min_categr_count=options["min_count"],
    )
    seconds = time.perf_counter() - start
    made = [folder / "made" / f"{split}.parquet" for split in ("train", "valid", "test")]
    rows = sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in made)
    versions = {name: metadata.version(name) for name in ("fuxictr", "polars", "ray")}
    print(json.dumps({"rows": rows, "seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
