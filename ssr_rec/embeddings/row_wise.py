"""Spreads the rows of un-pooled tables over CPU ranks, which TorchRec does for ``EmbeddingBagCollection`` on GPUs only.

TorchRec sums the bags of all ranks by a reduce-scatter that takes unequal parts with NCCL alone. A bag of one id has
its row on one rank, so here only the vectors that a rank holds are sent, by an all-to-all, and added up where they
arrive: exact for bags of one id, and right for any other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist, EmbeddingShardingContext, EmbeddingShardingInfo
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    NoWait,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.embeddings.tables import EventTables


class EventTablesSharder(EmbeddingBagCollectionSharder):
    """Shards ``EventTables``: as TorchRec does, and row-wise on a CPU too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return types if ShardingType.ROW_WISE.value in types else [*types, ShardingType.ROW_WISE.value]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        return ShardedEventTables(
            module,
            params,
            env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        return EventTables

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        return ShardedEventTables


class ShardedEventTables(ShardedEmbeddingBagCollection):
    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> Any:
        by_rows = sharding_infos[0].param_sharding.sharding_type == ShardingType.ROW_WISE.value
        if by_rows and device is not None and device.type == "cpu":
            return _RowWise(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)
        return super().create_embedding_bag_sharding(
            sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
        )


class _RowWise(RwPooledEmbeddingSharding):
    """Does what its base does, with another way back to the ranks that asked."""

    def create_lookup(self, device: torch.device | None = None, *_: Any, **__: Any) -> GroupedPooledEmbeddingsLookup:
        self.lookup = _Lookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device if device is not None else self._device,
            sharding_type=ShardingType.ROW_WISE,
            env=self._env,
        )
        return self.lookup

    def create_output_dist(self, device: torch.device | None = None) -> _ToAskers:
        codecs = (self.qcomm_codecs_registry or {}).get(CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name)
        return _ToAskers(self._pg, self.lookup, self.embedding_dims(), codecs)


class _Lookup(GroupedPooledEmbeddingsLookup):
    """Remembers which bags of the batch at hand have ids on this rank."""

    held: Tensor
    """(bags of all ranks, tables) bool, the ranks one after another."""

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        self.held = (sparse_features.lengths().view(len(sparse_features.keys()), -1) > 0).t()
        return super().forward(sparse_features)


class _ToAskers(BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]):
    """Sends each rank the vectors of its bags: (bags of all ranks, sum of D) to (own bags, sum of D)."""

    def __init__(
        self, group: dist.ProcessGroup, lookup: _Lookup, dims: list[int], codecs: QuantizedCommCodecs | None
    ) -> None:
        super().__init__()
        self.group, self.codecs = group, codecs
        # In a list, so that the lookup's tables do not become this module's too.
        self.lookups = [lookup]
        # Vectors are moved in pieces of one width, as wide as the dims allow.
        self.width = math.gcd(*dims)
        self.pieces = torch.tensor([dim // self.width for dim in dims])

    def forward(self, local_embs: Tensor, sharding_ctx: EmbeddingShardingContext | None = None) -> Awaitable[Tensor]:
        if self.group.size() == 1:
            return NoWait(local_embs)
        assert sharding_ctx is not None
        return NoWait(_Exchange.apply(local_embs, self, self.lookups[0].held, sharding_ctx.batch_size_per_rank))


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, way: _ToAskers, held: Tensor, bags: list[int]) -> Tensor:
        """Return the sums (own bags, sum of D) over ranks of what they hold of each.

        Args:
            local: (bags of all ranks, sum of D), of this rank's rows.
            held: (bags of all ranks, tables) bool, where ``local`` is of any row.
            bags: of each rank.
        """
        ranks, own = len(bags), bags[way.group.rank()]
        held = held.contiguous()
        tables = held.shape[1]
        wanted = held.new_empty(ranks * own, tables)
        dist.all_to_all_single(wanted, held, [own] * ranks, bags, group=way.group)
        sent, ctx.send = _places(held, way.pieces, bags)
        taken, ctx.receive = _places(wanted, way.pieces, [own] * ranks)
        per_rank = own * int(way.pieces.sum())
        ctx.way, ctx.sent, ctx.taken, ctx.shape = way, sent, taken % max(per_rank, 1), local.shape
        vectors = _exchange(local.reshape(-1, way.width)[sent], ctx.receive, ctx.send, way, "forward")
        out = local.new_zeros(per_rank, way.width).index_add_(0, ctx.taken, vectors)
        return out.view(own, local.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        way = ctx.way
        vectors = _exchange(gradient.reshape(-1, way.width)[ctx.taken], ctx.send, ctx.receive, way, "backward")
        local = gradient.new_zeros(ctx.shape)
        local.view(-1, way.width)[ctx.sent] = vectors
        if get_gradient_division():
            local /= way.group.size()
        return local, None, None, None


def _places(held: Tensor, pieces: Tensor, bags: list[int]) -> tuple[Tensor, list[int]]:
    """Return the places of the pieces that ``held`` says are there, and how many of them each rank's bags have."""
    wide = held.repeat_interleave(pieces, dim=1)
    return wide.flatten().nonzero().squeeze(1), [int(part.sum()) for part in wide.split(bags)]


def _exchange(vectors: Tensor, receive: list[int], send: list[int], way: _ToAskers, direction: str) -> Tensor:
    codec = getattr(way.codecs, direction, None)
    if codec is not None:
        vectors = codec.encode(vectors)
    received = vectors.new_empty(sum(receive), way.width)
    dist.all_to_all_single(received, vectors, receive, send, group=way.group)
    return codec.decode(received) if codec is not None else received
