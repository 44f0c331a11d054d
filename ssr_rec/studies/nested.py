"""Puts and finds values within mappings of mappings, by keys such as ``train.batch_size``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ssr_rec.common.errors import UserError


def put(where: str, values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{where}: {key}: {section!r} is a value, not a section")
    values[last] = copy.deepcopy(value)


def merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put ``more`` over ``values``, section by section."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = copy.deepcopy(value)


def has(values: Mapping[str, Any], key: str) -> bool:
    section, _, rest = key.partition(".")
    inner = values.get(section)
    return section in values and (not rest or (isinstance(inner, Mapping) and has(inner, rest)))
