"""Makes the served model a graph of standard ONNX operators: named inputs to logits and predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ssr_rec.kernels.reference import ics_reference, view_fusion_reference
from ssr_rec.metrics.links import MOST, SIGMOID, Link, Links
from ssr_rec.serving.graph import ServingModel

MOST_ROWS_BITS = 31
"""A batch has fewer than 2 to this many rows."""


class OnnxModel(nn.Module):
    """Computes ``forward(singles [(B,), ..], lists, dense) -> logits (B, T), predictions (B, T)``.

    ``lists`` has ids (n_l,) and offsets (B+1,) of each list feature, then the weights (n_l,) of those that have some.

    Args:
        model: a portable one.
        weighted: list features that have weights, by their places in the schema.
        tables: float32, which become constants of the graph.
        labels: the tasks in the order of the logits.
        links: of tasks whose labels are numbers.
    """

    def __init__(
        self,
        model: ServingModel,
        tables: Sequence[Tensor],
        weighted: Sequence[int],
        labels: Sequence[str],
        links: Links,
    ) -> None:
        super().__init__()
        self.model, self.weighted = model, list(weighted)
        self.links = [links.get(label, SIGMOID) for label in labels]
        # With a dot in their names, which no feature has.
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(table) for table in tables)

    def forward(self, singles: list[Tensor], lists: list[Tensor], dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layout, histories = self.model.layout, self.model.histories
        rows = singles[0].shape[0] if singles else lists[1].shape[0] - 1
        ids = torch.stack(singles) if singles else lists[1].new_zeros(0, rows)
        sharing = [torch.arange(rows) for _ in layout.lists]
        for history in histories.histories if histories is not None else ():
            place = layout.lists.index(layout.names.index(history.columns[0].name))
            sharing.append(torch.arange(lists[2 * place].shape[0]))
        inputs = [*lists[: 2 * len(layout.lists)], *self._pooling_weights(lists)]
        tables = [cast(nn.Embedding, table).weight for table in self.tables]
        logits = self.model(ids, inputs, sharing, tables, dense)
        columns = [_predicted(one, link) for one, link in zip(logits.unbind(1), self.links, strict=True)]
        return logits, torch.stack(columns, dim=1)

    def _pooling_weights(self, lists: list[Tensor]) -> list[Tensor]:
        """Return what sums take as weights (n,), as ``ssr_rec.data.item_weights`` has it."""
        found, layout = [], self.model.layout
        for feature in layout.weighted:
            ids, offsets = lists[2 * layout.lists.index(feature) :][:2]
            if feature in self.weighted:
                weights = lists[2 * len(layout.lists) + self.weighted.index(feature)]
            else:
                weights = torch.ones_like(ids, dtype=torch.float32)
            if layout.pooling == "mean":
                bags = _bags_of(offsets, ids.shape[0])
                totals = weights.new_zeros(offsets.shape[0] - 1, dtype=torch.float64)
                of_items = totals.scatter_add(0, bags, weights.double())[bags]
                weights = torch.where(of_items > 0, weights.double() / of_items, 0.0).float()
            found.append(weights)
        return found


def _predicted(logits: Tensor, link: Link) -> Tensor:
    """Return ``link.predict`` of logits, float32; see there."""
    if link == SIGMOID:
        return logits.sigmoid()
    x = link.inner_scale * logits.double() + link.inner_shift
    if link.function == "sigmoid":
        x = x.sigmoid()
    elif link.function == "exp":
        x = x.clamp(max=MOST).exp()
    elif link.function == "softplus":
        # log(1 + exp(x)), which no x makes infinite.
        x = x.clamp(min=0) + (1 + (-x.abs()).exp()).log()
    x = link.scale * x + link.shift
    return (x if link.least is None else x.clamp(min=link.least)).float()


def trace(model: OnnxModel) -> ExportedProgram:
    """Return the graph for any number of rows and ids, in operators that ONNX has."""
    layout, served = model.model.layout, model.model
    batch, ids = 7, 12
    rows = Dim("rows", min=1)
    names = {feature: number for number, feature in enumerate(layout.lists)}
    for history in served.histories.histories if served.histories is not None else ():
        first, *others = (layout.names.index(column.name) for column in history.columns)
        names.update(dict.fromkeys(others, names[first]))  # the columns of a sequence have as many ids
    counts = {name: Dim(f"ids{name}", min=1) for name in names.values()}
    lists: list[Tensor] = []
    shapes: list[Any] = []
    for feature in layout.lists:
        offsets = torch.linspace(0, ids, batch + 1).long()
        lists += [torch.zeros(ids, dtype=torch.int64), offsets]
        shapes += [{0: counts[names[feature]]}, {0: rows + 1}]
    for feature in model.weighted:
        lists.append(torch.ones(ids))
        shapes.append({0: counts[names[feature]]})
    singles = [torch.zeros(batch, dtype=torch.int64) for _ in layout.singles]
    inputs: tuple[Any, ...] = (singles, lists)
    dynamic: tuple[Any, ...] = ([{0: rows} for _ in singles], shapes)
    if served.dense_width:
        inputs, dynamic = (*inputs, torch.zeros(batch, served.dense_width)), (*dynamic, {0: rows})
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=dynamic).run_decompositions(_standard())


def _standard() -> dict[Any, Callable[..., Any]]:
    """Return operator -> the same of operators that ONNX has."""
    ours, aten = torch.ops.ssr_rec, torch.ops.aten
    return {
        ours.view_fusion_forward.default: _view_fusion,
        ours.ics_forward.default: _ics,
        aten.embedding_bag.padding_idx: _embedding_bag,
        aten.searchsorted.Tensor: _searchsorted,
    }


def _view_fusion(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``view_fusion_forward`` does without ``save``, see ``ssr_rec.kernels``."""
    *before, save = arguments[:9]
    assert not save
    y = view_fusion_reference(*before, *arguments[9:])
    return y, y.new_empty(0), y.new_empty(0)


def _ics(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    y = ics_reference(z, alpha, gamma)
    return y, y.new_empty(0)


def _embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up the rows of each bag by a scatter."""
    _, mode, _, per_sample_weights, include_last_offset, padding_idx = options
    assert include_last_offset and padding_idx is None and mode in (0, 1)
    vectors = F.embedding(indices, weight)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(1)
    bags = _bags_of(offsets, indices.shape[0])
    sums = vectors.new_zeros(offsets.shape[0] - 1, weight.shape[1])
    sums = sums.scatter_add(0, bags.unsqueeze(1).expand_as(vectors), vectors)
    if mode == 1:
        sums = sums / offsets.diff().clamp(min=1).unsqueeze(1)
    return sums, offsets, offsets, offsets


def _bags_of(offsets: Tensor, count: int) -> Tensor:
    """Return the bag of each of ``count`` ids: as many as there are bags that end before it."""
    ends = offsets[1:]
    ended = ends.new_zeros(count + 1).scatter_add(0, ends, torch.ones_like(ends))
    return ended.cumsum(0)[:count]


def _searchsorted(
    ascending: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Search by halves: how many of ``ascending`` (B,) are up to each of ``values``."""
    assert right and sorter is None and ascending.dim() == 1 and not out_int32
    size = ascending.shape[0]
    found = torch.zeros_like(values)
    for bit in reversed(range(MOST_ROWS_BITS)):
        further = found + 2**bit
        fits = further <= size
        fits = fits & (ascending[torch.where(fits, further, 1) - 1] <= values)
        found = torch.where(fits, further, found)
    return found
