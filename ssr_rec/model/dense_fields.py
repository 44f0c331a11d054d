"""Turns numbers into fields of D dims: dense columns, by a bottom MLP or linear maps, and vectors, by linear maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ssr_rec.config.dense import DenseConfig
from ssr_rec.data.dense import DenseColumn, RowVector
from ssr_rec.over_archs.base import dense_flops
from ssr_rec.over_archs.layers import ViewLinear, init_dense_


class PiecewiseLinear(nn.Module):
    """Encodes a number by how far it is through each quantile bin of its column: (B, C) to (B, C, K).

    Of bins ``[b_(k-1), b_k)``, entry k is ``(x - b_(k-1)) / (b_k - b_(k-1))``, not below 0 but in the first bin and not
    above 1 but in the last (Gorishniy, Rubachev, Babenko, NeurIPS 2022, section 3.2). A column with fewer bins than
    another has zeros behind them.
    """

    begins: Tensor
    widths: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, columns: Sequence[DenseColumn]) -> None:
        super().__init__()
        self.bins = max(len(column.edges) - 1 for column in columns)
        begins, widths, least, most = (torch.zeros(len(columns), self.bins, dtype=torch.float64) for _ in range(4))
        widths.fill_(1.0)
        for row, column in enumerate(columns):
            edges, last = torch.tensor(column.edges, dtype=torch.float64), len(column.edges) - 2
            begins[row, : last + 1], widths[row, : last + 1] = edges[:-1], edges.diff()
            most[row, : last + 1] = 1.0
            least[row, 0], most[row, last] = -math.inf, math.inf
        for name, tensor in (("begins", begins), ("widths", widths), ("least", least), ("most", most)):
            # The schema has them; a checkpoint holds what was learned.
            self.register_buffer(name, tensor.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x.unsqueeze(2) - self.begins) / self.widths
        return torch.minimum(torch.maximum(parts, self.least), self.most)


class DenseFields(nn.Module):
    """Makes the fields of dense columns: ``forward(numbers (B, C), NaN where missing) -> (B, sum of dims)``.

    A missing number enters as 0, and a further entry of each column is 1 where it is missing.

    Args:
        columns: C of them, in the order of the numbers.
        field_dim: D of each field.
    """

    def __init__(self, columns: Sequence[DenseColumn], config: DenseConfig, field_dim: int) -> None:
        super().__init__()
        self.num_columns = len(columns)
        self.piecewise = PiecewiseLinear(columns) if config.encoding == "piecewise" else None
        width = 1 + (self.piecewise.bins if self.piecewise is not None else 1)
        if config.arch == "linear":
            self.names = [column.name for column in columns]
            self.linear: ViewLinear | None = ViewLinear(self.num_columns, width, field_dim, "glorot")
            self.layers = nn.ModuleList()
        else:
            self.names = ["dense.mlp"] if config.fields == 1 else [f"dense.mlp{i}" for i in range(config.fields)]
            self.linear = None
            sizes = [self.num_columns * width, *config.hidden, config.fields * field_dim]
            self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))
            for layer, (fan_in, fan_out) in zip(self.layers, pairwise(sizes), strict=True):
                assert isinstance(layer, nn.Linear)
                init_dense_(layer.weight, layer.bias, fan_in, fan_out, "glorot")
        self.dims = [field_dim] * len(self.names)

    def forward(self, numbers: Tensor) -> Tensor:
        # Vectors of rows come behind.
        numbers = numbers[:, : self.num_columns]
        missing = numbers.isnan()
        x = numbers.masked_fill(missing, 0.0)
        mark = missing.to(x.dtype).unsqueeze(2)
        encoded = x.unsqueeze(2) if self.piecewise is None else self.piecewise(x) * (1 - mark)
        encoded = torch.cat([encoded, mark], dim=2)
        if self.linear is not None:
            return self.linear(encoded.transpose(0, 1)).transpose(0, 1).flatten(1)
        hidden = encoded.flatten(1)
        for place, layer in enumerate(self.layers):
            hidden = layer(torch.relu(hidden) if place else hidden)
        return hidden

    def matmul_flops(self) -> int:
        """Return the operations of its matrix products in one forward pass of one row."""
        if self.linear is not None:
            return self.linear.flops().matmul
        return sum(dense_flops(*layer.weight.t().shape).matmul for layer in self.layers if isinstance(layer, nn.Linear))


class RowVectorFields(nn.Module):
    """Maps the vectors that rows bring to fields: ``forward(dense (B, C), they come last) -> (B, sum of dims)``.

    A missing vector enters as zeros, with a further entry of 1.

    Args:
        vectors: in the order of their numbers.
        field_dim: D of each field.
    """

    def __init__(self, vectors: Sequence[RowVector], field_dim: int) -> None:
        super().__init__()
        self.names = [vector.name for vector in vectors]
        self.dims = [field_dim] * len(vectors)
        self.sizes = [vector.dim for vector in vectors]
        self.num_columns = sum(self.sizes)
        self.linears = nn.ModuleList()
        for size in self.sizes:
            linear = nn.Linear(size + 1, field_dim)
            init_dense_(linear.weight, linear.bias, size + 1, field_dim, "glorot")
            self.linears.append(linear)

    def forward(self, dense: Tensor) -> Tensor:
        fields = []
        for linear, part in zip(self.linears, dense[:, -self.num_columns :].split(self.sizes, 1), strict=True):
            missing = part[:, :1].isnan()
            vector = torch.cat([part.masked_fill(missing, 0.0), missing.to(part.dtype)], dim=1)
            fields.append(linear(vector))
        return torch.cat(fields, dim=1)

    def matmul_flops(self) -> int:
        """Return the operations of its matrix products in one forward pass of one row."""
        return sum(dense_flops(size + 1, dim).matmul for size, dim in zip(self.sizes, self.dims, strict=True))
