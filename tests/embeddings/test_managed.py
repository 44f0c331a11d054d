"""Tables whose ids come and go: who has a row, what a new one begins with, and that a run is the same run anywhere."""

import hashlib
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.config.embeddings import EmbeddingsConfig, ManagedTable
from ssr_rec.config.run import load_config
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.data.table_usage import table_use
from ssr_rec.embeddings.evicting_tables import IdTable, check_managed
from ssr_rec.metrics.exact import evaluate_predictions
from ssr_rec.planning.cases import Case
from ssr_rec.runs.table_usage import use_table
from ssr_rec.serving.export import export_restored
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.trained_model import restore_model
from tests.checkpointing.test_resume import STOP_AT, losses, options, rows
from tests.jobs import built_model, refused_job, stopped_job, train_job
from tests.prepare_log import make_rows, read_split, spec_with, write_parquet
from tests.ranks import run_ranks
from tests.serving.test_restore import scored

SMALL = {
    policy: [
        f"--embeddings.managed={{user: {{rows: 12, eviction: {policy}, interval: 3}}, "
        f"tags: {{rows: 6, eviction: {policy}, interval: 5, admit: 2}}}}"
    ]
    for policy in ("lfu", "lru", "distance_lfu")
}
CPU = torch.device("cpu")


def table(ids_per_step: int = 1000, **settings) -> IdTable:
    return IdTable(ManagedTable(**settings), ids_per_step, CPU)


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
def test_ids_that_fit_have_rows_of_their_own_for_good(eviction):
    ids, seen = table(rows=101, eviction=eviction, interval=1), {}
    draw = np.random.default_rng(3)
    raw = draw.integers(1, 2**60, 100)
    for _ in range(30):
        batch = torch.tensor(draw.choice(raw, 40))
        ids.count(batch)
        for value, row in zip(batch.tolist(), ids.rows_of(batch).tolist(), strict=True):
            assert 0 <= row < 100 and seen.setdefault(value, row) == row
    assert len(set(seen.values())) == len(seen) > 90
    assert ids.rows_of(torch.tensor([5, 2**60])).tolist() == [100, 100]


def test_the_most_frequent_ids_have_the_rows():
    ids, counts = table(rows=21, interval=4), Counter()
    draw = np.random.default_rng(1)
    shares = 1 / np.arange(1, 201) ** 1.5
    for _ in range(400):
        batch = draw.choice(200, 64, p=shares / shares.sum())
        ids.count(torch.tensor(batch))
        counts.update(batch.tolist())
    rows_now = ids.rows_of(torch.arange(200))
    held = {value for value in range(200) if rows_now[value] < 20}
    assert len(held) == 20 == len({int(rows_now[value]) for value in held})
    assert {value for value, _ in counts.most_common(12)} <= held


def test_lru_keeps_the_last_and_admission_waits_for_more():
    ids = table(rows=4, eviction="lru", interval=1)
    for start in range(0, 30, 3):
        ids.count(torch.arange(start, start + 3))
    assert ids.rows_of(torch.arange(27, 30)).sort().values.tolist() == [0, 1, 2]
    ids = table(rows=9, interval=2, admit=3)
    assert ids.count(torch.tensor([7, 7, 8])) is None  # only every other step
    changed = ids.count(torch.tensor([7, 8, 9]))
    assert changed.tolist() == [int(ids.rows_of(torch.tensor([7])))]
    assert ids.rows_of(torch.tensor([8, 9])).tolist() == [8, 8]


@pytest.mark.slow
def test_with_room_for_all_it_is_the_plain_table(dataset, tmp_path):
    """From rows that begin at almost nothing, so that it does not matter which is whose.

    By sgd: two samples of one id and opposite labels have gradients at the first step that cancel, and Adagrad would
    divide what rounding leaves by its own size.
    """
    zero = ["--embeddings.init_scale=1e-20", "--train.epochs=1", "--embeddings.optimizer=sgd"]
    zero += ["--embeddings.learning_rate=5"]
    found = {}
    for name, room in (("plain", 0), ("managed", 60), ("shared", 2)):
        more = [f"--embeddings.managed={{user: {{rows: {room}, interval: 1}}, history: {{rows: 40, interval: 1}}}}"]
        run_ranks(train_job, 1, options(dataset, tmp_path / name, *zero, *(more if room else [])))
        found[name] = losses(tmp_path / name)
    np.testing.assert_allclose(found["managed"], found["plain"], rtol=1e-5)
    assert np.abs(found["shared"] / found["plain"] - 1).max() > 1e-3, "it must matter who has a row"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "optimizer"), [("lru", "adagrad"), ("lfu", "lazy_adam"), ("distance_lfu", "adagrad")]
)
def test_a_run_is_the_same_on_two_ranks_and_after_a_stop(dataset, tmp_path, policy, optimizer):
    more = [*SMALL[policy], f"--embeddings.optimizer={optimizer}"]
    whole = run_ranks(train_job, 1, options(dataset, tmp_path / "one", *more))[0]
    two = options(dataset, tmp_path / "two", *more)
    assert run_ranks(stopped_job, 2, two, STOP_AT) == ["preempted"] * 2
    run_ranks(train_job, 2, two)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    stopped = options(dataset, tmp_path / "stopped", *more)
    assert run_ranks(stopped_job, 1, stopped, STOP_AT) == ["preempted"]
    report = run_ranks(train_job, 1, stopped)[0]
    assert [row["loss"] for row in rows(tmp_path / "stopped")] == [row["loss"] for row in rows(tmp_path / "one")]
    assert report["test"] == whole["test"]
    states = [restore_model(tmp_path / name / "run").model.state_dict() for name in ("one", "two", "stopped")]
    maps = [name for name in states[0] if ".ids." in name]
    assert len(maps) >= 8
    for name in maps:
        assert states[0][name].equal(states[1][name]) and states[0][name].equal(states[2][name]), name
    # Without the managed ids the run is another.
    other = run_ranks(train_job, 1, options(dataset, tmp_path / "other", more[-1]))[0]
    assert other["test"] != whole["test"]


def test_evaluation_admits_nothing_and_the_restored_model_is_the_one_reported(dataset, tmp_path):
    report = run_ranks(train_job, 2, options(dataset, tmp_path, *SMALL["lfu"], "--train.epochs=1"))[0]
    restored = restore_model(tmp_path / "run")
    before = {name: value.clone() for name, value in restored.model.state_dict().items()}
    logits, labels = scored(restored)
    assert all(value.equal(before[name]) for name, value in restored.model.state_dict().items())
    found = evaluate_predictions(logits.numpy(), labels.numpy(), None, restored.schema.labels)
    for task, measures in found.items():
        assert measures["auc"] == pytest.approx(report["test"][task]["auc"], abs=1e-6)
    with pytest.raises(
        ValueError, match=r"embeddings\.managed: the ids of user, tags have the rows that training gave"
    ):
        export_restored(restored, "run", tmp_path / "artifact")


def cleared_job(overrides: list[str], dataset: str) -> list[tuple]:
    """Per managed table shard of this rank: rows that differ after a step of training with new ids, and all's state."""
    model = built_model(overrides, dataset)
    schema, managed = Schema.read(dataset), model.module.model.managed
    ids = [[3, 9, 3] if name == "user" else [0] * 3 for name in schema.feature_names]
    sparse = KeyedJaggedTensor(
        keys=schema.feature_names,
        values=torch.tensor(list(chain(*ids))),
        lengths=torch.ones(len(ids) * 3, dtype=torch.int64),
    )
    for held in managed.held["user"]:
        held.weight.fill_(7.0)
        for state in held.states:
            state.fill_(5.0)
    model.eval()
    managed(sparse)
    untouched = all(bool((held.weight == 7).all()) for held in managed.held["user"])
    model.train()
    out = managed(sparse)
    taken = sorted(set(out["user"].values().tolist()))
    assert len(taken) == 2 and out["item"].values().equal(sparse["item"].values())
    found = []
    for held in managed.held["user"]:
        fresh = [row for row in range(len(held.weight)) if row + held.first_row in taken]
        kept = [row for row in range(len(held.weight)) if row not in fresh]
        values = held.weight[fresh]
        ok = bool((held.weight[kept] == 7).all()) and bool((values.abs() <= 0.05).all()) and values.unique().numel() > 4
        states = [bool((s[fresh] == 0).all()) and bool((s[kept] == 5).all()) for s in held.states]
        found.append((held.table, held.first_column, len(fresh), ok, states, values.tolist()))
    return [untouched, found]


@pytest.mark.parametrize(
    ("ranks", "more", "shards"),
    [
        (1, ["--embeddings.optimizer=lazy_adam"], 1),
        pytest.param(1, ["--over_arch={name: deepfm}"], 2, marks=pytest.mark.slow),
        pytest.param(
            2, ["--sharding={types: [column_wise], per_table: {user: {min_partition: 4}}}"], 2, marks=pytest.mark.slow
        ),
    ],
)
def test_a_row_that_changes_hands_begins_anew(dataset, ranks, more, shards):
    base = ["--embeddings.dim=8", "--embeddings.managed={user: {rows: 12, interval: 1}}"]
    arch = [] if "deepfm" in str(more) else ["--over_arch.num_views=2", "--over_arch.view_dim=8"]
    answers = run_ranks(cleared_job, ranks, [*base, *arch, *more], str(dataset))
    assert all(untouched for untouched, _ in answers)
    found = [held for _, held in answers for held in held]
    assert len(found) == shards
    assert all(held[2] == 2 and held[3] and all(held[4]) and held[4] for held in found)
    if ranks == 2:  # the columns of the whole draw, whoever holds them
        (whole,) = run_ranks(cleared_job, 1, [*base, *arch], str(dataset))[0][1]
        columns = sorted((first, values) for _, first, *_, values in found)
        assert np.concatenate([values for _, values in columns], 1).tolist() == whole[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embeddings.managed.nobody.rows=9"], "embeddings.managed names 'nobody', which is no feature of 'tiny'"),
        (
            ["--embeddings.managed.user.rows=9", "--embeddings.optimizer=adam"],
            "embeddings.managed: adam keeps every table on every rank",
        ),
        (["--embeddings.managed.user.rows=1"], "embeddings.managed.user.rows: Input should be greater than or equal"),
        (["--embeddings.managed={user: {rows: 9, policy: lfu}}"], "unknown key 'embeddings.managed.user.policy'"),
    ],
)
def test_what_cannot_be_managed_is_refused(dataset, tmp_path, more, message):
    assert message in refused_job(options(dataset, tmp_path, *more))


def test_a_plan_is_refused(dataset):
    config = load_config(None, ["--embeddings.managed.user.rows=100000"])
    with pytest.raises(ValueError, match=r"embeddings\.managed: the map of ids that every rank holds"):
        Case(config, Schema.read(dataset), {}, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_weights_of_other_rows_do_not_begin_a_run(dataset, tmp_path):
    short = ["--train.max_steps=6", "--train.eval_every=3"]
    run_ranks(train_job, 1, options(dataset, tmp_path / "a", *short, "--embeddings.managed.user.rows=12"))
    source = f"--warm_start={tmp_path / 'a' / 'run'}"
    for rows_now in ("--embeddings.managed.user.rows=13", "--embeddings.managed={}"):
        message = run_ranks(refused_job, 1, options(dataset, tmp_path / "b", *short, source, rows_now))[0]
        assert "the ids of feature 'user' have other rows, since embeddings.managed differs" in message
    same = options(
        dataset, tmp_path / "c", *short, source, "--embeddings.managed.user.rows=12", "--train.batch_size=32"
    )
    report = run_ranks(train_job, 1, same)[0]["warm_start"]
    assert "model.managed.ids.user._mch_sorted_raw_ids" in report["loaded"]
    assert report["other_size"] == ["model.managed.ids.user._history_accumulator"]


def test_raw_hashes_are_ids_without_end(tmp_path, capsys):
    log = write_parquet(make_rows(900), tmp_path / "log.parquet")
    spec = spec_with(raw_hash=["uid", "city"], hash_buckets={})
    data = tmp_path / "data"
    schema = prepare([str(log)], data, spec)

    def raw(value):
        return 0 if value is None else 1 + int(hashlib.md5(str(value).encode()).hexdigest()[:15], 16)

    by_raw = {raw(row["uid"]): row for row in make_rows(900)}
    assert len(by_raw) == 900 and not (data / "vocabularies" / "city.parquet").exists()
    found = [row for split in ("train", "validation", "test") for row in read_split(data, schema, split)]
    assert sorted(row["uid"] for row in found) == sorted(by_raw)
    assert all(row["city"] == raw(by_raw[row["uid"]]["city"]) for row in found)
    assert {row["city"] for row in found} >= {0, raw("Köln")}
    sources = [by_raw[row["uid"]] for row in read_split(data, schema, "test")]
    encoded = Encoder(schema, data).encode([{**row, "tags": row["tags"] or []} for row in sources])
    place = [f.name for f in schema.features if f.kind != "list"].index("city")
    assert encoded.ids[place].tolist() == [raw(row["city"]) for row in sources]
    batch = next(iter(Reader(data, schema, "train", 64).batches(0, 0)))
    assert int(batch.sparse["uid"].values().max()) > 2**58
    short = ["--train.max_steps=12", "--train.eval_every=6"]
    assert (
        "'city' of 'toy' holds raw hashes, for which no table is large enough; give it one by embeddings.managed"
        in (refused_job(options(data, tmp_path / "no", *short)))
    )
    managed = "--embeddings.managed={uid: {rows: 100, interval: 2}, city: {rows: 50, interval: 2}}"
    use = {use.name: use for use in table_use(data, schema)}["uid"]
    assert (use.table_rows, use.used, use.ids) == (None, None, schema.splits["train"].num_rows)
    assert f"| uid | raw_hash | - | {use.ids:,} | - |" in use_table([use])
    report = run_ranks(train_job, 1, options(data, tmp_path / "runs", *short, managed))[0]
    sizes = {f.name: f.num_embeddings for f in schema.features} | {"uid": 100, "city": 50}
    assert report["num_embedding_parameters"] == 8 * sum(sizes.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw_hash": ["tags"]}, "raw_hash: 'tags' is not categorical"),
        ({"raw_hash": ["uid"]}, "raw_hash: 'uid' is under hash_buckets, too"),
    ],
)
def test_columns_that_cannot_be_raw_hashes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec_with(**changes)


def test_no_id_is_left_out_of_the_count():
    """TorchRec leaves out, without a word, what its room for a first batch does not hold."""
    ids = table(ids_per_step=4, rows=5, interval=1)
    ids.count(torch.arange(4))
    with pytest.raises(AssertionError, match="no room to count"):
        ids.count(torch.arange(5))


def test_rows_that_are_cleared_are_in_the_devices_own_memory():
    config = EmbeddingsConfig(managed={"user": ManagedTable(rows=9)})
    check_managed(config, {"user": "fused", "item": "fused_uvm_caching"})
    with pytest.raises(ValueError, match="the plan puts table user@first_order under fused_uvm_caching"):
        check_managed(config, {"user@first_order": "fused_uvm_caching"})
