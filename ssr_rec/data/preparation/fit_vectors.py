"""Stores given vectors with the dataset, and gives the values that have one their ids."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import Feature, GivenVectors, Vocabulary
from ssr_rec.data.preparation.column_types import ODD_TEXT
from ssr_rec.data.preparation.encode import Lookup
from ssr_rec.data.preparation.engine import ROW
from ssr_rec.data.preparation.fit import VOCABULARY_FOLDER, SplitPlan
from ssr_rec.data.preparation.sources import Log
from ssr_rec.data.preparation.spec import TableSpec
from ssr_rec.data.preparation.vectors import RESERVED, read_vectors
from ssr_rec.data.preparation.vocabulary_growth import known_values


def given_vectors(plan: SplitPlan, folder: Path) -> dict[str, Lookup]:
    """Return the ids of the values that have vectors, which are written under ``folder``.

    Every value of a file gets an id, in the file's order, whether the log has it or not: a later row may have it.

    Raises:
        UserError: see ``read_vectors`` and ``check_vectors``; or values that are not of their column's type.
    """
    lookups = {}
    for place, (name, given) in enumerate(plan.spec.vectors.items()):
        values, vectors = read_vectors(name, given)
        encoding = Vocabulary(column=given.of, min_count=1, file=f"{_stem(name)}.parquet")
        ids = pa.array(np.arange(RESERVED, RESERVED + len(values)))
        counts = pa.array(np.zeros(len(values), dtype=np.int64))
        table = pa.table({"value": values.cast(pa.string()), "id": ids, "count": counts})
        pq.write_table(table, folder / encoding.file, compression="zstd")
        special = np.zeros((RESERVED, vectors.shape[1]), dtype=np.float32)
        np.save(folder / f"{_stem(name)}.npy", np.concatenate([special, vectors]), allow_pickle=False)
        column = plan.log.rows([given.of])[given.of]
        try:
            known = known_values(folder, encoding, column)
        except pa.ArrowInvalid as error:
            problem = f"{error}, and column {given.of!r} holds {column.type()}"
            raise UserError(f"vectors.{name}: {given.file}: {problem}") from None
        _check_texts(values.cast(pa.string()), known["value"].combine_chunks(), f"vectors.{name}: {given.file}")
        lookups[name] = Lookup(plan.log.engine.store(f"vectors{place}", known), encoding)
    check_vectors(plan.log, plan.spec, lookups)
    return lookups


def _check_texts(texts: pa.Array, known: pa.Array, where: str) -> None:
    """Refuse values whose text is none that a value of the log can have: rows of it, or scoring, would not find them.

    Args:
        texts: (n,) of the file.
        known: (n,) the same values as the log's column holds them.

    Raises:
        UserError: naming the first of them.
    """
    is_text = pa.types.is_string(known.type)
    odd = pc.match_substring_regex(texts, ODD_TEXT) if is_text else pc.not_equal(known.cast(pa.string()), texts)
    if pc.any(odd).as_py():
        value = texts[int(np.argmax(odd.to_numpy(zero_copy_only=False)))].as_py()
        raise UserError(
            f"{where}: {value!r} is written otherwise in the log, where 007 and 7.0 among whole numbers are 7 and True "
            "is true; write it so"
        )


def check_vectors(log: Log, spec: TableSpec, lookups: dict[str, Lookup]) -> None:
    """Refuse values without a vector, where the spec does.

    Raises:
        UserError: naming the first such row and its value.
    """
    for name, given in spec.vectors.items():
        if given.without == "zero":
            continue
        rows, known = log.rows([given.of]), lookups[name].table.rename({"__known__": "value", "__id__": "id"})
        joined = rows.left_join(known, rows[given.of] == known["__known__"])
        wrong = joined.filter(joined[given.of].notnull() & joined["__id__"].isnull())
        found = wrong.aggregate(row=wrong[ROW].min(), rows=ibis._.count()).to_pyarrow().to_pylist()[0]
        if found["rows"]:
            value = rows.filter(rows[ROW] == found["row"]).select(given.of).to_pyarrow()[given.of][0].as_py()
            raise UserError(
                f"{log.where(found['row'])}: column {given.of!r} is {value!r}, for which vectors.{name} has no vector "
                f"(nor for {found['rows'] - 1:,} further rows); add it to the file, or set without: zero"
            )


def vector_feature(name: str, folder: Path, lookup: Lookup) -> Feature:
    """Return the feature of given vectors."""
    file = f"{_stem(name)}.npy"
    rows, dim = np.load(folder / file, mmap_mode="r", allow_pickle=False).shape
    vectors = GivenVectors(dim=dim, file=file)
    return Feature(name=name, kind="categorical", num_embeddings=rows, encoding=lookup.encoding, vectors=vectors)


def _stem(name: str) -> str:
    return f"{VOCABULARY_FOLDER}/{quote(name, safe='')}"
