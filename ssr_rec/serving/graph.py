"""Builds the model as it is served: ids to logits in one graph, every lookup of single-valued fields fused into one.

Shapes beside those of ``ssr_rec.over_archs``: ``S`` single-valued features, ``n_l`` ids of list feature l in the whole
batch, ``R`` rows of a table. Rows may share lists: a list feature has ``G_l`` of them. Features stand in schema order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.data.features import Feature
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.tables import columns_per_dim
from ssr_rec.kernels import view_scoring
from ssr_rec.model.ctr_model import CTRModel, DenseArch, joined, logits_of
from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.filters import StaticRandomFilter
from ssr_rec.over_archs.ssr import SSR, ViewFusion
from ssr_rec.sequences.jagged import Shared
from ssr_rec.serving.quantized_tables import Precision, pack, pooled, stored_as


class Stack(NamedTuple):
    """Describes tables of one dim and one set, stacked one below the other."""

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
    """Says where the ids of a batch are looked up."""

    names: list[str]
    kinds: list[str]
    """Of each feature in schema order, as its name."""
    pooling: str
    sets: list[list[Stack]]
    """Of each input of the over-arch."""
    events: list[int]
    """Features that are columns of a sequence with an encoder."""
    weighted: list[int]
    """List features that are pooled with weights."""

    @property
    def singles(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind != "list"]

    @property
    def lists(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind == "list"]


def make_layout(schema: Schema, dense: DenseArch, pooling: str, precision: Precision) -> Layout:
    """Return where each feature's table is: features that share one have one place."""
    place = {name: at for at, name in enumerate(dense.field_names)}
    columns_of = dense.histories.column_dims if dense.histories is not None else {}
    fields = [at for at, name in enumerate(schema.feature_names) if name in place]
    field_dims = dense.over_arch.field_dims
    names = schema.feature_names
    given = dense.vectors.names if dense.vectors is not None else []
    fields = [at for at in fields if names[at] not in given]
    main = {
        at: field_dims[place[name]] if at in fields else columns_of[name]
        for at, name in enumerate(names)
        if name not in given
    }
    sets = [("main", 1, main)]
    for name, dims in dense.over_arch.extra_tables.items():
        sets.append((name, columns_per_dim(dims), {at: dims[place[names[at]]] for at in fields}))
    stacks = []
    for name, columns, dim_of in sets:
        found = []
        for dim in sorted(set(dim_of.values())):
            features = [at for at, d in dim_of.items() if d == dim]
            begins: dict[str, int] = {}
            rows = 0
            for at in features:
                if schema.features[at].table not in begins:
                    begins[schema.features[at].table] = rows
                    rows += schema.features[at].num_embeddings
            first_rows = [begins[schema.features[at].table] for at in features]
            found.append(Stack(f"{name}-{dim}", columns, features, first_rows, stored_as(precision, dim)))
        stacks.append(found)
    events = [names.index(name) for name in columns_of]
    weighted = [names.index(feature.name) for feature in pooled_with_weights(schema)]
    return Layout(names, [feature.kind for feature in schema.features], pooling, stacks, events, weighted)


def pooled_with_weights(schema: Schema) -> list[Feature]:
    """Return the list features of tables that weighted lists read."""
    return [one for one in schema.features if one.kind == "list" and one.table in schema.weighted_tables]


def stacked_tables(model: CTRModel, schema: Schema, layout: Layout) -> dict[str, Tensor]:
    """Return name of each stack -> its packed table, of a model with plain tables."""
    trained = dict(model.tables.embedding_bags.items())
    for further in (model.event_tables, model.weighted_tables):
        if further is not None:
            trained.update(further.embedding_bags.items())
    tables = {}
    for number, stacks in enumerate(layout.sets):
        for stack in stacks:
            suffix = f"@{stack.name.rpartition('-')[0]}" if number else ""
            names = dict.fromkeys(schema.features[i].table + suffix for i in stack.features)
            whole = torch.cat([trained[name].weight.detach() for name in names])
            if stack.columns > 1:
                whole = whole.unflatten(1, (-1, stack.columns)).mean(2)
            tables[stack.name] = pack(whole, stack.kind)
    if model.dense.vectors is not None:
        frozen = model.dense.vectors.frozen
        for place, (name, dim) in enumerate(zip(model.dense.vectors.names, model.dense.vectors.sizes, strict=True)):
            table = frozen[name] if name in frozen else trained[name].weight.detach()[:, :dim].contiguous()
            tables[f"vectors-{place}"] = table
    return tables


class ServingModel(nn.Module):
    """Computes ``forward(ids (S, B), lists [values (n_l,), offsets (G_l+1,), ..], sharing, tables) -> logits (B, T)``.

    ``sharing`` holds which list each row has, (B,) of each list feature; then, of each sequence with an encoder, which
    of its events are those of the rows, (N,) (``Shared``). What depends on a list alone is computed once.

    After the lists come the weights (n_l,) of those that are pooled with weights, as a sum takes them. A model of dense
    columns takes their numbers (B, C) after the tables.

    The tables are arguments, so that they stay files of their own, mapped into memory.

    Args:
        bf16: run over-arch and heads in bfloat16 by autocast, as training with ``train.bf16`` does.
        portable: use operators that others have too, not those that are fast here; tables must be float32.
    """

    def __init__(self, dense: DenseArch, layout: Layout, bf16: bool, portable: bool = False) -> None:
        super().__init__()
        self.over_arch = dense.over_arch if portable else for_scoring(dense.over_arch, bf16)
        self.heads, self.layout, self.bf16, self.portable = dense.heads, layout, bf16, portable
        self.histories, self.numbers, self.row_vectors = dense.histories, dense.numbers, dense.row_vectors
        self.dense_width = dense.dense_width
        # The vectors themselves are among the tables.
        self.vectors = dense.vectors.without_tables() if dense.vectors is not None else None
        self.extra_of_histories = dense.extra_of_histories
        self.domain = dense.domain
        for number, stacks in enumerate(layout.sets):
            for place, stack in enumerate(stacks):
                rows = [row for i, row in zip(stack.features, stack.first_rows, strict=True) if i in layout.singles]
                self.register_buffer(f"first_rows_{number}_{place}", torch.tensor(rows, dtype=torch.int64))

    def forward(
        self,
        ids: Tensor,
        lists: list[Tensor],
        sharing: list[Tensor],
        tables: list[Tensor],
        dense: Tensor | None = None,
    ) -> Tensor:
        left = list(tables)
        of_rows = dict(zip(self.layout.lists, sharing, strict=False))
        inputs, vectors = [], {}
        for number, stacks in enumerate(self.layout.sets):
            pieces = self._embed(number, stacks, ids, lists, left[: len(stacks)])
            pieces |= {at: pieces[at][rows] for at, rows in of_rows.items() if at not in self.layout.events}
            left = left[len(stacks) :]
            if number == 0:
                vectors = {self.layout.names[at]: piece for at, piece in pieces.items()}
            inputs.append(torch.cat([pieces[at] for at in sorted(pieces) if at not in self.layout.events], dim=1))
        made = []
        if self.histories is not None:
            made.append(self._encode(vectors, lists, of_rows, sharing))
        if self.numbers is not None:
            made.append(self.numbers(dense))
        if self.row_vectors is not None:
            made.append(self.row_vectors(dense))
        if self.vectors is not None:
            made.append(self.vectors([ids[self._place(name)] for name in self.vectors.names], left))
        inputs = joined(inputs, made, self.extra_of_histories)
        domain = None if self.domain is None else ids[self._place(self.domain.name)]
        return logits_of(inputs, self.over_arch, self.heads, self.bf16, domain)

    def _place(self, name: str) -> int:
        """Return which row of the ids is that of a single-valued feature."""
        return self.layout.singles.index(self.layout.names.index(name))

    def _embed(
        self, number: int, stacks: list[Stack], ids: Tensor, lists: list[Tensor], tables: list[Tensor]
    ) -> dict[int, Tensor]:
        """Return feature -> its part of one input of the over-arch, or the vectors (n_l, D) of its events.

        A part is (B, D), that of a list feature (G_l, D).
        """
        layout, rows = self.layout, ids.shape[1]
        rank = {feature: place for place, feature in enumerate(layout.singles)}
        pieces: dict[int, Tensor] = {}
        for place, (stack, packed) in enumerate(zip(stacks, tables, strict=True)):
            singles = [i for i in stack.features if i in rank]
            if singles:
                wanted = ids if len(singles) == len(rank) else ids[[rank[i] for i in singles]]
                first_rows = getattr(self, f"first_rows_{number}_{place}")
                looked_up = self._rows(packed, stack.kind, (wanted.t() + first_rows).flatten())
                looked_up = looked_up.view(rows, len(singles), -1)
                # What an encoder takes for its target must be apart from its neighbours.
                runs = [(at, at + 1) for at in range(len(singles))] if layout.events else _runs(singles)
                for start, stop in runs:
                    pieces[singles[start]] = looked_up[:, start:stop].flatten(1)
            for feature, first_row in zip(stack.features, stack.first_rows, strict=True):
                if feature in layout.events:
                    values = lists[2 * layout.lists.index(feature)] + first_row
                    pieces[feature] = self._rows(packed, stack.kind, values)
                elif feature not in rank:
                    at = 2 * layout.lists.index(feature)
                    bag = (lists[at] + first_row, lists[at + 1])
                    if feature in layout.weighted:
                        weights = lists[2 * len(layout.lists) + layout.weighted.index(feature)]
                        pieces[feature] = pooled(packed, stack.kind, *bag, weights=weights)
                    else:
                        pieces[feature] = pooled(packed, stack.kind, *bag, layout.pooling)
        return pieces

    def _rows(self, packed: Tensor, kind: Precision, places: Tensor) -> Tensor:
        """Return rows of a table, (n, D) float32."""
        if self.portable:
            return F.embedding(places, packed)
        # Bags of one id: FBGEMM's kernels copy or unpack a row faster than the compiled loop of an index.
        return pooled(packed, kind, places, torch.arange(places.shape[0] + 1))

    def _encode(
        self, vectors: dict[str, Tensor], lists: list[Tensor], of_rows: dict[int, Tensor], sharing: list[Tensor]
    ) -> Tensor:
        """Return the encoders' fields (B, sum of D)."""
        assert self.histories is not None
        layout, histories = self.layout, self.histories
        places = {layout.names[at]: 2 * number for number, at in enumerate(layout.lists)}
        ids = {name: lists[at] for name, at in places.items()}
        lengths = {name: lists[at + 1].diff() for name, at in places.items()}
        firsts = [layout.names.index(history.columns[0].name) for history in histories.histories]
        events = sharing[len(layout.lists) :]
        shared = [Shared(of_rows[first], own) for first, own in zip(firsts, events, strict=True)]
        return histories.encode(vectors, ids, lengths, shared)


class ScoringLayer(nn.Module):
    """Applies a static filter ``indices`` (V, N) and one dense layer a view, by the operator for scoring."""

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
    """Return a copy whose layers have their form for scoring, where there is one."""
    copied = copy.deepcopy(over_arch)
    if isinstance(copied, SSR):
        for place, layer in enumerate(copied.blocks()):
            chosen, fusion = layer.filter, layer.fusion
            # Those of a domain have no such form, and a layer of them stays as it was trained.
            if isinstance(chosen, StaticRandomFilter) and fusion.dense2 is None and layer.per_domain is None:
                copied.layers[place] = ScoringLayer(chosen.indices, fusion, bf16, place == len(copied.layers) - 1)
    return copied


def _runs(features: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop within ``features`` of those that follow one another in the schema."""
    starts = [at for at, i in enumerate(features) if at == 0 or features[at - 1] != i - 1]
    return list(zip(starts, [*starts[1:], len(features)], strict=True))
