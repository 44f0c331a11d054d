"""Encoders of every kind, and batches of histories, for the tests of this folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.choice import EncoderConfig
from ssr_rec.sequences.registry import build_encoder

CONFIGS = TypeAdapter(EncoderConfig)
E, D, L = 8, 4, 6
"""Dims of an event and of a field, most events of a row."""

SETTINGS: dict[str, dict[str, Any]] = {
    "pool mean": {"name": "pool"},
    "pool sum": {"name": "pool", "mode": "sum", "fields": 3},
    "pool last": {"name": "pool", "mode": "last"},
    "din": {"name": "din", "hidden": [5]},
    "din dice": {"name": "din", "hidden": [5, 3], "activation": "dice"},
    "din sigmoid softmax": {"name": "din", "hidden": [5, 3], "activation": "sigmoid", "softmax": True, "fields": 1},
    "din relu short target": {"name": "din", "activation": "relu", "initializer": "torch"},
    "target_attention": {"name": "target_attention"},
    "target_attention wide": {"name": "target_attention", "num_heads": 3, "attention_dim": 12, "fields": 3},
    "target_attention norm": {"name": "target_attention", "layer_norm": True},
    "transformer": {"name": "transformer", "num_heads": 4},
    "transformer mean": {
        "name": "transformer",
        "num_heads": 3,
        "num_layers": 2,
        "positions": "index",
        "output": "mean",
        "ffn_ratio": 1,
    },
    "transformer concat": {"name": "transformer", "num_heads": 2, "positions": "none", "output": "concat"},
    "transformer dim": {"name": "transformer", "num_heads": 2, "dim": 6, "position_dim": 2, "num_layers": 2},
    "hstu": {"name": "hstu"},
    "hstu wide": {"name": "hstu", "num_layers": 3, "dim": 12, "attention_dim": 3, "value_dim": 5, "bias": "age"},
    "hstu position": {"name": "hstu", "num_heads": 1, "bias": "position", "fields": 1},
    "hstu one layer": {"name": "hstu", "num_layers": 1, "bias": "none"},
}
TARGET_DIMS = {"din relu short target": 4, "target_attention wide": 5, "transformer dim": 4, "hstu wide": 3}
"""Dims of the target, where they are not those of an event."""


class Batch(NamedTuple):
    """What ``forward`` takes."""

    events: Tensor
    lengths: Tensor
    target: Tensor
    ages: Tensor

    def rows(self, order: list[int]) -> Batch:
        """Take these rows, with their events."""
        offsets = [0, *self.lengths.cumsum(0).tolist()]
        taken = [i for row in order for i in range(offsets[row], offsets[row + 1])]
        return Batch(self.events[taken], self.lengths[order], self.target[order], self.ages[taken])

    def copy(self) -> Batch:
        """Copy the events and the target as leaves that want gradients."""
        return self._replace(
            events=self.events.detach().clone().requires_grad_(), target=self.target.detach().clone().requires_grad_()
        )


def build(case: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> SequenceEncoder:
    """Make an encoder in evaluation whose parameters and buffers, zeros and ones too, are drawn anew."""
    torch.manual_seed(seed)
    settings = CONFIGS.validate_python(SETTINGS[case])
    encoder = build_encoder(E, TARGET_DIMS.get(case, E), D, L, settings).to(dtype).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0.1, 0.5)
        for buffer in encoder.buffers():
            buffer.uniform_(0.5, 1.5)
    return encoder


def batch(case: str, lengths: tuple[int, ...] = (3, 0, 6, 1, 0, 4), dtype: torch.dtype = torch.float64) -> Batch:
    """Draw events, targets and ages, the oldest event of a row first."""
    generator = torch.Generator().manual_seed(sum(lengths))
    draw = {"generator": generator, "dtype": dtype}
    events = torch.randn(sum(lengths), E, **draw)
    target = torch.randn(len(lengths), TARGET_DIMS.get(case, E), **draw)
    ages = [(10 ** (6 * torch.rand(n, generator=generator))).long().sort(descending=True).values for n in lengths]
    return Batch(events, torch.tensor(lengths), target, torch.cat([*ages, torch.zeros(0).long()]))


def gradients(encoder: SequenceEncoder, y: Tensor, inputs: Batch) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of ``y``, by name."""
    leaves = {"events": inputs.events, "target": inputs.target, **dict(encoder.named_parameters())}
    weights = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).sin().view(y.shape)
    found = torch.autograd.grad((y.double() * weights).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
