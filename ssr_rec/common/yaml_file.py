"""Reads YAML as people write it, without running anything from it and without its surprises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import check_plain, read_text

MAX_BYTES = 2**20
"""The largest config names every pair of some hundred fields, about 400 kB; parsing takes 15 s per MB."""


class _Loader(yaml.SafeLoader):
    """Loads as the safe loader does, without what makes a short text something else than it looks.

    Refused: aliases and merge keys (ten lines of them can unfold to billions of values), tags, a key given twice
    (the last would win silently), octal and sexagesimal numbers (0512 would be 330, 1:30 would be 90).
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not read; write the value out", problem_mark=event.start_mark
            )
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags as {event.tag} are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse to merge, and refuse a key given twice."""
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if key.tag == "tag:yaml.org,2002:merge" or name in seen:
                problem = "merge keys are not read" if key.value == "<<" else f"key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)

    def number(self, node: yaml.ScalarNode) -> int | float:
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value[:80]} is no decimal number; quote it if it is text", problem_mark=node.start_mark
            )
        is_int = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


# YAML 1.1 reads 1e-3 as a string; people write it as a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, checked by ``check_plain``.

    Raises:
        UserError: not YAML, or YAML that is not read here; the message says which.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError("nested too deep") from None
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from None
    check_plain(value)
    return value


def read_yaml(path: str | Path, example: str) -> dict[str, Any]:
    """Return the mapping of a YAML file; {} of an empty one.

    Args:
        example: what to name instead when the file cannot be read, for the message.

    Raises:
        UserError: unreadable, not YAML, or not a mapping.
    """
    text = read_text(path, MAX_BYTES, f"name {example}")
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not YAML of plain values: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, not {type(values).__name__}")
    return values or {}
