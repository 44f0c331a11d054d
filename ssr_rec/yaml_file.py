"""YAML as people write it, read without running anything from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; people write it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path, example: str) -> dict[str, Any]:
    """The mapping of a YAML file; {} of an empty one.

    Args:
        example: what to name instead when the file cannot be read, for the message.

    Raises:
        ValueError: unreadable, not YAML, or not a mapping.
    """
    try:
        values = parse_yaml(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name {example}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values, not {type(values).__name__}")
    return values or {}
