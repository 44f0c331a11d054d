"""Config files and ``--a.b=c`` overrides: every key of RunConfig and of every over-arch, with every kind of value.

The promise: refused by one line that names the file or the override, or taken for exactly what the text says: each
leaf of the YAML node tree, composed here by PyYAML's own loader, stands in the config with its value and type, no key
comes twice, and whatever is not named has its default. A config that is taken survives being saved and loaded.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssr_rec.config.run import RunConfig, dump_config, load_config, takes_text
from ssr_rec.over_archs.registry import OVER_ARCHS
from tests.fuzz.harness import Target, refusal
from tests.fuzz.mutators import (
    NASTY_VALUES,
    Raw,
    at_path,
    damage_bytes,
    damage_tree,
    paths,
    pick,
    replace_by_no_file,
    write,
)

SENTINEL = "executed"
"""A file that hostile tags try to make."""
LINES = [f"{name}: &{name} [*{of}, *{of}, *{of}, *{of}]" for of, name in pairwise("abcdefghijklmnopqrst")]
LAUGHS = f"{{a: &a [x, x], {', '.join(LINES)}}}"
"""A list of four of the list before, and so on: 2 * 4**19 items in all."""
MERGES = "{a: &a {x: 1}, b: &b {<<: [*a, *a], y: 2}, c: {<<: [*b, *b, *b]}}"
YAML_TEXTS = """
0512 | 1:30 | 190:20:30 | 0x10 | 0b11 | 1_000 | +5 | -0 | 1e5 | 1E+3 | .5 | 5. | 1e400 | .inf | -.INF | .nan
yes | no | On | ~ | null | Null | '8' | "8" | !!str 8 | !!int '8' | ! 8 | !local x | &a 1 | *a | &a [*a] | << | =
2024-05-06 | 2024-13-45 | 2001-12-14t21:59:43.10-99:99 | 2024-05-06 10:00:00 | !!timestamp x | !!bool x | !!float x
{<<: {seed: 3}} | {a: 1, a: 2} | {1: 2} | {[1]: 2} | {? {a: b} : c} | !!binary aGk= | !!set {a} | !!omap [a: 1]
!!pairs [a: 1] | !!null x | "\\U00110000" | "\\x00" | "\\ud83d" | % | @ | ` | { | ] | # | - 1 | a: b: c
"""
YAML_VALUES = (
    *NASTY_VALUES,
    *(Raw(text.strip()) for line in YAML_TEXTS.strip().splitlines() for text in line.split(" | ")),
    *map(Raw, ("", "|", "\t", LAUGHS, MERGES, "9" * 30_000 + "x", "1" * 30_000 + "e", "0x" + "f" * 30_000)),
    *map(Raw, ("- " * 3_000, "? " * 3_000, "[{" * 2_000)),
)
TAGS = ("os.system", "subprocess.call", "builtins.open", "builtins.exec")


@dataclass
class State:
    configs: list[str]


def prepare(folder: Path) -> State:
    return State([dump_config(load_config(None, [f"--over_arch.name={name}"])) for name in OVER_ARCHS])


def run(state: State, folder: Path, rng: np.random.Generator) -> str:
    text = pick(rng, state.configs)
    path = folder / "run.yaml"
    kind = pick(rng, ("bytes", "bytes", "tree", "tree", "small", "small", "override", "override", "file"))
    overrides: list[str] = []
    tree = yaml.safe_load(text)
    if kind == "file":
        path.write_text(text)
        replace_by_no_file(rng, path)
    elif kind == "bytes":
        path.write_bytes(damage_bytes(rng, text.encode()))
    elif kind == "tree":
        path.write_text(write(damage_tree(rng, tree, with_tags(folder))))
    else:
        # One key, every other at its default: most of these are legitimate.
        place = pick(rng, paths(tree))
        name = tree["over_arch"]["name"]
        value = pick(rng, (*with_tags(folder), at_path(tree, place), at_path(tree, place)))
        if kind == "small":
            path.write_text(write(alone(place, value, name)))
        else:
            path.write_text(write({"over_arch": {"name": name}}))
            key = ".".join(map(str, place))
            overrides = [f"--{pick(rng, (key, key, key, key + '.x', 'x.' * 5_000 + key, '.' + key))}={write(value)}"]
            (folder / "override").write_text(overrides[0])
    return check(path, overrides, folder)


def check(path: Path, overrides: list[str], folder: Path) -> str:
    try:
        config = load_config(path, overrides)
    except Exception as error:
        return refusal(error, str(path), *(repr(o)[1:60] for o in overrides))
    finally:
        assert not (folder / SENTINEL).exists(), "code from the file was executed"
    values = config.model_dump(mode="json")
    default = RunConfig(over_arch=type(config.over_arch)()).model_dump(mode="json")
    text = path.read_bytes().decode() if path.is_file() else ""
    node = compose(text)
    tree = as_text(node) if node is not None and text.strip() else {}
    for override in overrides:
        key, _, value = override[2:].partition("=")
        *sections, last = key.split(".")
        parent = tree
        for section in sections:
            parent = parent.setdefault(section, {})
        is_text = takes_text([*sections, last]) and value not in ("null", "~", "") and value[:1] not in ("'", '"')
        parent[last] = Leaf(value, plain=False) if is_text else as_text(compose(value))
    assert_says(tree, values, default, "")
    (folder / "saved.yaml").write_text(dump_config(config))
    assert load_config(folder / "saved.yaml") == config, "saved and loaded it is another"
    return "taken"


def with_tags(folder: Path) -> tuple[Any, ...]:
    command = f"touch {folder / SENTINEL}"
    return (*YAML_VALUES, *(Raw(f"!!python/object/apply:{tag} [{json.dumps(command)}]") for tag in TAGS))


def alone(place: tuple[Any, ...], value: Any, name: str) -> dict[str, Any]:
    """A config of one key, and the name of its over-arch."""
    tree: dict[str, Any] = {"over_arch": {"name": name}}
    parent: Any = tree
    for key in place[:-1]:
        if not isinstance(key, str):
            return tree
        parent = parent.setdefault(key, {})
    if isinstance(place[-1], str):
        parent[place[-1]] = copy.deepcopy(value)
    return tree


def compose(text: str) -> Any:
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)), "an alias was taken"
    return yaml.compose(text, Loader=yaml.SafeLoader)


@dataclass(frozen=True)
class Leaf:
    text: str
    plain: bool


def as_text(node: Any) -> Any:
    """The tree of a node with its scalars as written."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key twice: {keys}"
        return {key.value: as_text(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [as_text(item) for item in node.value]
    return Leaf("", True) if node is None else Leaf(node.value, node.style is None)


def assert_says(tree: Any, value: Any, default: Any, where: str) -> None:
    """``value`` is what ``tree`` says, and ``default`` where it says nothing."""
    if isinstance(value, dict) and isinstance(tree, dict):
        assert set(tree) <= set(value), f"{where}: dropped {set(tree) - set(value)}"
        for key, inner in value.items():
            if key in tree:
                assert_says(tree[key], inner, default.get(key) if isinstance(default, dict) else None, f"{where}.{key}")
            else:
                assert isinstance(default, dict) and inner == default[key], f"{where}.{key}: {inner} is no default"
    elif isinstance(value, list) and isinstance(tree, list):
        assert len(value) == len(tree), where
        for index, (inner, said) in enumerate(zip(value, tree, strict=True)):
            assert_says(said, inner, None, f"{where}.{index}")
    else:
        assert isinstance(tree, Leaf) and leaf_says(tree, value), f"{where}: {value!r} for {tree!r}"


def leaf_says(leaf: Leaf, value: Any) -> bool:
    if isinstance(value, str):
        return leaf.text == value
    if not leaf.plain:
        return False
    if value is None:
        return leaf.text in ("", "~", "null", "Null", "NULL")
    if isinstance(value, bool):
        return leaf.text.lower() in (("true", "yes", "on") if value else ("false", "no", "off"))
    if re.fullmatch(r"[-+]?0[xb][0-9a-fA-F_]+", leaf.text):
        return int(leaf.text.replace("_", ""), 0) == value
    try:
        said = Decimal(leaf.text.replace("_", ""))
    except InvalidOperation:
        return False
    return float(said) == value if isinstance(value, float) else said == value


TARGET = Target("config", prepare, run)
