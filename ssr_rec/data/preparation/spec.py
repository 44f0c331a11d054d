"""Defines a table's spec: which column of a log is what, and how it is split and encoded (`tools/prepare_data.py`)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.data.dense import Scale
from ssr_rec.data.preparation.item_weight_spec import check_item_weight_specs, weight_columns
from ssr_rec.data.preparation.row_spec import TaskSpec, check_negatives, check_row_spec
from ssr_rec.data.preparation.sequence_spec import FromLog, SequenceSpec, check_sequence_specs
from ssr_rec.data.preparation.spec_names import check_names
from ssr_rec.data.preparation.vectors import MAX_DIM, VectorSpec, check_vector_specs

MAX_BUCKETS = 2**31 - 1
"""Buckets of a hash: the remainder of an md5 is taken 32 bits at a time, which must fit an int64."""

MAX_ITEMS = 2**22
"""Of a list: position and id of an item travel in one int64 (``encode.list_ids``), the id in 40 of its bits."""


class TextFormat(Settings):
    """Says how CSV and TSV files are cut into columns; parquet files ignore it."""

    delimiter: str | None = Field(None, min_length=1, max_length=4, description="None: comma for .csv, tab otherwise")
    header: bool = True
    columns: list[str] | None = Field(None, description="names of the columns where there is no header")
    quote: bool = Field(True, description="double quotes protect delimiters; off: a quote is a character like others")

    @model_validator(mode="after")
    def _named_once(self) -> TextFormat:
        if self.header == (self.columns is not None):
            raise UserError("columns is for files without a header (header: false), and those need it")
        return self


class ListColumn(Settings):
    max_length: int = Field(ge=1, le=MAX_ITEMS, description="items kept per row")
    keep: Literal["first", "last"] = Field("first", description="which end of a longer list is kept")
    separator: str | None = Field(None, min_length=1, description="between the items, where the list is text")
    weights: str | None = Field(
        None, min_length=1, description="of the items: a column of as many numbers, or the mark in items like id:0.5"
    )

    @model_serializer(mode="wrap")
    def _without_none(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Lists without weights count for a dataset_id as before there were any.
        return {key: value for key, value in values(self).items() if key != "weights" or value is not None}


def _ratios(values: Any) -> Any:
    if isinstance(values, list) and len(values) == 3 and all(isinstance(v, (int, float)) and v > 0 for v in values):
        return [value / sum(values) for value in values]
    raise UserError("three positive shares are needed, of train, validation and test")


def _moments(values: Any) -> Any:
    # YAML reads 2022-05-06 as a date; the column may hold it as text, so the text form is kept.
    return [str(v) if isinstance(v, date) else v for v in values] if isinstance(values, list) else values


Scales = Annotated[
    dict[str, Scale],
    BeforeValidator(lambda given: dict.fromkeys(given, "standard") if isinstance(given, list) else given),
]
Ratios = Annotated[list[float], BeforeValidator(_ratios)]


class RandomSplit(Settings):
    type: Literal["random"] = "random"
    ratios: Ratios = Field(default_factory=lambda: [0.8, 0.1, 0.1])


class TimeSplit(Settings):
    """Splits ``train < boundaries[0] <= validation < boundaries[1] <= test``; ratios take them from the column."""

    type: Literal["time"] = "time"
    column: str
    boundaries: Annotated[list[int | str], BeforeValidator(_moments)] | None = Field(None, min_length=2, max_length=2)
    ratios: Ratios | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> TimeSplit:
        if (self.boundaries is None) == (self.ratios is None):
            raise UserError("a time split needs either boundaries or ratios")
        if self.boundaries and len({type(moment) for moment in self.boundaries}) > 1:
            raise UserError("both boundaries must be of one kind, numbers or text")
        return self


class DaySplit(Settings):
    """Every day is a split of its own; vocabularies and bucket ranges are fitted on the first ``fit_days``."""

    type: Literal["days"] = "days"
    column: str = Field(description="dates, moments (cut to dates), or text or whole numbers that are one a day")
    fit_days: int = Field(1, ge=1, description="first days, on which the encodings are fitted")


class TableSpec(Settings):
    """Every column of the input is named in exactly one role, so that none becomes a feature by accident.

    The columns of ``group_id``, ``together`` and of a split by time or days may be features or ignored besides.
    """

    name: str = Field(min_length=1)
    labels: list[str] = Field(min_length=1)
    categorical: list[str] = Field(default_factory=list)
    numeric: list[str] = Field(default_factory=list)
    dense: Scales = Field(default_factory=dict, description="raw floats: column -> standard or log, how it is scaled")
    lists: dict[str, ListColumn] = Field(default_factory=dict)
    ignore: list[str] = Field(default_factory=list)
    weight: str | None = Field(None, description="column of row weights, 0 or more, by which loss and metrics count")
    tasks: dict[str, TaskSpec] = Field(
        default_factory=dict, description="label -> which rows it is learned and evaluated on; all, if not named"
    )
    group_id: str | None = None
    together: str | None = Field(
        None, description="column, such as a request id, whose groups of rows are shuffled and split as wholes"
    )
    split: RandomSplit | TimeSplit | DaySplit = Field(default_factory=RandomSplit, discriminator="type")
    negatives: float = Field(
        1.0, gt=0, le=1, description="share of the training rows without a positive label that is kept"
    )
    min_count: int = Field(6, ge=1, description="training occurrences that earn a value an id of its own")
    num_buckets: int = Field(64, ge=1, le=MAX_BUCKETS, description="buckets of a numeric column")
    dense_bins: int = Field(
        64, ge=1, le=4096, description="quantile bins of a dense column, for dense.encoding piecewise"
    )
    hash_buckets: int | dict[str, int] = Field(
        default_factory=dict, description="hash instead of a vocabulary: for all columns, or per column"
    )
    hash_min_count: int = Field(
        1, ge=1, description="training occurrences that admit a value to a hash bucket; the others share an id"
    )
    raw_hash: list[str] = Field(
        default_factory=list, description="categorical columns stored as 60-bit hashes, for embeddings.managed"
    )
    spread_ids: bool = Field(
        False, description="spread frequent values over a vocabulary's ids, for tables that are sharded by rows"
    )
    vocabularies: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict, description="name -> columns whose values are counted together and share ids and a table"
    )
    vectors: dict[str, VectorSpec] = Field(
        default_factory=dict, description="name -> given vectors of a column's values, such as content embeddings"
    )
    row_vectors: dict[str, Annotated[int, Field(ge=1, le=MAX_DIM)]] = Field(
        default_factory=dict, description="column of float lists, all of one length -> that length"
    )
    sequences: dict[str, SequenceSpec] = Field(
        default_factory=dict, description="name -> ordered events: list columns of the log, or a history made from it"
    )
    text: TextFormat = Field(default_factory=TextFormat)

    @model_validator(mode="after")
    def _consistent(self) -> TableSpec:
        events = [column for sequence in self.sequences.values() for column in sequence.given]
        roles = [*self.labels, *self.categorical, *self.numeric, *self.dense, *self.row_vectors]
        roles += [*self.lists, *weight_columns(self), *events, *self.ignore, *self.weighted]
        repeated = sorted({column for column in roles if roles.count(column) > 1})
        if repeated:
            raise UserError(f"columns named in two roles: {', '.join(repeated)}")
        if not self.features:
            raise UserError("no feature is named under categorical, numeric or lists")
        check_names(self)
        check_sequence_specs(self)
        check_row_spec(self)
        check_vector_specs(self)
        check_item_weight_specs(self)
        counts = self.hash_buckets if isinstance(self.hash_buckets, dict) else {"all columns": self.hash_buckets}
        known = {*self.looked_up, *self.raw_hash}
        for column, count in counts.items():
            if isinstance(self.hash_buckets, dict) and column not in known:
                raise UserError(f"hash_buckets: {column!r} is neither categorical nor a list")
            most = MAX_BUCKETS - (self.hash_min_count > 1)  # whose ids begin one later
            if not 1 <= count <= most:
                raise UserError(f"hash_buckets: {count} for {column} is not within 1..{most}")
        for column in self.raw_hash:
            if column not in self.categorical:
                raise UserError(f"raw_hash: {column!r} is not categorical")
            if isinstance(self.hash_buckets, dict) and column in self.hash_buckets:
                raise UserError(f"raw_hash: {column!r} is under hash_buckets, too")
        if self.negatives < 1:
            check_negatives(self, isinstance(self.split, DaySplit))
        if self.hash_min_count > 1 and not counts:
            raise UserError(f"hash_min_count: {self.hash_min_count} has no effect without hash_buckets; see min_count")
        return self

    @property
    def features(self) -> list[str]:
        """Return categorical, numeric, list, vector features, then histories made from the log, in the spec's order."""
        return [*self.categorical, *self.numeric, *self.list_columns, *self.vectors, *self.made]

    @property
    def numbers(self) -> list[str]:
        """Return the columns that hold a number each and are read as such."""
        return [*self.labels, *self.numeric, *self.dense, *self.weighted]

    @property
    def weighted(self) -> list[str]:
        """Return the column of weights, if there is one."""
        return [] if self.weight is None else [self.weight]

    @property
    def made(self) -> list[str]:
        """Return the features of histories made from the log."""
        return [feature for name, sequence in self.sequences.items() for feature in sequence.made(name)]

    @property
    def histories(self) -> dict[str, FromLog]:
        """Return the sequences that are made from the log, and how."""
        return {name: one.from_log for name, one in self.sequences.items() if one.from_log is not None}

    @property
    def list_columns(self) -> dict[str, ListColumn]:
        """Return the columns of the log that hold lists: those of ``lists``, then those of sequences."""
        found = dict(self.lists)
        for sequence in self.sequences.values():
            settings = ListColumn(max_length=sequence.max_length, keep="last", separator=sequence.separator)
            found |= dict.fromkeys(sequence.given, settings)
        return found

    @property
    def number_lists(self) -> list[str]:
        """Return those of them that hold numbers."""
        return [column for sequence in self.sequences.values() for column in sequence.numbers]

    @property
    def used(self) -> list[str]:
        """Return the columns that are read, each once: labels, features, group id, time, what histories go by."""
        extra = [*weight_columns(self), self.group_id, self.together, self.time_column, *self.weighted]
        for task in self.tasks.values():
            extra += task.conditions
        for history in self.histories.values():
            extra += [history.by, history.order, *history.conditions]
        features = [*self.categorical, *self.numeric, *self.dense, *self.row_vectors, *self.list_columns]
        return list(dict.fromkeys([*self.labels, *features, *(column for column in extra if column)]))

    @property
    def time_column(self) -> str | None:
        """Return what the split goes by; None: it is random."""
        return None if isinstance(self.split, RandomSplit) else self.split.column

    @property
    def looked_up(self) -> list[str]:
        """Return the columns whose values get ids from a table of them: categorical and lists, but for raw hashes."""
        without = {*self.number_lists, *self.raw_hash}
        return [name for name in (*self.categorical, *self.list_columns) if name not in without]

    def buckets(self, column: str) -> int | None:
        """Return the hash buckets of a column; None: it gets a vocabulary."""
        return self.hash_buckets.get(column) if isinstance(self.hash_buckets, dict) else self.hash_buckets

    def check_columns(self, columns: Sequence[str], source: str | Path) -> None:
        """Refuse a column of the input that has no role, and a role whose column the input lacks.

        Raises:
            UserError: naming the file, the column, and the nearest spelling.
        """
        for column in self.used:
            if column not in columns:
                role = "label" if column in self.labels else "column"
                found = f"{listed(columns)}{_delimiter_hint(columns)}"
                raise UserError(f"{source}: no {role} {column!r}{nearest(column, columns)}; it has {found}")
        named = {*self.used, *self.ignore}
        # Parquet files of pandas hold the frame's index under such a name, which nobody has given.
        without = [c for c in columns if c not in named and not re.fullmatch(r"__index_level_[0-9]+__", c)]
        if len(without) == 1:
            hint = nearest(without[0], [name for name in self.ignore if name not in columns])
            raise UserError(
                f"{source}: column {without[0]!r} has no role in the spec{hint}; add it to ignore if unused"
            )
        if without:
            names = ", ".join(map(repr, without[:40])) + (" ..." if len(without) > 40 else "")
            raise UserError(
                f"{source}: columns {names} have no role in the spec; name each under labels, categorical, numeric, "
                "dense or lists, or add it to ignore"
            )
        for column in self.ignore:
            if column not in columns:
                raise UserError(f"{source}: ignore names {column!r}, no such column{nearest(column, columns)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (" ..." if len(names) > 40 else "")


def _delimiter_hint(columns: Sequence[str]) -> str:
    """Return what to write in the spec where the header of a text file was not cut; nothing where it was."""
    marks = [mark for mark in ";\t|," if len(columns) == 1 and mark in columns[0]]
    return f", not cut into columns; say in the spec text: {{delimiter: {json.dumps(marks[0])}}}" if marks else ""


def make_spec(entries: dict[str, Any], source: str) -> TableSpec:
    """Validate a spec.

    Raises:
        UserError: naming ``source``, the entry, what is wrong, and the nearest valid key.
    """
    try:
        return TableSpec.model_validate(entries)
    except ValidationError as error:
        # A misspelt key also leaves the right one missing; the spelling is the better complaint.
        problem = next((problem for problem in error.errors() if problem["type"] == "extra_forbidden"), None)
        if problem is None:
            raise UserError(f"{source}: {first_problem(error)}") from None
        key = str(problem["loc"][-1])
        parts: tuple[type[Settings], ...] = (TableSpec, TextFormat, ListColumn, SequenceSpec, VectorSpec, FromLog)
        parts = (*parts, TaskSpec, RandomSplit, TimeSplit, DaySplit)
        known = [name for part in parts for name in part.model_fields]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{source}: unknown key {where!r}{nearest(key, known)}") from None


def read_spec(path: Path) -> TableSpec:
    """Read a spec from YAML.

    Raises:
        UserError: no such file, not YAML, or not a spec.
    """
    entries = read_yaml(path, "a spec, such as one in configs/data/")
    return make_spec(entries, str(path))
