"""CTRModel joins tables, over-arch and heads; TrainTask adds the loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.config.heads import HeadsConfig
from ssr_rec.data.features import Feature
from ssr_rec.data.value_columns import ids_of
from ssr_rec.embeddings.evicting_tables import ManagedIds
from ssr_rec.embeddings.histories import EventIds
from ssr_rec.embeddings.tables import ConcatFields, Tables
from ssr_rec.embeddings.weighted_ids import WeightedIds
from ssr_rec.model.dense_fields import DenseFields, RowVectorFields
from ssr_rec.model.domain_heads import DomainDeltas
from ssr_rec.model.history_fields import HistoryFields
from ssr_rec.model.vector_fields import VectorFields
from ssr_rec.over_archs.base import Domain, OverArch
from ssr_rec.over_archs.layers import Dropout, ViewLinear


class Heads(nn.Module):
    """Gives each task a tower and a linear head: features (B, H), shared, or (B, T, H), its own, to logits (B, T).

    With ``per_domain``, the weights of a row are the shared ones and the delta of the row's domain, whose parameters
    have the column in their names, so that a warm start can tell what their first dim stands for.
    """

    def __init__(
        self, out_features: int, num_tasks: int, config: HeadsConfig | None = None, domain: Domain | None = None
    ) -> None:
        super().__init__()
        config = config or HeadsConfig()
        widths = [out_features, *config.hidden]
        self.towers = nn.ModuleList(
            ViewLinear(num_tasks, fan_in, fan_out, "glorot") for fan_in, fan_out in pairwise(widths)
        )
        self.dropout = Dropout(config.dropout)
        self.weight = nn.Parameter(torch.empty(num_tasks, widths[-1]))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.xavier_uniform_(self.weight)
        self.per_domain: nn.ModuleDict | None = None
        if config.per_domain:
            assert domain is not None, "heads of each domain need one"
            self.per_domain = nn.ModuleDict({domain.name: DomainDeltas(domain, num_tasks, widths)})

    @property
    def deltas(self) -> DomainDeltas | None:
        """Return what each domain adds; None: nothing."""
        return None if self.per_domain is None else cast(DomainDeltas, next(iter(self.per_domain.values())))

    def forward(self, features: Tensor, domain: Tensor | None = None) -> Tensor:
        """Return the logits (B, T); ``domain``: the ids (B,) of the rows' domains, where these have deltas."""
        deltas, rows = self.deltas, None
        if deltas is not None:
            assert domain is not None, "heads of each domain need the rows' domains"
            rows = deltas.rows_of(domain)
        if self.towers:
            tasks = len(self.bias)
            by_task = features.expand(tasks, *features.shape) if features.dim() == 2 else features.transpose(0, 1)
            for layer, tower in enumerate(self.towers):
                z = tower(by_task)
                if deltas is not None and rows is not None:
                    z = z + deltas.of_tower(layer, by_task, rows)
                by_task = self.dropout(torch.relu(z))
            features = by_task.transpose(0, 1)
        if features.dim() == 2:
            logits = features @ self.weight.t() + self.bias
        else:
            logits = (features * self.weight).sum(dim=-1) + self.bias
        return logits if deltas is None or rows is None else logits + deltas.logits(features, rows)

    def matmul_flops(self) -> int:
        """Return the operations of its products in one forward pass of one row."""
        towers = sum(tower.flops().matmul for tower in self.towers if isinstance(tower, ViewLinear))
        deltas = self.deltas
        return towers + 2 * self.weight.numel() + (deltas.matmul_flops() if deltas is not None else 0)


class Given(NamedTuple):
    """Holds what makes fields of numbers that a row brings or that its values stand for, in the order of the fields."""

    numbers: DenseFields | None = None
    """Of dense columns."""
    row_vectors: RowVectorFields | None = None
    """Of vectors that rows bring."""
    vectors: VectorFields | None = None
    """Of given vectors."""


GIVEN_NOTHING = Given()


class DenseArch(nn.Module):
    """Runs all that is not a table: embeddings to the input vector, the over-arch, the heads.

    A module of its own because TorchRec's pipeline traces the parts that hold tables and leaves the others alone.

    Args:
        fields: the features that have a field of the input vector, in order.
        bf16: run the over-arch and heads in bfloat16 by autocast; parameters, tables and logits stay float32.
        histories: the fields that are read un-pooled; those of encoders come behind the others in the input vector.
        given: the fields of what is given, which come behind those.
        domain: the column whose id is a row's domain; None: nothing depends on one.
    """

    def __init__(
        self,
        fields: Sequence[Feature],
        over_arch: OverArch,
        heads: HeadsConfig | None = None,
        bf16: bool = False,
        histories: HistoryFields | None = None,
        given: Given = GIVEN_NOTHING,
        domain: Domain | None = None,
    ) -> None:
        super().__init__()
        self.concat = ConcatFields(fields, over_arch.extra_tables, histories.own if histories else ())
        self.histories = histories
        self.numbers, self.row_vectors, self.vectors = given
        self.dense_width = sum(part.num_columns for part in given[:2] if part is not None)
        made = [part for part in (histories, *given) if part is not None]
        self.field_names = [feature.name for feature in fields] + [name for part in made for name in part.names]
        self.extra_of_histories = nn.ModuleList()
        if made:
            added = [dim for part in made for dim in part.dims]
            # What a table of the extra set is to a feature's field, a linear map is to those that are made.
            for dims in over_arch.extra_tables.values():
                self.extra_of_histories.append(nn.Linear(sum(added), sum(dims[-len(added) :]), bias=False))
        self.over_arch = over_arch
        self.heads = Heads(over_arch.out_features, over_arch.num_tasks, heads, domain)
        self.bf16 = bf16
        self.domain = domain if over_arch.domain is not None or self.heads.deltas is not None else None
        self.reads_ids = (self.vectors is not None and bool(self.vectors.frozen)) or self.domain is not None

    def forward(
        self,
        embeddings: KeyedTensor,
        looked_up: KeyedTensor | None = None,
        sparse: KeyedJaggedTensor | None = None,
        dense: Tensor | None = None,
        weighted: KeyedTensor | None = None,
    ) -> Tensor:
        """Return (B, T) logits of pooled ``embeddings`` and, where the model has them, of what else it is given.

        Args:
            looked_up: un-pooled embeddings of sequences.
            sparse: the ids of sequences, of given vectors that are not trained, and of the domain.
            dense: (B, C) numbers.
            weighted: pooled embeddings of the tables that weighted lists read.
        """
        unpooled, made = None, []
        if self.histories is not None:
            unpooled, encoded = self.histories(looked_up, sparse)
            made.append(encoded)
        if self.numbers is not None:
            made.append(self.numbers(dense))
        if self.row_vectors is not None:
            made.append(self.row_vectors(dense))
        if self.vectors is not None:
            made.append(self.vectors.of_batch(embeddings, sparse))
        inputs = joined(self.concat(embeddings, unpooled, weighted), made, self.extra_of_histories)
        domain = ids_of(sparse, self.domain.name) if self.domain is not None and sparse is not None else None
        return logits_of(inputs, self.over_arch, self.heads, self.bf16, domain)


def logits_of(
    inputs: Sequence[Tensor], over_arch: OverArch, heads: Heads, bf16: bool, domain: Tensor | None = None
) -> Tensor:
    """Return logits (B, T) float32 of an over-arch's inputs, in bfloat16 by autocast where ``bf16`` says so.

    Args:
        domain: the ids (B,) of the rows' domains, where something depends on them.
    """
    of_domain = () if domain is None else (domain,)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16, enabled=bf16):
        features = over_arch(*inputs, *(of_domain if over_arch.domain is not None else ()))
        if isinstance(features, Tensor):
            return heads(features, *of_domain).float()
        features, logits = features
        return heads(features, *of_domain).float() + logits.float()


def joined(inputs: Sequence[Tensor], made: Sequence[Tensor], extra: nn.ModuleList) -> list[Tensor]:
    """Return the inputs of an over-arch with the fields ``made``, (B, sum of D) each, behind those of the features."""
    if not made:
        return list(inputs)
    encoded = torch.cat(list(made), 1) if len(made) > 1 else made[0]
    further = [torch.cat([x, linear(encoded)], 1) for x, linear in zip(inputs[1:], extra, strict=True)]
    return [torch.cat([inputs[0], encoded], 1), *further]


class CTRModel(nn.Module):
    """Maps the inputs of a ``Batch`` to logits: ``forward(sparse, dense or None, item_weights or None) -> (B, T)``.

    Args:
        managed: says which row an id has now, where tables are smaller than the range of ids.
        weighted_ids: makes what the weighted tables look up, where there are some.
    """

    def __init__(
        self,
        tables: Tables,
        dense: DenseArch,
        managed: ManagedIds | None = None,
        weighted_ids: WeightedIds | None = None,
    ) -> None:
        super().__init__()
        self.tables, self.event_tables, self.weighted_tables = tables
        self.weighted_ids = weighted_ids
        self.dense = dense
        self.managed = managed
        self.event_ids = EventIds(dense.histories.events) if dense.histories is not None else None

    def forward(
        self,
        sparse: KeyedJaggedTensor,
        dense: Tensor | None = None,
        item_weights: KeyedJaggedTensor | None = None,
    ) -> Tensor:
        if self.managed is not None:
            sparse = self.managed(sparse)
        weighted = None
        if self.weighted_tables is not None and self.weighted_ids is not None:
            weighted = self.weighted_tables(self.weighted_ids(sparse, item_weights))
        if self.event_ids is None or self.event_tables is None:
            ids = sparse if self.dense.reads_ids else None
            return self.dense(self.tables(sparse), None, ids, dense, weighted)
        return self.dense(self.tables(sparse), self.event_tables(self.event_ids(sparse)), sparse, dense, weighted)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> buffer of every batch norm's running mean and variance."""
    return {name: b for name, b in model.named_buffers() if name.endswith((".running_mean", ".running_var"))}


def average_running_statistics(model: nn.Module) -> None:
    """Make one model of the ranks' for evaluation: each has seen its own share of every batch. Collective.

    Training does not read these statistics, and the average of running averages is that of the averaged batches.
    """
    for buffer in running_statistics(model).values():
        dist.all_reduce(buffer)
        buffer /= dist.get_world_size()
