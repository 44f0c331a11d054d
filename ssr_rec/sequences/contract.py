"""Checks that a sequence encoder of one's own keeps the contract on which training and export rely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssr_rec.over_archs.contract import require, require_gradient
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.registry import build_encoder
from ssr_rec.sequences.settings import CustomEncoderConfig

EVENT_DIM, TARGET_DIM, FIELD_DIM, MAX_LENGTH = 8, 8, 4, 6
LENGTHS = (3, 0, 6, 1)
TOLERANCE = 1e-5


def check_encoder(path: str, settings: Mapping[str, Any] | None = None) -> None:
    """Build the encoder at ``MODULE:CLASS`` on random events and check what it must do.

    That is: the shape of its output, each row by itself, a defined output of an empty history, a finite gradient for
    every parameter, and weights from a state dict. In a test of your own: ``check_encoder("my_module:MyEncoder")``.

    Args:
        settings: of the class.

    Raises:
        UserError: the class cannot be imported or built.
        AssertionError: it does not keep the contract; the message says which part.
    """
    config = CustomEncoderConfig(path=path, settings=dict(settings or {}))

    def made(seed: int) -> SequenceEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_encoder(EVENT_DIM, TARGET_DIM, FIELD_DIM, MAX_LENGTH, config)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows, events = len(LENGTHS), sum(LENGTHS)
        inputs = (torch.randn(events, EVENT_DIM), torch.tensor(LENGTHS), torch.randn(rows, TARGET_DIM))
        given = (*inputs, torch.arange(events, 0, -1))
        encoder = made(0).eval()
        together = encoder(*given)
        wanted = (rows, encoder.out_fields * FIELD_DIM)
        require(together.shape == wanted, f"forward gives {tuple(together.shape)}, not {wanted}")
        require(bool(together.isfinite().all()), "an output is not finite; a history may be empty")
        _check_rows(encoder, given, together)
        other = made(1).eval()
        other.load_state_dict(encoder.state_dict())
        require(torch.equal(other(*given), together), "its state_dict does not hold all; register buffers")
        trained = made(0)
        loss = (trained(*given) * torch.randn_like(together)).sum()
        if loss.requires_grad:
            loss.backward()
        for name, tensor in trained.named_parameters():
            require_gradient(name, tensor)
        require(encoder.flops(MAX_LENGTH).total >= 0, "flops() is negative")


def _check_rows(encoder: SequenceEncoder, given: tuple[Tensor, ...], together: Tensor) -> None:
    events, lengths, target, ages = given
    first = 0
    for row, length in enumerate(LENGTHS):
        part = slice(first, first + length)
        alone = encoder(events[part], lengths[row : row + 1], target[row : row + 1], ages[part])
        worst = (alone - together[row]).abs().max().item()
        require(worst < TOLERANCE, f"a row's output depends on the other rows, by {worst:.1e}")
        first += length
