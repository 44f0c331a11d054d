"""Small cases to plan."""

from dataclasses import replace
from pathlib import Path

from ssr_rec.config.run import load_config
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import Schema
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.hardware import Hardware, load_hardware

SMALL = ["--over_arch.name=mlp", "--over_arch.hidden=[32]", "--train.batch_size=4096"]


def make_schema(rows: dict[str, int], lists: tuple[str, ...] = ()) -> Schema:
    features = [
        Feature(
            name=name,
            kind="list" if name in lists else "categorical",
            num_embeddings=count,
            encoding=Drawn(column=name),
            max_length=8 if name in lists else None,
        )
        for name, count in rows.items()
    ]
    return Schema(name="small", dataset_id="", features=features, labels=["click"], splits={})


def make_case(
    rows: dict[str, int],
    overrides: list[str],
    nodes: int = 1,
    per_node: int = 2,
    hardware: str | Hardware = "a100_80g",
    lengths: dict[str, float] | None = None,
) -> Case:
    """A case of those tables; features with a length other than 1 are lists."""
    lengths = lengths or {}
    kind = load_hardware(hardware) if isinstance(hardware, str) else hardware
    config = load_config(None, [*SMALL, *overrides])
    return Case(config, make_schema(rows, tuple(lengths)), lengths, make_world(nodes, per_node, kind))


def with_memory(case: Case, gib: float) -> Case:
    """The case on devices of so much memory, all of it to be used."""
    assumptions = case.world.hardware.assumptions.model_copy(update={"reserved_gib": 0.0, "fragmentation": 0.0})
    hardware = case.world.hardware.model_copy(update={"memory_gib": gib, "assumptions": assumptions})
    return replace(case, world=replace(case.world, hardware=hardware))


def write_yaml(folder: Path, text: str, name: str = "file.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)
