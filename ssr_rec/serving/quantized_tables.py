"""Packs embedding tables in fewer bits, as FBGEMM stores and looks them up, in a form that ``torch.export`` takes.

    fp32, fp16   (R, D)
    int8         (R, D + 8) uint8: a byte a column, then scale and offset of the row, float32
    int4         (R, D/2 + 4) uint8: half a byte a column, even columns in the low half, then scale and offset, float16

A table of fewer than four columns (the first-order weights of DeepFM) stays fp32, its scales would outweigh it; one of
an odd number of columns takes int8 for int4.
"""

from __future__ import annotations

from typing import Literal

import fbgemm_gpu  # noqa: F401  the operators that pack
import torch
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["fp32", "fp16", "int8", "int4"]
LEAST_COLUMNS = 4


def stored_as(precision: Precision, columns: int) -> Precision:
    """Return the precision of a table of so many columns."""
    if columns < LEAST_COLUMNS:
        return "fp32"
    return "int8" if precision == "int4" and columns % 2 else precision


def pack(table: Tensor, precision: Precision) -> Tensor:
    """Return ``table`` (R, D) float32 as it is stored."""
    table = table.detach().float().contiguous()
    kind = stored_as(precision, table.shape[1])
    if kind == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(table)
    if kind == "int4":
        return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(table, 4)
    return table.half() if kind == "fp16" else table.clone()


def pooled(
    packed: Tensor, kind: Precision, ids: Tensor, offsets: Tensor, mode: str = "sum", weights: Tensor | None = None
) -> Tensor:
    """Return the sum or mean of the rows of each bag, zeros for an empty one: (B, D) float32.

    Args:
        kind: what ``stored_as`` says of the table.
        ids: (n,) int64.
        offsets: (B + 1,) int64, where each bag begins in ids, and the end of the last.
        weights: (n,) float32 by which a sum takes the rows.
    """
    if kind == "fp16" and weights is not None:
        # The operator wants weights in the precision of the table.
        ids, packed, kind = torch.arange(ids.shape[0]), F.embedding(ids, packed).float(), "fp32"
    if kind in ("fp32", "fp16"):
        return F.embedding_bag(
            ids, packed, offsets, mode=mode, per_sample_weights=weights, include_last_offset=True
        ).float()
    look_up = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    if kind == "int4":
        look_up = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    sums = look_up(packed, ids, offsets, per_sample_weights=weights, include_last_offset=True)
    return sums if mode == "sum" else sums / (offsets[1:] - offsets[:-1]).clamp(min=1).unsqueeze(1)


def _shape_of_int4(weight: Tensor, indices: Tensor, offsets: Tensor, *rest: object, **options: object) -> Tensor:
    # torch has this for the byte operator alone.
    return weight.new_empty(offsets.shape[0] - 1, 2 * (weight.shape[1] - 4), dtype=torch.float32)


# The registration ends with the object.
_SHAPES = torch.library.Library("quantized", "IMPL")
_SHAPES.impl("embedding_bag_4bit_rowwise_offsets", _shape_of_int4, "Meta")
