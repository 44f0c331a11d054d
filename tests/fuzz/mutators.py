"""Ways to damage bytes, trees of values, and files as such; every choice comes from the generator."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
NASTY_BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"]",
    b"\n",
    b"-",
    b"9" * 40,
    b"\xed\xa0\x80",
    b"\x85",
    b": ",
)


def pick(rng: Rng, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def damage_bytes(rng: Rng, data: bytes) -> bytes:
    """``data`` with bits or bytes changed, a run zeroed, cut, doubled or drawn anew, its end lost, or bytes added."""
    out = bytearray(data)
    at = int(rng.integers(len(out))) if out else 0
    length = int(min(len(out) - at, 1 + rng.integers(2 ** rng.integers(1, 12))))
    kind = pick(rng, ("bit", "bit", "bits", "byte", "zero", "cut", "double", "random", "truncate", "insert", "append"))
    if kind == "bit":
        out[at] ^= 1 << int(rng.integers(8))
    elif kind == "bits":
        for _ in range(int(rng.integers(2, 20))):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        out[at] = int(rng.integers(256))
    elif kind == "zero":
        out[at : at + length] = bytes(length)
    elif kind == "cut":
        del out[at : at + length]
    elif kind == "double":
        out[at:at] = out[at : at + length]
    elif kind == "random":
        out[at : at + length] = rng.bytes(length)
    elif kind == "truncate":
        del out[at:]
    elif kind == "insert":
        out[at:at] = pick(rng, NASTY_BYTES)
    else:
        out += rng.bytes(length)
    return bytes(out)


@dataclass(frozen=True)
class Raw:
    """Text to stand in a document as it is."""

    text: str


NASTY_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**62, 2**63 - 1, 2**63, -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, "", " ", "null", "1", "true", "a\nb", "../../etc/passwd", "/etc/passwd"),
    *("user", "click", "é" * 300, "x" * 5_000, "\0", "\ud800", "\u2028", [], {}, [[]], [1], ["a", "a"], {"": 1}),
    *(Raw("1e999"), Raw("-1e999"), Raw("9" * 5_000), Raw("-" + "9" * 400), Raw("[" * 40 + "]" * 40)),
    *(Raw("[" * 100_000), Raw("[" * 700 + "]" * 700), Raw('{"a":' * 300 + "1" + "}" * 300), Raw("1." + "1" * 5_000)),
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree, but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def at_path(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def damage_tree(rng: Rng, tree: Any, nasty: tuple[Any, ...] = NASTY_VALUES) -> Any:
    """A copy with one place deleted, replaced, retyped, doubled, renamed, swapped with another, or one added."""
    tree = copy.deepcopy(tree)
    path = pick(rng, paths(tree))
    parent, key = at_path(tree, path[:-1]), path[-1]
    kind = pick(rng, ("delete", "replace", "replace", "replace", "nudge", "double", "rename", "swap", "add"))
    if kind == "delete":
        del parent[key]
    elif kind == "replace":
        parent[key] = copy.deepcopy(pick(rng, nasty))
    elif kind == "nudge":
        parent[key] = nudged(rng, parent[key])
    elif kind == "double" and isinstance(parent, dict):
        first = json.dumps(key)
        parent[Raw(f"{first}: {write(parent[key])}, {first}")] = pick(rng, (parent[key], pick(rng, nasty)))
        del parent[key]
    elif kind == "double":
        parent.append(copy.deepcopy(parent[key]))
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(nudged(rng, str(key)))] = parent.pop(key)
    elif kind == "swap":
        other = pick(rng, (p for p in paths(tree) if p[: len(path)] != path and path[: len(p)] != p))
        value = copy.deepcopy(at_path(tree, other))
        at_path(tree, other[:-1])[other[-1]], parent[key] = parent[key], value
    elif isinstance(parent, dict):
        parent[pick(rng, ("surprise", "", "__class__", "name", "\ud800", "checksum "))] = pick(rng, nasty)
    else:
        parent.insert(0, pick(rng, nasty))
    return tree


def nudged(rng: Rng, value: Any) -> Any:
    """A value near ``value``, of its kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + pick(rng, (1, -1, 0.5, 1e-9, -value, 10 * value + 1, 2**40))
    if isinstance(value, str):
        return pick(
            rng, (value + "x", value[:-1], value.upper(), f" {value}", f"./{value}", f"../{value}", f"{value}/.")
        )
    return [value] if isinstance(value, dict) else dict(enumerate(map(str, value)))


def write(tree: Any) -> str:
    """JSON (so YAML too) of a tree, with ``Raw`` as it stands, as a key too."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, dict):
        return "{" + ", ".join(_pair(key, value) for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(write, tree)) + "]"
    return json.dumps(tree)


def _pair(key: Any, value: Any) -> str:
    return f"{key.text if isinstance(key, Raw) else json.dumps(key)}: {write(value)}"


def _directory(path: Path, rng: Rng) -> None:
    path.mkdir()


def _fifo(path: Path, rng: Rng) -> None:
    os.mkfifo(path)


def _symlink(target: str) -> Callable[[Path, Rng], None]:
    return lambda path, rng: path.symlink_to(path.name if target == "itself" else target)


NO_FILES: dict[str, Callable[[Path, Rng], None]] = {
    "directory": _directory,
    "pipe": _fifo,
    "dangling": _symlink("nowhere"),
    "loop": _symlink("itself"),
    "endless": _symlink("/dev/zero"),
    "nothing": _symlink("/dev/null"),
    "missing": lambda path, rng: None,
    "empty": lambda path, rng: path.write_bytes(b"") and None,
    "huge": lambda path, rng: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**36),
}


def replace_by_no_file(rng: Rng, path: Path) -> None:
    """Put something in the place of a file that is none, or no readable one."""
    path.unlink(missing_ok=True)
    NO_FILES[pick(rng, NO_FILES)](path, rng)
