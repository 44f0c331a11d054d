"""The model as it is served: ids to logits in one graph, every lookup of single-valued fields fused into one.

Shapes beside those of ``ssr_rec.over_archs``: ``S`` single-valued features, ``n_l`` ids of list feature l in the whole
batch, ``R`` rows of a table. Features stand in schema order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssr_rec.embeddings import columns_per_dim
from ssr_rec.kernels import view_scoring
from ssr_rec.model import CTRModel, DenseArch
from ssr_rec.over_archs import OverArch
from ssr_rec.over_archs.filters import StaticRandomFilter
from ssr_rec.over_archs.ssr import SSR, ViewFusion
from ssr_rec.packed_tables import Precision, pack, pooled, stored_as
from ssr_rec.schema import Schema


class Stack(NamedTuple):
    """Tables of one dim and one set, one below the other."""

    name: str
    columns: int
    """How many of a trained table's columns make one column here."""
    features: list[int]
    """Positions of their features in the schema, ascending."""
    first_rows: list[int]
    """Where each one's table begins."""
    kind: Precision
    """How it is stored."""


class Layout(NamedTuple):
    """Where the ids of a batch are looked up."""

    kinds: list[str]
    """Of each feature in schema order."""
    pooling: str
    sets: list[list[Stack]]
    """Of each input of the over-arch."""

    @property
    def singles(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind != "list"]

    @property
    def lists(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind == "list"]


def make_layout(schema: Schema, dense: DenseArch, pooling: str, precision: Precision) -> Layout:
    sizes = [feature.num_embeddings for feature in schema.features]
    sets = [("main", 1, list(dense.over_arch.field_dims))]
    sets += [(name, columns_per_dim(dims), list(dims)) for name, dims in dense.over_arch.extra_tables.items()]
    stacks = []
    for name, columns, dims in sets:
        found = []
        for dim in sorted(set(dims)):
            features = [i for i, d in enumerate(dims) if d == dim]
            first_rows = [sum(sizes[j] for j in features[:at]) for at in range(len(features))]
            found.append(Stack(f"{name}-{dim}", columns, features, first_rows, stored_as(precision, dim)))
        stacks.append(found)
    return Layout([feature.kind for feature in schema.features], pooling, stacks)


def stacked_tables(model: CTRModel, schema: Schema, layout: Layout) -> dict[str, Tensor]:
    """Name of each stack -> its packed table, of a model with plain tables."""
    trained = model.tables.embedding_bags
    tables = {}
    for number, stacks in enumerate(layout.sets):
        for stack in stacks:
            suffix = f"@{stack.name.rpartition('-')[0]}" if number else ""
            names = [schema.feature_names[i] + suffix for i in stack.features]
            whole = torch.cat([trained[name].weight.detach() for name in names])
            if stack.columns > 1:
                whole = whole.unflatten(1, (-1, stack.columns)).mean(2)
            tables[stack.name] = pack(whole, stack.kind)
    return tables


class ServingModel(nn.Module):
    """``forward(ids (S, B), lists [values (n_l,), offsets (B+1,), ...], tables) -> logits (B, T)``.

    The tables are arguments, so that they stay files of their own, mapped into memory.

    Args:
        bf16: run over-arch and heads in bfloat16 by autocast, as training with ``train.bf16`` does.
    """

    def __init__(self, dense: DenseArch, layout: Layout, bf16: bool) -> None:
        super().__init__()
        self.over_arch = for_scoring(dense.over_arch, bf16)
        self.heads, self.layout, self.bf16 = dense.heads, layout, bf16
        for number, stacks in enumerate(layout.sets):
            for place, stack in enumerate(stacks):
                rows = [row for i, row in zip(stack.features, stack.first_rows, strict=True) if i in layout.singles]
                self.register_buffer(f"first_rows_{number}_{place}", torch.tensor(rows, dtype=torch.int64))

    def forward(self, ids: Tensor, lists: list[Tensor], tables: list[Tensor]) -> Tensor:
        left = list(tables)
        inputs = []
        for number, stacks in enumerate(self.layout.sets):
            inputs.append(self._embed(number, stacks, ids, lists, left[: len(stacks)]))
            left = left[len(stacks) :]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            features = self.over_arch(*inputs)
            if isinstance(features, Tensor):
                return self.heads(features).float()
            features, logits = features
            return self.heads(features).float() + logits.float()

    def _embed(
        self, number: int, stacks: list[Stack], ids: Tensor, lists: list[Tensor], tables: list[Tensor]
    ) -> Tensor:
        """One input of the over-arch: (B, sum of dims), fields in schema order."""
        layout, rows = self.layout, ids.shape[1]
        rank = {feature: place for place, feature in enumerate(layout.singles)}
        pieces: dict[int, Tensor] = {}
        for place, (stack, packed) in enumerate(zip(stacks, tables, strict=True)):
            singles = [i for i in stack.features if i in rank]
            if singles:
                wanted = ids if len(singles) == len(rank) else ids[[rank[i] for i in singles]]
                first_rows = getattr(self, f"first_rows_{number}_{place}")
                # Bags of one id: FBGEMM's kernels copy or unpack a row faster than the compiled loop of an index.
                places = (wanted.t() + first_rows).flatten()
                bags = torch.arange(rows * len(singles) + 1)
                looked_up = pooled(packed, stack.kind, places, bags).view(rows, len(singles), -1)
                for start, stop in _runs(singles):
                    pieces[singles[start]] = looked_up[:, start:stop].flatten(1)
            for feature, first_row in zip(stack.features, stack.first_rows, strict=True):
                if feature not in rank:
                    at = 2 * layout.lists.index(feature)
                    pieces[feature] = pooled(packed, stack.kind, lists[at] + first_row, lists[at + 1], layout.pooling)
        return torch.cat([pieces[feature] for feature in sorted(pieces)], dim=1)


class ScoringLayer(nn.Module):
    """Static filter ``indices`` (V, N) and one dense layer a view, by the operator for scoring."""

    indices: Tensor
    weight_t: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor | None

    def __init__(self, indices: Tensor, fusion: ViewFusion, bf16: bool, last: bool) -> None:
        super().__init__()
        dense, norm = fusion.dense, fusion.norm
        weight = dense.weight.detach()
        kept = {
            "indices": indices,
            "weight_t": weight.mT.contiguous().to(torch.bfloat16 if bf16 else weight.dtype),
            "bias": dense.bias.detach(),
            "scale": norm.weight.detach(),
            "shift": norm.bias.detach(),
            # A row must not score differently in a small batch: in bfloat16 all are multiplied alike.
            "weight": None if bf16 else weight,
        }
        for name, tensor in kept.items():
            self.register_buffer(name, tensor)
        self.eps, self.last, self.residual = norm.eps, last, fusion.residual

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.scale, self.shift, self.eps)
        layer = (self.indices, self.weight_t, self.bias, *norm, self.weight)
        return view_scoring(x.float(), *layer, turned=not self.last, residual=self.residual)


def for_scoring(over_arch: OverArch, bf16: bool) -> OverArch:
    """A copy whose layers have their form for scoring, where there is one."""
    copied = copy.deepcopy(over_arch)
    if isinstance(copied, SSR):
        for place, layer in enumerate(copied.blocks()):
            chosen, fusion = layer.filter, layer.fusion
            if isinstance(chosen, StaticRandomFilter) and fusion.dense2 is None:
                copied.layers[place] = ScoringLayer(chosen.indices, fusion, bf16, place == len(copied.layers) - 1)
    return copied


def _runs(features: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop within ``features`` of those that follow one another in the schema."""
    starts = [at for at, i in enumerate(features) if at == 0 or features[at - 1] != i - 1]
    return list(zip(starts, [*starts[1:], len(features)], strict=True))
