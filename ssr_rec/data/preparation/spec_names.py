"""Refuses names in a spec that would mean something else to DuckDB, PyTorch or a file system."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.module_names import MODULE_NAMES
from ssr_rec.data.schema import GROUP_COLUMN

if TYPE_CHECKING:
    from ssr_rec.data.preparation.spec import TableSpec

MAX_NAME_BYTES = 200
"""Of a column's name: a vocabulary's file is named after it."""


def check_names(spec: TableSpec) -> None:
    """Refuse names that would mean something else to DuckDB, PyTorch or a file system.

    Raises:
        UserError: names the column, vocabulary or sequence, and why.
    """
    features = {*spec.features}
    kinds = {"column": spec.used, "vocabulary": spec.vocabularies, "sequence": spec.sequences, "feature": spec.made}
    kinds["vector"] = spec.vectors
    for kind, names in kinds.items():
        for name in names:
            # A shard's own group ids have that name, so that prepared rows may be prepared again.
            is_group = kind == "column" and (name, spec.group_id) == (GROUP_COLUMN, GROUP_COLUMN)
            is_module = kind != "column" or name in features
            problem = None if is_group else _problem(name, is_module)
            if problem is not None:
                what = "sequence" if kind == "feature" else kind
                raise UserError(f"{kind} {name[:80]!r}: {problem}; rename the {what}")
    by_lower: dict[str, str] = {}
    for column in [*spec.used, *spec.vectors, *spec.made]:
        other = by_lower.setdefault(column.lower(), column)
        if other != column:
            raise UserError(f"columns {other!r} and {column!r} differ by case alone; rename one of them")


def _problem(name: str, is_module: bool) -> str | None:
    """Return what is wrong with a name, of a part of the model or not."""
    if name.startswith("__"):
        return f"names beginning with __ (as {GROUP_COLUMN}) are reserved"
    if not name or "\0" in name:
        return "it is empty, or has a NUL in it"
    if name.lower() == "rowid":
        return "DuckDB numbers its rows under that name"
    if len(quote(name, safe="")) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes, as files are named after it"
    refused = "." in name or name in MODULE_NAMES
    return "PyTorch takes no table of that name" if is_module and refused else None
