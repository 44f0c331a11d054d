"""Encodes one user and many candidates: what all rows share is turned into ids once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssr_rec.common.errors import UserError
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
    return Encoded(ids, [lists[place] for place in sorted(lists)], the_users)


def _of(places: Sequence[int], is_list: Sequence[bool], wanted: bool) -> list[int]:
    return [place for place in places if is_list[place] == wanted]
