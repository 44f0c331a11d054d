"""Counts bytes and operations of the parts of a step; every formula is in docs/planner.md."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.planner.types import CollectiveType, GeneralizedCommsBandwidth

from ssr_rec.embeddings.histories import History
from ssr_rec.embeddings.tables import ExtraTables, Tables
from ssr_rec.model.build import build_dense
from ssr_rec.model.ctr_model import DenseArch, logits_of
from ssr_rec.model.history_fields import HistoryFields
from ssr_rec.planning.cases import Case
from ssr_rec.planning.hardware import Hardware, Precision
from ssr_rec.sequences.base import SequenceEncoder

ID_BYTES = 8
FLOAT_BYTES = 4
BATCHES_IN_FLIGHT = 3
"""Of ``TrainPipelineSparseDist``: one in work, one whose ids are on their way, one being copied to the device."""
DENSE_BYTES = {"weights": 4, "gradients": 4, "adam": 8}
"""Per dense parameter; DDP's buckets are the gradients themselves (gradient_as_bucket_view)."""
ADAM_TRAFFIC = 28
"""Bytes a step of Adam moves per parameter: it reads weight, gradient and two moments and writes three of them."""
ACTIVATION_PASSES = 4
"""Times a saved activation moves: written and read forward, read and its gradient written backward."""
FORWARD_BACKWARD = 3
"""The backward pass of a matrix product is two of them."""
PROBE_ROWS = (64, 128)


@dataclass(frozen=True)
class DenseCost:
    """Says what the encoders of sequences, the bottom MLP of numbers, the over-arch and heads cost.

    Attributes:
        parameters: trainable.
        buffer_bytes: indices and statistics.
        matmul_flops: of one forward pass for one row.
        activation_bytes: kept for the backward pass, per row.
        fixed_bytes: kept whatever the rows.
        operators: that the host launches in a step, the optimizer's among them where it has one for each parameter.
    """

    parameters: int
    buffer_bytes: int
    matmul_flops: int
    activation_bytes: float
    fixed_bytes: float
    operators: int


def extra_tables(case: Case) -> ExtraTables:
    """Return further tables that the over-arch wants for itself."""
    with FakeTensorMode():  # takes no memory whatever its size
        return build_dense(case.config, case.schema).over_arch.extra_tables


def dense_cost(case: Case) -> DenseCost:
    """Count the real over-arch: its parameters and FLOPs, and what autograd keeps of a forward pass."""
    encoders = [_encoder_cost(case, *pair) for pair in HistoryFields(case.reading, case.config.embeddings).pairs()]
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        dense = build_dense(case.config, case.schema)
        with Operators() as forward:
            few = _kept_bytes(dense, PROBE_ROWS[0], case.config.train.bf16)
        many = _kept_bytes(dense, PROBE_ROWS[1], case.config.train.bf16)
        few, many = (kept + sum(cost.kept[at] for cost in encoders) for at, kept in enumerate((few, many)))
        made = [part for part in (dense.numbers, dense.row_vectors, dense.vectors) if part is not None]
        per_row = (many - few) / (PROBE_ROWS[1] - PROBE_ROWS[0])
        return DenseCost(
            parameters=sum(p.numel() for p in dense.parameters() if p.requires_grad),
            buffer_bytes=sum(b.nbytes for b in dense.buffers()),
            matmul_flops=dense.over_arch.flops().matmul
            + dense.heads.matmul_flops()
            + sum(cost.matmul_flops for cost in encoders)
            + sum(part.matmul_flops() for part in made),
            activation_bytes=per_row,
            fixed_bytes=max(0.0, few - per_row * PROBE_ROWS[0]),
            operators=FORWARD_BACKWARD * (forward.operators + sum(cost.operators for cost in encoders)),
        )


def _kept_bytes(dense: DenseArch, rows: int, bf16: bool) -> int:
    over_arch = dense.over_arch
    widths = [over_arch.in_features, *(sum(dims) for dims in over_arch.extra_tables.values())]
    inputs = [torch.empty(rows, width, requires_grad=True) for width in widths]
    kept = Kept([*dense.parameters(), *dense.buffers()])
    for part in (dense.numbers, dense.row_vectors):
        if part is not None:
            with kept:
                part(torch.zeros(rows, dense.dense_width))
    if dense.vectors is not None:
        with kept:
            tables = [torch.zeros(1, size) for size in dense.vectors.sizes]
            dense.vectors([torch.zeros(rows, dtype=torch.int64)] * len(tables), tables)
    with kept:
        domain = None if dense.domain is None else torch.zeros(rows, dtype=torch.int64)
        logits_of(inputs, over_arch, dense.heads, bf16, domain)
    return kept.bytes


class Operators(TorchDispatchMode):
    """Counts, while it is entered, the operators that do work: no views, and no memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name.startswith("prim::") or "empty" in name or name == "aten::detach"):
            self.operators += 1
        return func(*args, **(kwargs or {}))


class _EncoderCost(NamedTuple):
    """Says what an encoder costs: products of one row, bytes kept of each of ``PROBE_ROWS``, operators forward."""

    matmul_flops: int
    kept: list[int]
    operators: int


def _encoder_cost(case: Case, history: History, encoder: SequenceEncoder) -> _EncoderCost:
    """Count an encoder on rows that all have the mean number of events; what it does depends on their lengths."""
    length = max(1, round(case.lengths.get(history.columns[0].name, 1.0)))
    kept_bytes = []
    for rows in PROBE_ROWS:
        events = torch.zeros(rows * length, encoder.event_dim, requires_grad=True)
        target = torch.zeros(rows, encoder.target_dim, requires_grad=True) if history.targets else None
        ages = torch.zeros(rows * length) if history.age is not None else None
        kept, forward = Kept([*encoder.parameters(), *encoder.buffers()]), Operators()
        with kept, forward:
            encoder(events, torch.full((rows,), length), target, ages)
        kept_bytes.append(kept.bytes)
    return _EncoderCost(encoder.flops(length).matmul, kept_bytes, forward.operators)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Adds up, while it is entered, the bytes that autograd keeps, those of ``own`` tensors apart."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.sizes[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.sizes.values())


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Return the fused optimizer's state of a shard; always fp32, and a row-wise one per shard of columns."""
    adam = 2 * rows * columns
    floats = {"sgd": 0, "rowwise_adagrad": rows, "adagrad": rows * columns, "lazy_adam": adam, "adam": adam}
    return floats[optimizer] * FLOAT_BYTES


@dataclass(frozen=True)
class ShardBytes:
    """Says what a shard of a table takes on its rank.

    Attributes:
        weights, state: in the device's memory (for a cached table its cache and the cache's bookkeeping).
        gradients: of the whole shard; only replicated tables have them.
        host: weights and state in host memory, for the kernels that keep them there.
        buffers: ids on their way in, pooled rows on their way out and their gradients on the way back.
    """

    weights: int
    state: int
    gradients: int
    host: int
    buffers: int


def shard_bytes(
    size: Sequence[int],
    element_bytes: int,
    optimizer: str,
    kernel: str,
    load_factor: float,
    id_bytes: float,
    pooled_rows: float,
) -> ShardBytes:
    """Count the bytes of one shard.

    Args:
        size: rows and columns of the shard.
        load_factor: share of the rows that a cached table's cache holds.
        id_bytes: of what the rank is sent to look up in it, of all batches in flight.
        pooled_rows: that the rank makes of it for one global batch, before they are sent or summed.
    """
    rows, columns = size
    weights, state = rows * columns * element_bytes, state_bytes(optimizer, rows, columns)
    buffers = int(id_bytes + 2 * pooled_rows * columns * FLOAT_BYTES)
    if kernel == "dense":
        return ShardBytes(weights, state, weights, 0, buffers)
    if kernel == "fused":
        return ShardBytes(weights, state, 0, 0, buffers)
    # FBGEMM keeps the state of such tables beside the whole weights, in host memory.
    cache = 0
    if kernel == "fused_uvm_caching":
        # A slot of the cache has an id and a time (8 bytes each), a row of the table its place in the map (4).
        cache = int(load_factor * weights + rows * (4 + 16 * load_factor))
    return ShardBytes(cache, 0, 0, weights + state, buffers)


class Links(GeneralizedCommsBandwidth):
    """Gives the bytes a millisecond that one rank moves in a collective, from the links' peaks and their utilisation.

    All-to-all: of a rank's bytes, (W-L)/W cross the network, at the rank's share of its host's, and (L-1)/W the links
    within the host; the slower of the two decides. Reduce-scatter, all-gather and all-reduce: NCCL's rings use every
    network card of a host, so the bus bandwidth is the host's network or the link, whichever is less
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """

    def __init__(self, hardware: Hardware, per_node: int) -> None:
        used = hardware.assumptions.link_utilisation
        self.link = hardware.link_gb_s * 1e6 * used
        self.host = hardware.network_gbit_s / 8 * 1e6 * used
        self.card = self.host / per_node

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:
        ranks, local = world_size, min(local_world_size, world_size)
        if ranks == 1:
            return self.link * 1e6  # a rank's own memory: no collective at all
        if collective_type == CollectiveType.ALL_TO_ALL:
            return 1 / max((ranks - local) / ranks / self.card, (local - 1) / ranks / self.link)
        bus = self.link if local == ranks else min(self.link, self.host)
        return bus * ranks / (ranks - 1) / (2 if collective_type == CollectiveType.ALL_REDUCE else 1)

    @property
    def intra_host_bw(self) -> float:
        return self.link

    @property
    def inter_host_bw(self) -> float:
        return self.card


def gemm_precision(case: Case) -> Precision:
    """Return the precision of the over-arch's products."""
    if case.config.train.bf16:
        return "bf16"
    return "tf32" if case.config.train.tf32 else "fp32"


class Model(nn.Module):
    """Shows TorchRec's planner the tables, under the name that the training job's model has for them."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.tables, self.event_tables, self.weighted_tables = tables
