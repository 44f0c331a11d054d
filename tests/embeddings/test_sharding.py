"""What the settings let TorchRec's planner do, for CUDA topologies too: planning needs no GPU."""

import re

import pytest
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ssr_rec.config.run import load_config
from ssr_rec.config.sharding import ShardingConfig
from ssr_rec.embeddings.sharding import build_constraints, build_sharders, build_topology, plan_sharding

ROWS = {"small": 1_000, "wide": 200_000, "huge": 40_000_000}


def config(*overrides: str) -> ShardingConfig:
    return load_config(None, [f"--sharding.{override}" for override in overrides]).sharding


def plan(*overrides: str, device: str = "cuda", world_size: int = 4, prefetch: bool = False, fused: bool = True):
    """Table -> (sharding type, kernel, cache parameters, columns of its shards)."""
    settings = config(*overrides)
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=128)
        for name, rows in ROWS.items()
    ]
    model = torch.nn.Sequential(EmbeddingBagCollection(device=torch.device("meta"), tables=tables))
    topology = build_topology(settings, device, world_size, world_size)
    found = plan_sharding(model, list(ROWS), settings, topology, fused, 512, prefetch).plan["0"]
    return {
        name: (p.sharding_type, p.compute_kernel, p.cache_params, [s.shard_sizes[1] for s in p.sharding_spec.shards])
        for name, p in found.items()
    }


def test_without_settings_tables_stay_in_device_memory():
    for sharding_type, kernel, cache, _ in plan().values():
        assert sharding_type in ("table_wise", "column_wise", "row_wise", "table_row_wise")
        assert kernel == "fused" and cache is None


def test_each_table_gets_what_its_constraints_say():
    found = plan(
        "types=[table_wise]",
        "cache_load_factor=0.5",
        "per_table={wide: {types: [column_wise], min_partition: 32}, huge: {types: [row_wise], "
        "kernels: [fused_uvm_caching], cache_load_factor: 0.05}}",
    )
    assert found["small"][:2] == ("table_wise", "fused") and found["small"][2] is None
    assert found["wide"][:2] == ("column_wise", "fused") and found["wide"][3] == [32] * 4
    assert found["huge"][:2] == ("row_wise", "fused_uvm_caching")
    assert found["huge"][2].load_factor == 0.05 and found["huge"][2].prefetch_pipeline is None


def test_kernels_and_load_factor_of_all_tables():
    found = plan("kernels=[fused_uvm_caching]", "cache_load_factor=0.25", "per_table={small: {kernels: [fused]}}")
    assert found["small"][1] == "fused"
    assert {found[name][1] for name in ("wide", "huge")} == {"fused_uvm_caching"}
    assert {found[name][2].load_factor for name in ("wide", "huge")} == {0.25}
    assert {kernel for _, kernel, _, _ in plan("kernels=[fused_uvm]").values()} == {"fused_uvm"}


def test_tables_beyond_device_memory_go_to_the_host_when_they_may():
    with pytest.raises(ValueError, match="no sharding plan for 3 tables on 4 cuda ranks"):
        plan("memory_gib=4")
    found = plan("memory_gib=4", "kernels=[fused, fused_uvm_caching]", "cache_load_factor=0.1")
    assert found["huge"][1] == "fused_uvm_caching"


def test_prefetching_is_told_to_the_cache():
    found = plan("kernels=[fused_uvm_caching]", prefetch=True)
    assert {cache.prefetch_pipeline for _, _, cache, _ in found.values()} == {True}


def test_half_precision_communication_is_what_the_sharder_carries():
    assert not any(sharder.qcomm_codecs_registry for sharder in build_sharders(config(), "cpu"))
    for device, forward, backward in (("cpu", "fp16", "fp32"), ("cuda", "bf16", "fp16"), ("cuda", "fp32", "bf16")):
        sharders = build_sharders(config(f"qcomms={{forward: {forward}, backward: {backward}}}"), device)
        for codec in [codec for sharder in sharders for codec in sharder.qcomm_codecs_registry.values()]:
            names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
            assert codec.forward.quantized_dtype == names[forward], (device, forward)
            assert codec.backward.quantized_dtype == names[backward], (device, backward)


@pytest.mark.parametrize(
    ("device", "overrides", "message"),
    [
        (
            "cpu",
            ["kernels=[fused_uvm_caching]"],
            "sharding.kernels: 'fused_uvm_caching' is not supported on cpu; use fused",
        ),
        (
            "cpu",
            ["per_table={wide: {kernels: [fused_uvm]}}"],
            "sharding.per_table.wide.kernels: 'fused_uvm' is not supp",
        ),
        (
            "cpu",
            ["per_table={wide: {types: [row_wise]}}"],
            "sharding.per_table.wide.types: 'row_wise' is not supported",
        ),
        ("cuda", ["per_table={wied: {types: [row_wise]}}"], "names 'wied', which is no table of this model; wide is"),
        ("cuda", ["cache_load_factor=0.1"], "sharding.cache_load_factor=0.1 has no effect without fused_uvm_caching"),
        ("cuda", ["per_table={wide: {cache_load_factor: 0.1}}"], "per_table.wide.cache_load_factor has no effect"),
        ("cuda", ["per_table={wide: {types: [row_wise], min_partition: 32}}"], "wide.min_partition has no effect"),
        ("cpu", ["qcomms={forward: bf16}"], "sharding.qcomms.forward: bf16 is not supported by gloo on CPU; use fp16"),
        ("cpu", ["qcomms={backward: bf16}"], "sharding.qcomms.backward: bf16 is not supported by gloo on CPU"),
    ],
)
def test_what_has_no_effect_is_refused(device, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(*overrides, device=device)


@pytest.mark.parametrize("override", ["kernels=[fused_uvm]", "qcomms={forward: fp16}", "per_table={wide: {}}"])
def test_replicated_tables_take_no_settings(override):
    with pytest.raises(ValueError, match=rf"sharding.{override.split('=')[0]}=.* has no effect: adam keeps"):
        plan(override, device="cpu", fused=False)


def test_prefetching_needs_a_cache():
    with pytest.raises(ValueError, match=r"train\.pipeline: prefetch fetches the rows of fused_uvm_caching tables"):
        plan(prefetch=True)


def test_prefetching_needs_a_table_that_is_cached(monkeypatch):
    """Where the planner may cache tables and does not, which it decides anew in every process."""
    plain = EmbeddingShardingPlanner.plan

    def caches_none(self, model, sharders):
        constraints = build_constraints(list(ROWS), config(), "cuda", fused=True)
        topology = build_topology(config(), "cuda", 4, 4)
        return plain(EmbeddingShardingPlanner(topology=topology, constraints=constraints), model, sharders)

    monkeypatch.setattr(EmbeddingShardingPlanner, "plan", caches_none)
    with pytest.raises(ValueError, match=r"train\.pipeline: prefetch has nothing to fetch"):
        plan("kernels=[fused, fused_uvm_caching]", prefetch=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernels=[fuse]", "kernels.0"),
        ("cache_load_factor=1.5", "cache_load_factor"),
        ("per_table={wide: {min_partition: 6}}", "min_partition"),
        ("per_table={wide: {type: [row_wise]}}", "unknown key 'sharding.per_table.wide.type'; did you mean 'types'?"),
        ("qcomms={forward: int8}", "qcomms.forward"),
    ],
)
def test_values_no_setting_takes_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["per_table={user: {types: [row_wise]}}"],
            "per_table.user.types: 'row_wise' is not supported on cpu; ",
        ),
        (
            ["per_table={age: {types: [row_wise]}}"],
            "types: 'row_wise' .* few rows that a rank would have none; use",
        ),
        (["types=[table_row_wise]"], "sharding.types: 'table_row_wise' is not supported on cpu; use .*, row_wise"),
    ],
)
def test_row_wise_on_cpu_is_refused_where_it_cannot_be(overrides: list[str], message: str) -> None:
    spread = {"item": True, "age": False}
    with pytest.raises(ValueError, match=message) as refused:
        build_constraints(["user", "item", "age"], config(*overrides), "cpu", True, spread=spread)
    assert "\n" not in str(refused.value)


def test_row_wise_on_cpu_is_for_the_tables_that_can_be() -> None:
    def types(*overrides: str, **spread: bool) -> dict[str, list[str] | None]:
        found = build_constraints(["user", "item", "age"], config(*overrides), "cpu", True, spread=spread)
        return {name: constraint.sharding_types for name, constraint in found.items()}

    both = {"item": True, "age": False}
    rest = {name: ["table_wise", "column_wise"] for name in ("user", "age")}
    assert types("types=[row_wise]", **both) == {**rest, "item": ["row_wise"]}
    assert types("types=[column_wise, row_wise]", **both) == {
        "user": ["column_wise"],
        "item": ["column_wise", "row_wise"],
        "age": ["column_wise"],
    }
    assert types("per_table={item: {types: [row_wise]}}", **both) == {**rest, "item": ["row_wise"]}
    assert types(**both) == {**rest, "item": ["table_wise", "column_wise"]}
    with pytest.raises(ValueError, match=r"sharding.types: 'row_wise' is not supported on cpu; use table_wise, col"):
        types("types=[row_wise]", age=False)
