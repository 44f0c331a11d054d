"""Broken and hostile files: refused by name, or read as what they say. A few now, thousands with ``-m faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import checkpoint_target, config_target, logs, schema_target, shard_target
from tests.fuzz.harness import fuzz

MODULES = (schema_target, config_target, shard_target, checkpoint_target)
TARGETS = {module.TARGET.name: module.TARGET for module in MODULES}
CASES = {"schema": 600, "config": 800, "shards": 600, "checkpoint": 500}


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(TARGETS[name], 15, tmp_path / "work", tmp_path / "kept")
    assert outcomes["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(TARGETS[name], CASES[name], tmp_path / "work", tmp_path / "kept")
    print(f"{name}: {dict(outcomes)}")
    assert outcomes["refused"] > CASES[name] / 4 and len(outcomes) > 1, "both kinds of input must be drawn"


@pytest.mark.slow
def test_a_few_logs_are_prepared_and_scored_as_the_docs_say(tmp_path: Path) -> None:
    for seed in range(4):
        assert logs.check(seed, tmp_path / str(seed), with_spark=False) is None, f"log {seed}"


@pytest.mark.faults
def test_many_logs_are_prepared_and_scored_as_the_docs_say(tmp_path: Path) -> None:
    assert logs.main(["--logs", "30", "--seed", "100"]) == 0
