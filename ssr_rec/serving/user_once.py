"""Encodes one user and many candidates: what all rows share is turned into ids once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.data.dense import RowVector
from ssr_rec.serving.raw_rows import Encoded, Encoder


def encode_user_once(encoder: Encoder, user: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> Encoded:
    """Return the ids of rows that are ``{**user, **candidate}``, equal to those of ``Encoder.encode``.

    The rows share the lists of the user.

    Args:
        user: the columns that all rows share.

    Raises:
        UserError: a candidate gives a column of the user's again, or see ``Encoder.encode``; the message says whose
            value it is.
    """
    of_the_user = user.keys() & set(encoder.columns)
    for row, candidate in enumerate(candidates):
        if both := of_the_user & candidate.keys():
            raise UserError(f"row {row}: {min(both)!r} is given for the user and for the candidate; give it once")
    shared = tuple(place for place, column in enumerate(encoder.columns) if column in user)
    own = tuple(place for place, column in enumerate(encoder.columns) if column not in user)
    for name, column in encoder.weights.of_columns.items():
        own_column = next(f.encoding.column for f in encoder.features if f.name == name)
        if (own_column in user) != (column in user):
            raise UserError(f"list {name!r}: give it and its weights {column!r} for the user, or both for candidates")
    for sequence in encoder.sequences:
        columns = {f.encoding.column for f in encoder.features if f.name in sequence.features}
        if 0 < len(columns & user.keys()) < len(columns):
            raise UserError(f"sequence {sequence.name!r}: give all of its columns for the user, or none of them")
    try:
        of_user = encoder.part(shared).encode([user])
    except UserError as error:
        raise UserError(f"user: {str(error).removeprefix('row 0: ')}") from None
    of_rows = encoder.part(own).encode(list(candidates))
    is_list = [feature.kind == "list" for feature in encoder.features]
    count = len(candidates)
    singles = {
        place: np.repeat(ids, count) for place, ids in zip(_of(shared, is_list, False), of_user.ids, strict=True)
    }
    singles |= dict(zip(_of(own, is_list, False), of_rows.ids, strict=True))
    lists = dict(zip(_of(shared, is_list, True), of_user.lists, strict=True))
    lists |= dict(zip(_of(own, is_list, True), of_rows.lists, strict=True))
    ids = np.stack([singles[place] for place in sorted(singles)]) if singles else np.empty((0, count), np.int64)
    the_users = [np.zeros(count, np.int64) if place in shared else None for place in sorted(lists)]
    dense = _dense_of(encoder, shared, of_user, of_rows)
    weights: dict[int, np.ndarray | None] = {}
    for places, part in ((shared, of_user), (own, of_rows)):
        listed = _of(places, is_list, True)
        weights |= dict(zip(listed, part.weights or [None] * len(listed), strict=True))
    of_items = [weights[place] for place in sorted(weights)] if encoder.weights.has_any else None
    return Encoded(ids, [lists[place] for place in sorted(lists)], the_users, dense, of_items)


def _dense_of(encoder: Encoder, shared: Sequence[int], of_user: Encoded, of_rows: Encoded) -> np.ndarray | None:
    """Return the numbers (B, C) of dense columns, of which some are the user's."""
    if not encoder.dense:
        return None
    first, parts = len(encoder.features), []
    ends = {True: 0, False: 0}
    for place, one in enumerate(encoder.dense, start=first):
        whose, width = place in shared, one.dim if isinstance(one, RowVector) else 1
        numbers = of_user.dense if whose else of_rows.dense
        assert numbers is not None
        part = numbers[:, ends[whose] : ends[whose] + width]
        parts.append(np.repeat(part, of_rows.rows, axis=0) if whose else part)
        ends[whose] += width
    return np.concatenate(parts, axis=1)


def _of(places: Sequence[int], is_list: Sequence[bool], wanted: bool) -> list[int]:
    # Places behind those of the features are of dense columns.
    return [place for place in places if place < len(is_list) and is_list[place] == wanted]
