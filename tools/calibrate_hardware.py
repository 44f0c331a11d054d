"""Measures what one device really does, as a hardware file for the planner; docs/planner.md.

    python tools/calibrate_hardware.py --base a100_80g --out mine.yaml
    python tools/plan_sharding.py --config CONFIG --nodes 2 --gpus-per-node 8 --hardware mine.yaml

Measured, as medians: bandwidth of memory (a copy), matrix products of each precision at shapes of over-archs; of a
GPU, the link to host memory (pinned) and the host's time for a kernel; of a CPU, FBGEMM's lookups where it is
installed. Links between GPUs and hosts stay those of ``--base``. Takes half a minute. Prints each figure beside the
base's; the last line is JSON. A GPU needs torch alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import write_text
from ssr_rec.planning.hardware import load_hardware, preset_names

GB, TERA = 1e9, 1e12
SHAPES = ((1024, 1024), (640, 320), (512, 512))
"""Fan in and out of the products: wide and narrow layers of over-archs."""
TINY_KERNELS = 1000
LOOKUP_TABLES, LOOKUP_ROWS, LOOKUP_BATCH = 8, 50_000, 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this device, as a hardware file for the planner.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--base", help=f"what is not measured: {', '.join(preset_names())}; default: cpu, or a100_80g")
    parser.add_argument("--out", type=Path, help="write the hardware file here")
    parser.add_argument("--megabytes", type=int, default=256, help="size of the copies (default 256)")
    parser.add_argument("--rows", type=int, default=8192, help="rows of the products (default 8192)")
    parser.add_argument("--repetitions", type=int, default=15, help="timed turns of each (default 15)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
        for name in ("megabytes", "rows", "repetitions"):
            if getattr(chosen, name) < 1:
                raise UserError(f"--{name} {getattr(chosen, name)}: give 1 or more")
        base = load_hardware(chosen.base or ("a100_80g" if chosen.device == "cuda" else "cpu"))
        if base.device != chosen.device:
            raise UserError(f"--base {base.name} is of {base.device}, the device is {chosen.device}: give another base")
        found = measure(torch.device(chosen.device), chosen.megabytes, chosen.rows, chosen.repetitions)
        values = hardware_values(found, base.name)
        for name, value in found.items():
            print(f"{name:<24} {value}" if isinstance(value, str) else f"{name:<24} {value:,.4g}")
        if chosen.out is not None:
            write_text(chosen.out, yaml.safe_dump(values, sort_keys=False))
            load_hardware(str(chosen.out))
    except (UserError, OSError) as error:
        print(f"calibrate_hardware: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"measured": found, "hardware": values}))
    return 0


def measure(device: torch.device, megabytes: int, rows: int, repetitions: int) -> dict[str, Any]:
    """Return name -> figure: GB/s, TFLOP/s, microseconds; ``device`` names it."""
    cuda = device.type == "cuda"
    seconds = timer(device, repetitions)
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads",
        # A copy reads and writes.
        "memory_gb_s": 2 * source.nbytes / seconds(lambda: target.copy_(source)) / GB,
    }
    if cuda:
        found["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        pinned = torch.ones(source.numel(), pin_memory=True)
        found["host_link_gb_s"] = source.nbytes / seconds(lambda: target.copy_(pinned, non_blocking=True)) / GB
        small = torch.ones(64, device=device)
        found["kernel_us"] = seconds(lambda: [small.add_(1) for _ in range(TINY_KERNELS)]) / TINY_KERNELS * 1e6
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        *((("tf32", torch.float32, True),) if cuda else ()),
        ("bf16", torch.bfloat16, False),
    ):
        found[f"{name}_tflops"] = _product_rate(device, dtype, tf32, rows, seconds)
    if not cuda and importlib.util.find_spec("fbgemm_gpu") is not None:
        found |= lookup_costs(seconds)
    return found


def lookup_costs(seconds: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """Return nanoseconds of a bag, an id and a byte of a lookup, its backward pass and row-wise Adagrad on a CPU.

    They are fitted, none below 0, to tables of two dims with one id a bag and with ten.
    """
    # Imported here: a GPU is calibrated without FBGEMM and SciPy.
    import numpy as np
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
    from scipy.optimize import nnls

    from ssr_rec.embeddings.cpu_bags import RowWiseAdagradBags

    counts, taken = [], []
    for dim, length in ((16, 1), (64, 1), (16, 10), (64, 10)):
        specs = [(LOOKUP_ROWS, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * LOOKUP_TABLES
        tables = RowWiseAdagradBags(specs, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)
        bags = LOOKUP_TABLES * LOOKUP_BATCH
        ids, offsets = torch.randint(0, LOOKUP_ROWS, (bags * length,)), torch.arange(bags + 1) * length
        taken.append(seconds(lambda t=tables, i=ids, o=offsets: t(i, o).sum().backward()) * 1e9)  # type: ignore[misc]
        counts.append((bags, bags * length, bags * (length + 1) * dim * 4))
    # Relative errors count, so that the short case is as good as the long one.
    weighed = np.array(counts) / np.array(taken)[:, None]
    costs, _ = nnls(weighed, np.ones(len(taken)))
    return {f"lookup_{name}_ns": float(cost) for name, cost in zip(("bag", "id", "byte"), costs, strict=True)}


def _product_rate(
    device: torch.device, dtype: torch.dtype, tf32: bool, rows: int, seconds: Callable[[Callable[[], Any]], float]
) -> float:
    """Return 1e12 operations a second over all ``SHAPES``, forward products of ``rows`` rows."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        pairs = [
            (torch.ones(rows, a, dtype=dtype, device=device), torch.ones(a, b, dtype=dtype, device=device))
            for a, b in SHAPES
        ]
        operations = sum(2 * rows * a * b for a, b in SHAPES)
        return operations / seconds(lambda: [x @ w for x, w in pairs]) / TERA
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def timer(device: torch.device, repetitions: int) -> Callable[[Callable[[], Any]], float]:
    """Return what gives the median seconds of a call on ``device``, after two that do not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(repetitions + 2):
            wait()
            begun = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken[2:])

    return seconds


def hardware_values(found: dict[str, Any], base: str) -> dict[str, Any]:
    """Return a hardware file: the measured figures over ``base``, whose products need no utilisation any more."""
    rates = {name: round(found[f"{name}_tflops"], 4) for name in ("fp32", "tf32", "bf16") if f"{name}_tflops" in found}
    said = f"measured by tools/calibrate_hardware.py on {found['device']}, {date.today():%Y-%m-%d}"
    values: dict[str, Any] = {"base": base, "memory_gb_s": round(found["memory_gb_s"], 1), "peak_tflops": rates}
    values |= {name: round(found[name], 2) for name in ("memory_gib", "host_link_gb_s") if name in found}
    values["assumptions"] = {"gemm_utilisation": dict.fromkeys(rates, 1.0)}
    if "lookup_id_ns" in found:
        values["assumptions"]["lookup_ns"] = {name: found[f"lookup_{name}_ns"] for name in ("bag", "id", "byte")}
    values["sources"] = {"memory, peak_tflops, gemm_utilisation, host_link": said}
    return values


if __name__ == "__main__":
    sys.exit(main())
