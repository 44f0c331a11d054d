"""Broken and hostile files: refused by name, or read as what they say. A few now, thousands with ``-m faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import checkpoint_target, config_target, schema_target, shard_target
from tests.fuzz.harness import fuzz

MODULES = (schema_target, config_target, shard_target, checkpoint_target)
TARGETS = {module.TARGET.name: module.TARGET for module in MODULES}
CASES = {"schema": 600, "config": 800, "shards": 600, "checkpoint": 500}


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(TARGETS[name], 25, tmp_path / "work", tmp_path / "kept")
    assert outcomes["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(TARGETS[name], CASES[name], tmp_path / "work", tmp_path / "kept")
    print(f"{name}: {dict(outcomes)}")
    assert outcomes["refused"] > CASES[name] / 4 and len(outcomes) > 1, "both kinds of input must be drawn"
