"""Defines the ``sequences`` and ``vocabularies`` of a spec: which columns are events, and which share their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings
from ssr_rec.data.event_sequences import EventSequence
from ssr_rec.data.preparation.where import parse_where

if TYPE_CHECKING:
    from ssr_rec.data.preparation.spec import TableSpec

MAX_EVENTS = 4096
"""Of a row; a history travels with every row."""


class FromLog(Settings):
    """Asks for a history made from the log: the rows of the same ``by`` that are strictly earlier."""

    by: str = Field(description="whose history it is, such as the user")
    order: str = Field(description="time of a row; rows of the same time are not in each other's histories")
    where: str | None = Field(None, description="which rows are events, such as click = 1; None: all")
    columns: list[str] = Field(min_length=1, description="categorical or numeric columns, the columns of an event")
    age: bool = Field(False, description="add a column of ages: seconds, or units of a time that is a number")

    @model_validator(mode="after")
    def _distinct(self) -> FromLog:
        _refuse_twice("columns names", self.columns)
        if self.age and "age" in self.columns:
            raise UserError("the column 'age' and age: true would make one feature; leave one of them out")
        return self

    @property
    def conditions(self) -> list[str]:
        """Return the columns that ``where`` names."""
        return [condition.column for condition in parse_where(self.where)] if self.where is not None else []


class SequenceSpec(Settings):
    """Says what a row's events are, the oldest first: list columns of the log, or a history made from its rows."""

    max_length: int = Field(ge=1, le=MAX_EVENTS, description="events kept per row, the last ones")
    columns: list[str] = Field(default_factory=list, description="list columns of ids, aligned")
    numeric: list[str] = Field(default_factory=list, description="list columns of numbers, aligned with them")
    age: str | None = Field(None, description="list column of the events' ages, numbers of any one unit")
    separator: str | None = Field(None, min_length=1, description="between the items, where the lists are text")
    from_log: FromLog | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SequenceSpec:
        if bool(self.columns) == (self.from_log is not None):
            raise UserError("a sequence has either columns, which are lists in the log, or from_log")
        if self.from_log is not None and (self.numeric or self.age or self.separator):
            raise UserError("numeric, age and separator are of list columns; from_log has columns and age of its own")
        return self

    @property
    def given(self) -> list[str]:
        """Return the list columns of the log, ids first."""
        return [*self.columns, *self.numeric, *([self.age] if self.age else [])]

    @property
    def numbers(self) -> list[str]:
        """Return those of them that hold numbers."""
        return [*self.numeric, *([self.age] if self.age else [])]

    def made(self, name: str) -> dict[str, str | None]:
        """Return feature -> source column, None for the age, of a history made from the log."""
        if self.from_log is None:
            return {}
        found: dict[str, str | None] = {f"{name}_{column}": column for column in self.from_log.columns}
        return {**found, **({f"{name}_age": None} if self.from_log.age else {})}

    def event_sequence(self, name: str) -> EventSequence:
        """Return the entry of the schema."""
        if self.from_log is None:
            return EventSequence(name=name, features=self.given, age=self.age)
        age = f"{name}_age" if self.from_log.age else None
        return EventSequence(name=name, features=list(self.made(name)), age=age)


def vocabulary_of(spec: TableSpec) -> dict[str, str]:
    """Return feature -> its vocabulary, of those that share one: by name, or as the source of a history."""
    found = {column: name for name, columns in spec.vocabularies.items() for column in columns}
    for name, sequence in spec.sequences.items():
        for feature, source in sequence.made(name).items():
            if source is not None:
                found[feature] = found.setdefault(source, source)
    return found


def check_sequence_specs(spec: TableSpec) -> None:
    """Refuse sequences and vocabularies that do not fit the spec's columns.

    Raises:
        UserError: naming the entry, the column and the fix.
    """
    taken = {*spec.labels, *spec.categorical, *spec.numeric, *spec.dense, *spec.list_columns, *spec.ignore}
    for name, history in spec.histories.items():
        where = f"sequences.{name}"
        for column in (history.by, history.order, *history.conditions):
            if column in spec.list_columns:
                raise UserError(f"{where}.from_log: {column!r} holds lists; by, order and where take single values")
        for column in history.columns:
            if column not in (*spec.categorical, *spec.numeric) or column in spec.raw_hash:
                raise UserError(
                    f"{where}.from_log.columns: {column!r} is not under categorical or numeric, so it has no ids "
                    "that a history could hold"
                )
        for feature in spec.sequences[name].made(name):
            if feature in taken:
                raise UserError(f"{where}: its feature {feature!r} has the name of a column; rename the sequence")
    _refuse_twice("sequences make feature", spec.made)
    if isinstance(spec.hash_buckets, int) or not spec.vocabularies:
        buckets: Mapping[str, int] = {}
    else:
        buckets = spec.hash_buckets
    _refuse_twice("vocabularies name column", [column for columns in spec.vocabularies.values() for column in columns])
    for name, columns in spec.vocabularies.items():
        for column in columns:
            if column not in spec.looked_up:
                raise UserError(
                    f"vocabularies.{name}: {column!r} is not under categorical, lists or a sequence's columns"
                )
        if len({buckets.get(column) for column in columns}) > 1:
            raise UserError(f"vocabularies.{name}: its columns have different hash_buckets; give all the same")
        if name in spec.features and name not in columns:
            raise UserError(f"vocabularies.{name}: a feature outside it has that name; rename the vocabulary")


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{what} {name!r} twice")
