"""Reads over-archs from a command line, and resizes them by what they cost."""

from __future__ import annotations

import bisect
import math
import re
from typing import Any

import torch
from over_arch_cases import build

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import apply_override, resolve
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.settings import RankMixerConfig

SIZE_KEYS = {
    "ssr": "view_dim",
    "mlp": "hidden",
    "deepfm": "hidden",
    "dcn_v2": "hidden",
    "mmoe": "expert_hidden",
    "ple": "expert_hidden",
    "autoint": "attention_dim",
    "autofis": "hidden",
    "afn": "hidden",
    "wukong": "hidden",
    "rankmixer": "dim",
}
"""What --equal scales; of a list, every width becomes the size found."""
LARGEST_SIZE = 65_536
TOLERANCE = 0.05
"""Share by which the nearest size may miss --equal's value; integer sizes of small over-archs are coarse."""
COSTS = {"flops": "flops_per_sample", "parameters": "num_parameters"}


def parse_over_arch(spec: str) -> OverArchConfig:
    """Return ``name:key=value,...`` as a config; a value is YAML and may hold commas.

    Raises:
        ValueError: not of that form, an unknown name or key, or a bad value; the message has the text given.
    """
    name, _, settings = spec.partition(":")
    pairs = re.split(r",(?=\w+=)", settings) if settings else []
    if not name or not all(re.match(r"\w+=.", pair) for pair in pairs):
        raise UserError(f"over-arch {spec!r} is not name:key=value,key=value, such as mlp:hidden=[320,320]")
    values: dict[str, Any] = {}
    for pair in [f"name={name}", *pairs]:
        apply_override(values, f"--over_arch.{pair}")
    return resolve(values, f"over-arch {spec!r}").over_arch


def resize(
    config: OverArchConfig, cost: str, target: float, fields: int, dim: int, multiple: int = 1
) -> OverArchConfig:
    """Return the config with the integer size whose cost is nearest to ``target``.

    Args:
        cost: a key of COSTS.
        target: FLOPs of one sample's forward pass, or parameters.
        multiple: the size found is one of it.

    Raises:
        ValueError: no size comes within TOLERANCE of the target, or the config has nothing to scale.
    """
    key = SIZE_KEYS[config.name]
    now = getattr(config, key)
    if now == []:
        raise UserError(f"--equal scales {key} of {config.name}, which is empty here: give it a layer")
    unit = math.lcm(multiple, config.num_tokens) if isinstance(config, RankMixerConfig) else multiple
    start = (max(now) if isinstance(now, list) else now) // unit

    def sized(n: int) -> OverArchConfig:
        value = [n * unit] * len(now) if isinstance(now, list) else n * unit
        return type(config).model_validate({**config.model_dump(), key: value})

    def cost_of(n: int) -> float:
        try:
            with torch.device("meta"):
                return getattr(build(sized(n), fields, dim), COSTS[cost])
        except ValueError:
            # Some sizes do not fit the other settings or the input: too small below the one given, too large above.
            return math.inf if n > start else -math.inf

    build(config, fields, dim)
    above = 1 + bisect.bisect_left(range(1, LARGEST_SIZE), target, key=cost_of)
    nearest = min((n for n in (above - 1, above) if n), key=lambda n: abs(cost_of(n) - target))
    if not abs(cost_of(nearest) / target - 1) <= TOLERANCE:
        raise UserError(
            f"--equal {cost} {target:g}: {config.label} comes no nearer than {cost_of(nearest):g}, "
            f"with {key}={nearest * unit}; change its other sizes"
        )
    return sized(nearest)
