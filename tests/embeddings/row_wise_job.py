"""A job that shards tables row-wise on CPU ranks and steps once, for tests/embeddings/test_row_wise.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim import SGD
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.config.sharding import ShardingConfig
from ssr_rec.embeddings.sharding import build_sharders, build_topology, plan_sharding
from ssr_rec.embeddings.tables import EventTables
from ssr_rec.training.setup import start_process_group

ROWS = {"item": 11, "kind": 7}
DIMS = {"item": 8, "kind": 4}
BAGS = (5, 0, 3)
"""Of each rank."""
RATE = 0.5


def table(name: str) -> torch.Tensor:
    return torch.arange(ROWS[name] * DIMS[name], dtype=torch.float32).reshape(ROWS[name], DIMS[name]) / 7


def bags(rank: int, longest: int) -> list[list[list[int]]]:
    """Ids of each bag of each table on a rank."""
    generator = torch.Generator().manual_seed(rank)

    def ids(rows: int) -> list[int]:
        length = int(torch.randint(0, longest + 1, (1,), generator=generator))
        return torch.randint(0, rows, (length,), generator=generator).tolist()

    return [[ids(rows) for _ in range(BAGS[rank])] for rows in ROWS.values()]


def gradient(rank: int) -> torch.Tensor:
    """What each rank's output is multiplied with before it is summed."""
    return torch.randn(BAGS[rank], sum(DIMS.values()), generator=torch.Generator().manual_seed(100 + rank))


def row_wise_job(qcomms: dict[str, str], longest: int) -> dict[str, Any]:
    """What one forward and one backward pass with SGD give: own bags, and own rows of the tables afterwards."""
    device = start_process_group("cpu")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = ShardingConfig.model_validate({"types": ["row_wise"], "qcomms": qcomms})
    configs = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=ROWS[name], embedding_dim=DIMS[name])
        for name in ROWS
    ]
    tables = EventTables(device=torch.device("meta"), tables=configs)
    apply_optimizer_in_backward(SGD, tables.parameters(), {"lr": RATE})
    model = torch.nn.Sequential(tables)
    plan = plan_sharding(model, list(ROWS), config, build_topology(config, "cpu", ranks, ranks), True, 8)
    kinds = {name: sharding.sharding_type for name, sharding in plan.plan["0"].items()}
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=build_sharders(config, "cpu"))
    for key, value in sharded.state_dict().items():
        assert isinstance(value, ShardedTensor)
        for shard in value.local_shards():
            first = shard.metadata.shard_offsets[0]
            name = key.split(".")[-2]
            shard.tensor.copy_(table(name)[first : first + len(shard.tensor)])
    per_table = bags(rank, longest)
    lengths = [len(ids) for one in per_table for ids in one]
    values = [i for one in per_table for ids in one for i in ids]
    sparse = KeyedJaggedTensor(
        list(ROWS), torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    looked_up = sharded(sparse)
    parts = dict(zip(looked_up.keys(), looked_up.values().split(looked_up.length_per_key(), 1), strict=True))
    out = torch.cat([parts[name] for name in ROWS], 1)
    (out * gradient(rank)).sum().backward()
    after = {
        key.split(".")[-2]: [(s.metadata.shard_offsets[0], s.tensor.tolist()) for s in value.local_shards()]
        for key, value in sharded.state_dict().items()
    }
    return {"kinds": kinds, "out": out.tolist(), "after": after}
