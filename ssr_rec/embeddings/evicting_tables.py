"""Lets the ids of fixed-size tables come and go with training: TorchRec's managed collision, equal on every rank.

TorchRec's ``MCHManagedCollisionModule`` decides which ids have a row; this file feeds it, keeps its state complete, and
clears the rows that change hands. Its sharded form is not used: it has no eviction on the CPU, splits the ids by rank,
so that a run would depend on the world size, and forgets what it has counted since its last eviction (docs/ids.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.embeddings import EmbeddingsConfig, ManagedTable
from ssr_rec.data.schema import Schema

POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}


class Held(NamedTuple):
    """Names what this rank holds of one table: a shard and the optimizer's state of its rows."""

    table: str
    weight: Tensor
    first_row: int
    first_column: int
    columns: int
    """Of the whole table."""
    states: list[Tensor]


class ManagedIds(nn.Module):
    """Maps ids of the managed features to rows of their tables: ``forward(sparse of B rows) -> sparse``; others stay.

    In training the ids of all ranks, in the order of the global batch, are counted, and every ``interval`` steps the
    most valuable ones get rows; evaluation only looks up. An id without a row has the table's last.

    Args:
        batch_size: rows of the global batch, for the room that counting takes.
        seed: of the values that a row begins with when it changes hands.
    """

    def __init__(
        self, schema: Schema, config: EmbeddingsConfig, batch_size: int, seed: int, device: torch.device
    ) -> None:
        super().__init__()
        self.names = [name for name in schema.feature_names if name in config.managed]
        lengths = {feature.name: feature.max_length or 1 for feature in schema.features}
        self.tables = {name: IdTable(config.managed[name], batch_size * lengths[name], device) for name in self.names}
        self.ids = nn.ModuleDict(self.tables)
        self.seed, self.scale = seed, config.init_scale
        self.held: dict[str, list[Held]] | None = None

    def bind(self, model: DistributedModelParallel) -> None:
        """Find this rank's shards of the managed tables and their optimizer's state, once ``model`` is sharded."""
        states = {
            name: [value for value in state.values() if isinstance(value, ShardedTensor)]
            for name, state in model.fused_optimizer.state_dict()["state"].items()
        }
        self.held = {name: [] for name in self.names}
        for key, value in model.state_dict().items():
            table = key.partition(".embedding_bags.")[2].removesuffix(".weight")
            feature = table.split("@")[0]
            if feature not in self.held or not isinstance(value, ShardedTensor):
                continue
            of_shards = [[shard.tensor for shard in state.local_shards()] for state in states.get(key, [])]
            for place, shard in enumerate(value.local_shards()):
                row, column = shard.metadata.shard_offsets
                found = [tensors[place] for tensors in of_shards]
                assert all(len(state) == len(shard.tensor) for state in found), f"{key}: state of other rows"
                self.held[feature].append(Held(table, shard.tensor, row, column, value.size(1), found))

    @torch.no_grad()
    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ends, keys = sparse.offset_per_key(), sparse.keys()
        spans = {name: slice(ends[keys.index(name)], ends[keys.index(name) + 1]) for name in self.names}
        values = sparse.values().clone()
        if self.training:
            for name, ids in zip(self.names, gathered([values[spans[name]] for name in self.names]), strict=True):
                if (rows := self.tables[name].count(ids)) is not None:
                    self._clear(name, rows)
        for name, span in spans.items():
            values[span] = self.tables[name].rows_of(values[span])
        return KeyedJaggedTensor(
            keys=keys, values=values, lengths=sparse.lengths(), stride=sparse.stride(), length_per_key=None
        )

    def _clear(self, name: str, rows: Tensor) -> None:
        """Rows that change hands begin anew: with values by seed, table and step alone, and no optimizer state."""
        assert self.held is not None, "training before bind()"
        step = self.tables[name].step
        for held in self.held[name]:
            digest = hashlib.sha256(f"{self.seed}/{held.table}/step {step}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            drawn = torch.empty(len(rows), held.columns).uniform_(-self.scale, self.scale, generator=generator)
            mine = (rows >= held.first_row) & (rows < held.first_row + len(held.weight))
            local = rows[mine] - held.first_row
            wanted = drawn.to(held.weight)[mine, held.first_column : held.first_column + held.weight.size(1)]
            held.weight[local] = wanted
            for state in held.states:
                state[local] = 0


class IdTable(MCHManagedCollisionModule):
    """Keeps all state of TorchRec's module for one table in buffers.

    TorchRec keeps the ids counted since the last eviction, and when that was, outside of them, and has room for 1.25
    times those of the first batch.
    """

    _current_iter: int
    _current_iter_tensor: Tensor
    _history_accumulator: Tensor

    def __init__(self, config: ManagedTable, ids_per_step: int, device: torch.device) -> None:
        admit = config.admit
        policy = POLICIES[config.eviction](
            threshold_filtering_func=(lambda counts: (counts >= admit, admit)) if admit > 1 else None
        )
        super().__init__(config.rows, device, policy, config.interval)
        self._input_history_buffer_size = ids_per_step * config.interval
        room = (self._input_history_buffer_size + 1,)
        # Its last entry is how many there are, so that both are in a checkpoint or neither is.
        self.register_buffer("_history_accumulator", torch.zeros(room, dtype=torch.int64, device=device))
        for name, _, is_history in policy.metadata_info:
            if is_history:
                self.register_buffer(f"_history_{name}", torch.zeros(room, dtype=torch.int64, device=device))
                self._history_metadata[name] = getattr(self, f"_history_{name}")

    @property
    def step(self) -> int:
        """Return batches counted so far."""
        return self._current_iter

    def count(self, ids: Tensor) -> Tensor | None:
        """Count the ids of a batch; the rows that change hands after it, if any do."""
        if self._current_iter == -1:  # new, or read from a checkpoint
            self._current_iter = int(self._current_iter_tensor.item())
            self._last_eviction_iter = self._current_iter - self._current_iter % self._eviction_interval
            self._current_history_buffer_offset = int(self._history_accumulator[-1].item())
        assert self._current_history_buffer_offset + len(ids) <= self._input_history_buffer_size, "no room to count"
        self.profile({"": _jagged(ids)})
        self._history_accumulator[-1] = self._current_history_buffer_offset
        return self.evict()

    def rows_of(self, ids: Tensor) -> Tensor:
        return self.remap({"": _jagged(ids)})[""].values()


def _jagged(values: Tensor) -> JaggedTensor:
    return JaggedTensor(values=values, lengths=torch.tensor([len(values)], device=values.device))


def gathered(parts: list[Tensor]) -> Iterator[Tensor]:
    """Yield each of some int64 vectors with those of the other ranks, in the order of the ranks. Collective."""
    ranks = dist.get_world_size()
    if ranks == 1:
        yield from parts
        return
    sizes = torch.tensor([len(part) for part in parts], device=parts[0].device)
    all_sizes = [torch.empty_like(sizes) for _ in range(ranks)]
    dist.all_gather(all_sizes, sizes)
    lengths = [sizes.tolist() for sizes in all_sizes]
    room = max(sum(found) for found in lengths)
    mine = torch.zeros(room, dtype=torch.int64, device=parts[0].device)
    mine[: sum(lengths[dist.get_rank()])] = torch.cat(parts)
    everything = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everything, mine)
    cut = [values[: sum(found)].split(found) for values, found in zip(everything, lengths, strict=True)]
    for place in range(len(parts)):
        yield torch.cat([pieces[place] for pieces in cut])


def managed_ids(
    schema: Schema, config: EmbeddingsConfig, batch_size: int, seed: int, device: torch.device
) -> ManagedIds | None:
    """Return None where no feature is managed."""
    return ManagedIds(schema, config, batch_size, seed, device) if config.managed else None


def check_managed(config: EmbeddingsConfig, kernels: Mapping[str, str]) -> None:
    """Refuse what managed tables cannot be trained with.

    Args:
        kernels: table -> where the plan puts it.

    Raises:
        UserError: naming the key and the fix.
    """
    if config.managed and not config.is_fused:
        raise UserError(
            "embeddings.managed: adam keeps every table on every rank, outside of its reach; choose "
            "embeddings.optimizer lazy_adam, rowwise_adagrad, adagrad or sgd"
        )
    for table, kernel in kernels.items():
        if table.split("@")[0] in config.managed and kernel != "fused":
            raise UserError(
                f"embeddings.managed: the plan puts table {table} under {kernel}, but rows that change hands are "
                "cleared in the device's own memory; give it kernels: [fused] in sharding.per_table"
            )
