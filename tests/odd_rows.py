"""Odd raw values of every kind that the preparation takes, and what it makes of them."""

import datetime
import math
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.preparation.engines import EngineSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import SPLITS, Schema
from tests.prepare_log import read_split

SPEC: dict[str, Any] = {
    "name": "odd",
    "labels": ["click"],
    "categorical": ["number", "text", "flag", "day", "hashed", "small"],
    "numeric": ["price", "count"],
    "lists": {
        "last": {"max_length": 3, "keep": "last"},
        "words": {"max_length": 2, "separator": "||"},
        "codes": {"max_length": 4},
    },
    "hash_buckets": {"hashed": 1000, "codes": 50},
    "min_count": 2,
    "num_buckets": 40,
}
ALPHABET = string.printable + "äßЖ漢字🙂\u200f\u0301 |"


def odd_text(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(["", "0", "7", "07", "7.0", "true", "NaN", "null", "||", "a||b||", " 7"])
    return "".join(draw.choices(ALPHABET, k=draw.randrange(1, 12)))


def odd_float(draw: random.Random) -> float:
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1.7976931348623157e308, 2.2250738585072014e-308])
    if kind == 1:
        return draw.choice([-1, 1]) * 10.0 ** draw.uniform(-300, 300)
    if kind == 2:
        return math.nextafter(math.exp(draw.randrange(-5, 30)) - 1, draw.choice([-math.inf, math.inf]))
    return draw.gauss(0, 100) if kind == 3 else float(draw.randrange(-50, 50))


def odd_rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    huge = [0, -1, 2**63 - 1, -(2**63), 2**53 + 1]

    def gap(value: Any) -> Any:
        return None if draw.random() < 0.1 else value

    return [
        {
            "click": draw.randrange(2),
            "number": gap(draw.choice(huge) if draw.random() < 0.2 else draw.randrange(-300, 300)),
            "text": gap(odd_text(draw)),
            "flag": gap(draw.random() < 0.5),
            "day": gap(datetime.date(1970, 1, 1) + datetime.timedelta(draw.randrange(-90_000, 90_000) // 300 * 300)),
            "hashed": gap(odd_text(draw)),
            "small": gap(draw.randrange(-100, 100)),
            "price": gap(math.nan if draw.random() < 0.05 else odd_float(draw)),
            "count": gap(draw.choice(huge) if draw.random() < 0.2 else draw.randrange(1000)),
            "last": gap([gap(odd_text(draw)) for _ in range(draw.randrange(6))]),
            "words": gap(odd_text(draw)),
            "codes": gap([gap(draw.randrange(40)) for _ in range(draw.randrange(7))]),
        }
        for _ in range(count)
    ]


def shuffled(count: int) -> np.ndarray:
    """The order of docs/data.md for seed 0: prepared splits, one after another, hold the rows in it."""
    mask = 2**31 - 1
    x = np.arange(count) ^ (0x2C1B3C6D & mask)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x046CA68B), (13, 0x05EBCA6B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return np.argsort(x ^ (x >> 16))


def prepared(tmp_path: Path, table: pa.Table, **changes: Any) -> tuple[Schema, Path, list[dict[str, Any]]]:
    """The schema, its folder, and the rows that the preparation made, in the order of ``table``."""
    pq.write_table(table, tmp_path / "raw.parquet")
    folder = tmp_path / "prepared"
    schema = prepare(
        [str(tmp_path / "raw.parquet")],
        folder,
        make_spec({**SPEC, **changes}, "test"),
        settings=EngineSettings(threads=1),
    )
    rows = [row for split in SPLITS for row in read_split(folder, schema, split)]
    order = shuffled(table.num_rows)
    return schema, folder, [rows[place] for place in np.argsort(order)]
