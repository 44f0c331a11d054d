"""Says what a host of a cluster can do: the figures behind an estimate, from a YAML file, each with its source.

``presets/`` holds the presets; a file of one's own has the same keys, or names a preset as ``base`` and gives those
that differ.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml

PRESETS = Path(__file__).parent / "presets"
Precision = Literal["fp32", "tf32", "bf16"]


class GemmRates(Settings):
    """Gives a figure of dense (not 2:4 sparse) matrix products for each type of the arithmetic."""

    fp32: float = Field(gt=0)
    tf32: float | None = Field(None, gt=0, description="None: the device has no such mode")
    bf16: float = Field(gt=0)


class LookupCosts(Settings):
    """Gives nanoseconds of a table's lookup, backward pass and update together, by what it handles."""

    bag: float = Field(ge=0, description="of one pooled vector")
    id: float = Field(ge=0, description="of one id looked up")
    byte: float = Field(ge=0, description="of one byte of rows looked up and of pooled vectors")


class Assumptions(Settings):
    """Assumes what no datasheet says; docs/planner.md says where each enters and which are fitted to published runs."""

    gemm_utilisation: GemmRates = Field(
        GemmRates(fp32=0.84, tf32=0.4, bf16=0.35), description="share of the peak that the over-arch's products reach"
    )
    link_utilisation: float = Field(0.8, gt=0, le=1, description="share of a link's or network's peak in a collective")
    collective_latency_us: float = Field(30.0, ge=0, description="added to every collective, whatever its size")
    lookup_ns: LookupCosts | None = Field(
        None, description="of tables on a CPU, where lookups are no stream of bytes; None: by memory bandwidth"
    )
    host_step_ms: float = Field(
        3.8, ge=0, description="host time of any step: the pipeline's Python, batch, loss, DDP, optimizers"
    )
    host_way_ms: float = Field(
        4.0,
        ge=0,
        description="host time of each way that tables are kept (sharding type and kernel): it has a lookup, exchanges "
        "of ids and pooled rows, and their backward of its own",
    )
    host_table_us: float = Field(15.0, ge=0, description="host time of a table: keys, splits and optimizer state")
    host_operator_us: float = Field(10.0, ge=0, description="host time of an operator of the dense part: one launch")
    host_speed: float = Field(
        1.0, gt=0, description="times as fast as the Xeon 8275CL of the runs that the host's times are fitted to"
    )
    serial_share: float = Field(
        0.28,
        ge=0,
        le=1,
        description="of the shorter of host's and device's time, what the other does not hide: the host waits for the "
        "sizes of exchanged ids, behind the all-to-all of pooled rows",
    )
    step_floor_ms: float = Field(0.0, ge=0, description="the host's time of a step is at least this")
    within: float = Field(
        1.4, ge=1, description="times that samples/s may be more or less than estimated; the range in reports"
    )
    allreduce_overlap: float = Field(
        0.5, ge=0, le=1, description="share of the dense backward pass that hides the all-reduce of its gradients"
    )
    reserved_gib: float = Field(2.0, ge=0, description="memory of a rank for the CUDA context, NCCL and libraries")
    fragmentation: float = Field(0.05, ge=0, lt=1, description="share of a rank's memory that the allocator loses")


class Hardware(Settings):
    """Describes one host and its share of the network. Bandwidths are of one direction, in 1e9 bytes (GB) a second."""

    name: str
    device: Literal["cuda", "cpu"] = Field(description="cpu: the figures are of the host and its ranks share them")
    max_ranks_per_node: int = Field(ge=1, le=1024)
    memory_gib: float = Field(gt=0, description="of one GPU; cpu: of the host")
    memory_gb_s: float = Field(gt=0, description="bandwidth of that memory")
    peak_tflops: GemmRates
    link_gb_s: float = Field(gt=0, description="between two ranks of a host, per rank")
    network_gbit_s: float = Field(gt=0, description="between hosts, per host, in 1e9 bits a second")
    host_memory_gib: float = Field(gt=0)
    host_memory_gb_s: float = Field(gt=0)
    host_link_gb_s: float = Field(gt=0, description="between a GPU and host memory, per GPU")
    assumptions: Assumptions = Assumptions()
    sources: dict[str, str] = Field(min_length=1, description="key -> where its figure is from")

    def share(self, ranks_per_node: int) -> float:
        """Return the part of the per-host compute and memory figures that is one rank's: a GPU has its own."""
        return 1.0 if self.device == "cuda" else 1.0 / ranks_per_node

    def rank_bytes(self, ranks_per_node: int) -> int:
        """Return the memory of one rank that tables, weights, activations and buffers may fill."""
        whole = self.memory_gib * self.share(ranks_per_node)
        usable = whole * (1 - self.assumptions.fragmentation) - self.assumptions.reserved_gib
        return max(0, int(usable * 2**30))

    def host_bytes(self, ranks_per_node: int) -> int:
        """Return the host memory beside a GPU rank that tables may fill: half, as the readers need memory too."""
        return int(self.host_memory_gib / 2 / ranks_per_node * 2**30)

    def gemm_flops(self, precision: Precision, ranks_per_node: int) -> float:
        """Return floating-point operations a second that one rank's matrix products reach, by assumption.

        Raises:
            UserError: the device has no such precision.
        """
        peak = getattr(self.peak_tflops, precision)
        if peak is None:
            raise UserError(f"{self.name} has no {precision} products; set train.tf32 to false")
        utilisation = getattr(self.assumptions.gemm_utilisation, precision) or self.assumptions.gemm_utilisation.fp32
        return float(peak * 1e12 * utilisation * self.share(ranks_per_node))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """Return the preset of that name, or the YAML file at that path.

    Raises:
        UserError: neither; the nearest preset is named. Or a file with a bad value.
    """
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            nearest = difflib.get_close_matches(name.lower().replace("-", "_"), preset_names(), n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "it is none"
            raise UserError(
                f"--hardware {name!r}: {hint} Presets: {', '.join(preset_names())}; or the path of a .yaml file"
            )
    values = read_yaml(path, "a preset or a file such as those in ssr_rec/planning/presets/")
    base = values.pop("base", None)
    if base is not None:
        if base not in preset_names():
            raise UserError(f"{path}: base {base!r} is no preset; use one of {', '.join(preset_names())}")
        values = _over(load_hardware(base).model_dump(mode="json"), values)
    try:
        return Hardware.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        problem = error.errors()[0]
        known = ", ".join(Hardware.model_fields) if problem["type"] == "extra_forbidden" else ""
        raise UserError(f"{path}: {first_problem(error)}" + (f"; keys: {known}" if known else "")) from None


def _over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``values`` put over it, section by section."""
    merged = {key: value for key, value in base.items() if key != "name"}
    for key, value in values.items():
        inner = merged.get(key)
        merged[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
