"""Lets one rank find out something for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ssr_rec.common.errors import UserError

T = TypeVar("T")


def on_rank_0(find: Callable[[], T]) -> T:
    """Return what ``find`` returns on rank 0, on every rank. Collective.

    Raises:
        UserError: ``find`` has raised one.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]
