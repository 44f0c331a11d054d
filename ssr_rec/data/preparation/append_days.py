"""Add days to a prepared dataset without reading its rows again; docs/ids.md says what is equal to what.

The dataset is the old one or the new one at any moment: shards and vocabularies are written beside the old ones, and
``schema.json``, which names what counts, is replaced last. What an addition that was killed leaves behind is never
named, and the next addition removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json
from ssr_rec.data.features import LISTED, Feature, Hashing, LogBuckets, RawHash, Vocabulary
from ssr_rec.data.preparation.column_types import ODD_TEXT
from ssr_rec.data.preparation.encode import Lookup, cut_sequences
from ssr_rec.data.preparation.engines import EngineSettings, connect
from ssr_rec.data.preparation.fit import VOCABULARY_FOLDER, SplitPlan, by_days, count_splits, hashed, shuffled
from ssr_rec.data.preparation.fit_dense import ranges_of_numbers
from ssr_rec.data.preparation.fit_vectors import check_vectors
from ssr_rec.data.preparation.grown_columns import staged_as, without_later_ids
from ssr_rec.data.preparation.prepare import check_values, empty_splits, encoded, progress_lines
from ssr_rec.data.preparation.presets import PRESETS
from ssr_rec.data.preparation.sources import Log, find_files, read_table
from ssr_rec.data.preparation.spec import DaySplit, TableSpec, make_spec
from ssr_rec.data.preparation.split import MAX_DAYS, ORDER, SPLIT, YEAR_LAST, Numbers, whole_numbers
from ssr_rec.data.preparation.vocabulary_growth import Growth, growth, known_values, write_grown
from ssr_rec.data.schema import SCHEMA_FILE, VALUES, VALUES_KEY, Addition, Days, Schema
from ssr_rec.data.shards import DAYS_FOLDER

WORK_FOLDER = ".adding"


def add(
    inputs: Sequence[str],
    folder: Path,
    *,
    preset: str = "table",
    extend: bool = False,
    settings: EngineSettings | None = None,
) -> Schema:
    """Add the log in ``inputs``, whose days all come after the dataset's, to the dataset ``folder`` as further splits.

    Args:
        preset: that of the dataset.
        extend: give ids to values that occur at least ``min_count`` times on one of the added days.
        settings: as ``prepare``.

    Raises:
        UserError: a dataset that cannot grow so, rows that do not continue it, bad input, or another addition to it
            at the same time.
    """
    with _locked(folder):
        schema = Schema.read(folder)
        spec, staged = _spec_of(schema, folder, preset)
        if spec.histories:
            raise UserError(
                f"--add-to {folder}: its sequence {next(iter(spec.histories))!r} is made from the log, whose earlier "
                "events are not in the dataset, so that the histories of new days would begin anew; prepare the whole "
                "log again, old days and new"
            )
        _check_text(schema, folder, staged)
        if extend and not any(isinstance(feature.encoding, Vocabulary) for feature in schema.features):
            raise UserError(f"--extend-vocabulary: no feature of {folder} has a vocabulary")
        _remove_leftovers(schema, folder)
        work = folder / WORK_FOLDER
        work.mkdir()
        try:
            files = find_files(inputs)
            progress = progress_lines()
            with connect(work / ".spill", files, settings or EngineSettings()) as engine:
                read = read_table if preset == "table" else PRESETS[preset].read
                log = read(engine, files, spec, progress)
                check_values(log, spec)
                plan = _plan(log, spec, schema, staged)
                counts = count_splits(plan)
                lookups, grown = _lookups(plan, schema, folder, extend)
                progress("looked up vocabularies", log.count)
                new = _grown_schema(schema, plan, counts, grown, folder, work)
                buckets = {f.name: f.encoding for f in schema.features if isinstance(f.encoding, LogBuckets)}
                ids = encoded(plan, lookups, buckets, progress)
                ids = without_later_ids(ids, engine, new, {name: found.sizes[1:] for name, found in grown.items()})
                keys = plan.rows([]).select(SPLIT, ORDER)
                new = engine.write(new, ids, keys, counts, work, progress).with_content_id()
            new = new.model_copy(update={"splits": {**schema.splits, **new.splits}})
            _publish(new, list(plan.splits), work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return new


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep out other additions; the lock goes with the process, however it ends."""
    if not (folder / SCHEMA_FILE).is_file():
        raise UserError(f"--add-to {folder}: no prepared dataset, it has no {SCHEMA_FILE}; make one with --output")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--add-to {folder}: another addition to it is going on; wait for it to end") from None
    finally:
        os.close(handle)


def _spec_of(schema: Schema, folder: Path, preset: str) -> tuple[TableSpec, dict[str, Any]]:
    """Return the spec that the dataset was made with, and how its columns were read."""
    made = schema.preparation
    if "preset" not in made:
        raise UserError(f"--add-to {folder}: not made from a log by tools/prepare_data.py")
    if made["preset"] != preset:
        raise UserError(f"--add-to {folder}: made with preset {made['preset']}, not {preset}; give that one")
    entries = {key: value for key, value in made.items() if key in TableSpec.model_fields}
    spec = make_spec({"name": schema.name, **entries}, str(folder / SCHEMA_FILE))
    if schema.days is None or not isinstance(spec.split, DaySplit):
        raise UserError(
            f"--add-to {folder}: its splits are {', '.join(schema.splits)}, not days. New rows would belong between "
            "the shuffled old ones, and into the counts of the vocabularies: prepare old and new rows together, or "
            "with --days COLUMN to add days later"
        )
    if "staged" not in made:
        raise UserError(
            f"--add-to {folder}: made before there were additions, it lacks what they need; prepare it anew"
        )
    return spec, made["staged"]


def _check_text(schema: Schema, folder: Path, staged: dict[str, Any]) -> None:
    """Refuse a dataset from before values had one text, whose ids new rows would miss without a word.

    Raises:
        UserError: it has such values, or hashes of text, which do not tell.
    """
    if schema.preparation.get(VALUES_KEY, 1) >= VALUES:
        return
    for feature in schema.features:
        encoding = feature.encoding
        if isinstance(encoding, LISTED):
            values = pq.read_table(folder / encoding.file, columns=["value"])["value"].cast(pa.string())
            odd = pc.filter(values, pc.match_substring_regex(values, ODD_TEXT))
        elif isinstance(encoding, (Hashing, RawHash)) and "string" in staged["kinds"].get(feature.name, ""):
            odd = ["hashed text"]
        else:
            continue
        if len(odd):
            raise UserError(
                f"--add-to {folder}: made before values had one text whatever holds them, and column {feature.name!r} "
                f"has {str(odd[0])[:80]!r}, which new rows could write differently; prepare the whole log anew"
            )


def _plan(log: Log, spec: TableSpec, schema: Schema, staged: dict[str, Any]) -> SplitPlan:
    """Return where the new rows go: after the old ones, by the rules of the old ones.

    Raises:
        UserError: columns of another kind, or days that do not come after those of the dataset.
    """
    rule, old = spec.split, schema.days
    assert isinstance(rule, DaySplit) and old is not None
    whole: dict[str, Numbers] = staged["whole"]
    kinds = staged_as(log, spec, whole)["kinds"]
    for name, kind in staged["kinds"].items():
        if kinds[name] != kind:
            raise UserError(
                f"column {name!r} holds {kinds[name]}, the dataset was made from {kind}; convert it, since a value "
                "counts by its text"
            )
    for name, was_whole in whole.items():
        if was_whole and whole_numbers(log.rows([name]), name) not in (True, was_whole):
            kind = "numbers" if was_whole == "decimal" else "whole numbers"
            raise UserError(f"column {name!r} held {kind} alone so far; other text would change the old rows")
    # Numbers were checked above, and a dataset from before such days were refused goes on with them.
    if not whole[rule.column] and re.search(YEAR_LAST, old.names[-1]) is None:
        whole_numbers(log.rows([rule.column]), rule.column, is_time=True)
    rows_before = sum(split.num_rows for split in schema.splits.values())
    plan = shuffled(by_days(log, spec, rule, whole), schema.preparation["seed"], rows_before)
    moment: Callable[[str], Any] = {True: int, "decimal": float}.get(whole[rule.column], str)
    early = [day for day in plan.splits if moment(day) <= moment(old.names[-1])]
    if early:
        what = "is in the dataset already" if early[0] in old.names else f"is not after its last, {old.names[-1]}"
        raise UserError(f"column {rule.column!r}: day {early[0]} {what}; a day is added once, whole, and in order")
    if len(old.names) + len(plan.splits) > MAX_DAYS:
        raise UserError(f"the dataset would have more than {MAX_DAYS} days")
    return replace(plan, fitted=0)


def _lookups(
    plan: SplitPlan, schema: Schema, folder: Path, extend: bool
) -> tuple[dict[str, Lookup], dict[str, Growth]]:
    """Return the ids of every column's values, and by how much the vocabularies of features have grown."""
    engine = plan.log.engine
    rows = engine.create_view("keyed", cut_sequences(plan.rows(plan.spec.used), plan.spec))
    tables: dict[str, list[Feature]] = {}
    for feature in schema.features:
        tables.setdefault(feature.table, []).append(feature)
    lookups: dict[str, Lookup] = {}
    grown: dict[str, Growth] = {}
    for number, sharing in enumerate(tables.values()):
        feature, names, staged = sharing[0], [one.name for one in sharing], f"lookup{number}"
        if isinstance(feature.encoding, Hashing):
            ids = hashed(plan.log, names, feature.encoding, staged).table
        elif isinstance(feature.encoding, LISTED):
            values = known_values(folder, feature.encoding, rows[feature.encoding.column])
            ids = engine.store(staged, values)
            if extend and isinstance(feature.encoding, Vocabulary) and feature.vectors is None:
                min_count = feature.encoding.min_count
                found = growth(rows, names, ids, feature.num_embeddings, min_count, len(plan.splits))
                if len(found.values):
                    grown |= dict.fromkeys(names, found)
                    new = found.values.select(["value", "id"]).cast(values.schema)
                    ids = engine.store(f"{staged}_more", pa.concat_tables([values, new]))
        else:
            continue
        for one in sharing:
            assert isinstance(one.encoding, (Hashing, *LISTED))
            lookups[one.name] = Lookup(ids, one.encoding)
    check_vectors(plan.log, plan.spec, lookups)
    return lookups, grown


def _grown_schema(
    schema: Schema,
    plan: SplitPlan,
    counts: dict[str, dict[str, int]],
    grown: dict[str, Growth],
    folder: Path,
    work: Path,
) -> Schema:
    """Return the schema, its splits the new days alone, without shards; writes the vocabularies that have grown."""
    assert schema.days is not None
    digest = hashlib.sha256(canonical_json([schema.dataset_id, counts]))
    for name, found in grown.items():
        digest.update(json.dumps([name, found.sizes, found.values["value"].cast(pa.string()).to_pylist()]).encode())
    dataset_id = digest.hexdigest()[:16]
    features = [
        feature.model_copy(
            update={
                "num_embeddings": grown[feature.name].sizes[-1],
                "encoding": write_grown(feature.encoding, grown[feature.name].values, folder, work, dataset_id),
            }
        )
        if feature.name in grown and isinstance(feature.encoding, Vocabulary)
        else feature
        for feature in schema.features
    ]
    before = {day: {name: found.sizes[at] for name, found in grown.items()} for at, day in enumerate(plan.splits)}
    ranges = ranges_of_numbers(plan)
    numbers = [number.widened(*ranges[number.name]) for number in schema.numbers]
    addition = Addition(before=schema.dataset_id, days=list(plan.splits), grown=before if grown else {})
    return schema.model_copy(
        update={
            "dataset_id": dataset_id,
            "features": features,
            "numbers": numbers,
            "splits": empty_splits(counts, schema.labels),
            "days": Days(names=[*schema.days.names, *plan.splits], fitted=schema.days.fitted),
            "additions": [*schema.additions, addition],
        }
    )


def _publish(schema: Schema, days: Sequence[str], work: Path, folder: Path) -> None:
    for place in [*(f"{DAYS_FOLDER}/{day}" for day in days), f"{VOCABULARY_FOLDER}/{schema.shard_ids[-1]}"]:
        if (work / place).exists():
            os.replace(work / place, folder / place)
    schema.write(work)
    with open(work / SCHEMA_FILE) as file:
        os.fsync(file.fileno())
    os.replace(work / SCHEMA_FILE, folder / SCHEMA_FILE)


def _remove_leftovers(schema: Schema, folder: Path) -> None:
    """Remove what is in the dataset's folders and not in its schema: of additions that were killed, or outgrown."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    days = {str(Path(shard.path).parent) for split in schema.splits.values() for shard in split.shards}
    files = {str(Path(f.encoding.file).parent) for f in schema.features if isinstance(f.encoding, LISTED)}
    for place, named in ((DAYS_FOLDER, days), (VOCABULARY_FOLDER, files)):
        for path in (folder / place).iterdir():
            if path.is_dir() and f"{place}/{path.name}" not in named:
                shutil.rmtree(path)
