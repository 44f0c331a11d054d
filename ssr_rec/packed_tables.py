"""Embedding tables in fewer bits, in pure tensor code: what is stored, and how looked-up rows become float32 again.

The formats are FBGEMM's row-wise ones, packed by its operators, with the scales beside the rows instead of behind them:

    fp32, fp16   rows (R, D)
    int8         rows (R, D) uint8, scales (R, 2) float32: scale and offset of each row, value = scale * byte + offset
    int4         rows (R, D/2) uint8, even columns in the low half; scales (R, 2) float16

A table of fewer than four columns (the first-order weights of DeepFM) stays fp32: its scales would outweigh it.
"""

from __future__ import annotations

from typing import Literal

import fbgemm_gpu  # noqa: F401  the operators that pack
import torch
from torch import Tensor

Precision = Literal["fp32", "fp16", "int8", "int4"]
LEAST_COLUMNS = 4


def pack(table: Tensor, precision: Precision) -> list[Tensor]:
    """``table`` (R, D) float32 as ``[rows]`` or ``[rows, scales]``."""
    table = table.detach().float().contiguous()
    if precision == "fp32" or table.shape[1] < LEAST_COLUMNS:
        return [table.clone()]
    if precision == "fp16":
        return [table.half()]
    if precision == "int8":
        fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(table)
        scales = fused[:, -8:].contiguous().view(torch.float32)
        return [fused[:, :-8].contiguous(), scales]
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(table, 4)
    return [fused[:, :-4].contiguous(), fused[:, -4:].contiguous().view(torch.float16)]


def look_up(packed: list[Tensor], ids: Tensor) -> Tensor:
    """Rows ``ids`` (...) of a packed table as (..., D) float32."""
    rows = packed[0][ids]
    if len(packed) == 1:
        return rows.float()
    scales = packed[1][ids].float()
    if packed[1].dtype == torch.float16:
        rows = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(-2)
    return rows.float() * scales[..., :1] + scales[..., 1:]
