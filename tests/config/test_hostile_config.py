"""Configs that would hang, exhaust memory or run something; what is merely wrong is in test_config.py."""

import os
from pathlib import Path

import pytest

from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.config.heads import HeadsConfig
from ssr_rec.config.run import RunConfig, load_config, resolve
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.tables import build_tables
from ssr_rec.model.build import build_dense
from tests.jobs import refused_job
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--seed=4294967296"], "seed: Input should be less than 4294967296"),
        (["--data.num_lanes=65537"], "data.num_lanes: Input should be less than or equal to 65536"),
        (["--over_arch.num_views=65537"], "over_arch.num_views=65537 is more than 65536"),
        (["--heads.hidden=[8, 65537]"], "heads.hidden.1=65537 is more than 65536"),
        (["--embeddings.dims={user: 70000}"], "embeddings.dims.user=70000 is more than 65536"),
        (["--sharding.memory_gib=1e300"], "sharding.memory_gib"),
        (["--train.batch_size=1" + "0" * 30], "beyond 64 bits"),
        (["--" + "a." * 20 + "b=1"], "is not understood"),
        (["--train..epochs=1"], "is not understood"),
        (["--train.epochs=&a [*a]"], "aliases are not read"),
        (["--train={epochs: 1, epochs: 2}"], "key 'epochs' is given twice"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(ValueError) as refusal:
        load_config(None, overrides)
    assert message in str(refusal.value) and len(str(refusal.value)) < 400


def test_seeds_and_sizes_that_are_taken():
    config = load_config(None, ["--seed=4294967295", "--over_arch.index_seed=100000", "--heads.hidden=[65536]"])
    assert (config.seed, config.over_arch.index_seed, config.heads.hidden) == (2**32 - 1, 100_000, [65_536])


def test_a_pipe_for_a_config_file(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"run.yaml: not a regular file; name a config file"):
        load_config(tmp_path / "run.yaml")


def test_nothing_is_executed(tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "run.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {made}']")
    with pytest.raises(ValueError, match=r"run.yaml: not YAML of plain values: tags as"):
        load_config(path)
    assert not made.exists()


def test_a_table_larger_than_memory_is_refused_before_it_is_made(dataset, tmp_path):
    assert "no sharding plan" in run_ranks(refused_largest_job, 1, str(dataset), str(tmp_path))[0]


def refused_largest_job(dataset: str, folder: str) -> str:
    schema = Schema.read(dataset)
    first = schema.features[0].model_copy(update={"num_embeddings": 2**40})
    os.makedirs(f"{folder}/data")
    for split in schema.splits:
        os.symlink(f"{dataset}/{split}", f"{folder}/data/{split}")
    schema.model_copy(update={"features": [first, *schema.features[1:]]}).write(Path(folder, "data"))
    options = ["--train.batch_size=64", "--over_arch.view_dim=8", "--device=cpu"]
    return refused_job([f"--data.path={folder}/data", f"--runs={folder}", *options])


@pytest.mark.parametrize("name", ["items", "user.id", "type", ""])
def test_names_that_no_table_can_have(name):
    feature = Feature(name=name, kind="categorical", num_embeddings=4, encoding=Drawn(column=name))
    schema = Schema(name="tiny", dataset_id="x", features=[feature], labels=["click"], splits={})
    with pytest.raises(ValueError, match=rf"feature '{name}' of 'tiny': PyTorch takes no table of that name"):
        build_tables(schema, EmbeddingsConfig(), "cpu")
    with pytest.raises(ValueError, match=rf"feature '{name}' of 'tiny': PyTorch takes no table of that name"):
        build_dense(RunConfig(domain=name, heads=HeadsConfig(per_domain=True)), schema)


def test_an_endless_name_is_not_repeated_whole() -> None:
    with pytest.raises(ValueError, match="over_arch: Input tag") as error:
        resolve({"over_arch": {"name": "x" * 5_000}}, "run.yaml")
    assert len(str(error.value)) < 1_000
