"""Artifacts: what the compiled program scores, what is refused, and that nothing half-written stays."""

import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.reader import Reader
from ssr_rec.over_archs.registry import OVER_ARCHS
from ssr_rec.serving.artifact import read_manifest
from ssr_rec.serving.export import Compared, Form, export_run
from ssr_rec.serving.program import PREFIX
from ssr_rec.serving.scorer import MAX_ROWS, Scorer, load
from ssr_rec.serving.shared_lists import flat
from ssr_rec.serving.trained_model import restore_model
from ssr_rec.serving.user_once import encode_user_once
from tests.made_run import make_run
from tests.over_archs.test_contract import CASES
from tests.serving.test_restore import JOBS, train_run

pytestmark = pytest.mark.slow
SSR = ["--over_arch.num_views=2", "--over_arch.view_dim=8", "--embeddings.dims={user: 12, tags: 4}"]


@pytest.fixture(scope="session")
def made(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a small SSR-S with two lists and mixed dims, and its artifact."""
    folder = tmp_path_factory.mktemp("made")
    run = make_run(folder / "run", dataset, [*SSR, "--embeddings.dim=8"])
    export_run(run, folder / "artifact")
    return run, folder / "artifact"


def eager_logits(run: Path, rows: int) -> tuple[torch.Tensor, KeyedJaggedTensor]:
    restored = restore_model(run)
    batch = next(iter(Reader(restored.data, restored.schema, "test", batch_size=rows, num_lanes=1).epoch(0)))
    with torch.no_grad():
        return restored.model(batch.sparse), batch.sparse


def first_rows(sparse: KeyedJaggedTensor, rows: int) -> KeyedJaggedTensor:
    """The first rows of a batch, cut field by field."""
    values, lengths = [], []
    for name in sparse.keys():  # noqa: SIM118  a KeyedJaggedTensor is no mapping
        of_field = sparse[name]
        lengths.append(of_field.lengths()[:rows])
        values.append(of_field.values()[: int(lengths[-1].sum())])
    return KeyedJaggedTensor(sparse.keys(), torch.cat(values), lengths=torch.cat(lengths), stride=rows)


def test_any_number_of_rows_scores_as_the_eager_model(made):
    run, artifact = made
    scorer = load(artifact)
    logits, sparse = eager_logits(run, 200)
    assert scorer.labels == ["click", "like"] and logits.std() > 0.01
    for rows in (1, 2, 3, 17, 200):
        part = first_rows(sparse, rows)
        torch.testing.assert_close(scorer.score(part), logits[:rows], atol=1e-5, rtol=0)
        assert torch.equal(scorer.score(part.values(), part.lengths()), scorer.score(part))
    assert scorer.score(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0, 2)


def test_a_loaded_program_has_no_file_that_a_kill_could_leave(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scorer = load(made[1], runners=2)
    assert list(tmp_path.iterdir()) == []
    logits, sparse = eager_logits(made[0], 20)
    torch.testing.assert_close(scorer.score(sparse), logits, atol=1e-5, rtol=0)


def test_rows_whose_lists_are_all_empty(made):
    run, artifact = made
    empty = np.zeros((3, 4), dtype=np.int64), [(np.empty(0, np.int64), np.zeros(5, np.int64))] * 2
    lengths = torch.tensor([[1], [0], [1], [1], [0]]).repeat(1, 4).flatten()
    restored = restore_model(run)
    sparse = KeyedJaggedTensor(restored.schema.feature_names, torch.zeros(12, dtype=torch.int64), lengths=lengths)
    with torch.no_grad():
        wanted = restored.model(sparse)
    torch.testing.assert_close(load(artifact).score_arrays(*empty), wanted, atol=1e-5, rtol=0)


def test_a_user_beside_candidates_scores_as_the_flat_rows_to_the_bit(made):
    scorer = load(made[1])
    rng = np.random.default_rng(0)
    candidates = [{"item": int(i), "price": int(i) % 8} for i in rng.integers(0, 30, 50)]
    for history in ([3, 1, 2], []):
        user = {"user": 7, "history": history, "tags": [5]}
        once = encode_user_once(scorer.encoder, user, candidates)
        wanted = scorer.predict([{**user, **one} for one in candidates])
        for rows in (once, flat(once)):
            found = scorer.predict_encoded(rows)
            assert all(found[label].tobytes() == wanted[label].tobytes() for label in scorer.labels)


def test_more_rows_than_one_call_takes(made, monkeypatch):
    run, artifact = made
    logits, sparse = eager_logits(run, 200)
    monkeypatch.setattr("ssr_rec.serving.scorer.MAX_ROWS", 64)
    torch.testing.assert_close(load(artifact).score(sparse), logits, atol=1e-5, rtol=0)
    assert MAX_ROWS == 2**16


def test_threads_may_share_a_scorer(made):
    run, artifact = made
    scorer = load(artifact, runners=2)
    logits, sparse = eager_logits(run, 50)
    worst = []

    def score() -> None:
        worst.extend(float((scorer.score(sparse) - logits).abs().max()) for _ in range(50))

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 200 and max(worst) < 1e-5


def test_programs_that_were_let_go_leave_the_memory(made):
    """Each is loaded here and run by a thread that ends, as a server has it."""

    def libraries() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split(maxsplit=5)[5] for line in lines if PREFIX in line})

    row = [{"user": 7, "history": [3, 1, 2], "item": 1, "price": 2, "tags": [5]}]
    before = libraries()
    for _ in range(6):
        scorer = load(made[1], check_files=False)
        thread = threading.Thread(target=scorer.predict, args=(row,))
        thread.start()
        thread.join()
        del thread, scorer
        time.sleep(0.1)
    # The last one's place is free when another is let go.
    assert libraries() <= before + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, n: (v + 1000, n), "row 0: feature 'user' has no id"),
        (lambda v, n: (v - 60, n), "has no id -"),
        (lambda v, n: (v[:-1], n), "the lengths add up to"),
        (lambda v, n: (v, n[:-1]), "lengths for 5 features"),
        (lambda v, n: (v, n.flip(0)), "one id per row|add up"),
        (lambda v, n: (v, -n), "one id per row"),
        (lambda v, n: (v, None), "takes a batch"),
    ],
)
def test_ids_that_do_not_fit_are_refused(made, change, message):
    _, sparse = eager_logits(made[0], 20)
    with pytest.raises(ValueError, match=message):
        load(made[1]).score(*change(sparse.values(), sparse.lengths()))


def test_a_list_id_that_its_table_lacks_is_refused(made):
    scorer = load(made[1])
    for wrong in (30, -1, 2**62):
        lists = [(np.array([wrong]), np.array([0, 1])), (np.array([0]), np.array([0, 1]))]
        with pytest.raises(ValueError, match=f"'history' has no id {wrong}"):
            scorer.score_arrays(np.zeros((3, 1), np.int64), lists)


def test_export_refuses_outputs_that_differ(made, tmp_path, monkeypatch):
    plain = Scorer.score
    compiled = made[1] / "model.pt2"
    monkeypatch.setattr("ssr_rec.serving.export.compile_model", lambda model, tables, path: shutil.copy(compiled, path))
    monkeypatch.setattr(Scorer, "score", lambda self, batch: plain(self, batch) + torch.tensor([0.0, 5e-5]))
    with pytest.raises(ValueError, match=r"the artifact's like of row .* more than the tolerance 1e-05"):
        export_run(made[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Scorer, "score", lambda self, batch: plain(self, batch) * float("nan"))
    with pytest.raises(ValueError, match="is nan"):
        export_run(made[0], tmp_path / "out", compared=Compared(tolerance=0.5))
    monkeypatch.setattr(Scorer, "score", lambda self, batch: plain(self, batch) + 1e-6)
    report = export_run(made[0], tmp_path / "out", compared=Compared("validation", 120))
    assert 0 < report["parity"]["max_difference"] < 1e-6 and report["parity"]["rows"] == 120
    assert report["parity"]["split"] == "validation"


def test_nothing_else_is_overwritten(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="something else in it"):
        export_run(made[0], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "artifact.json").unlink(), "not an artifact"),
        (lambda f: (f / "artifact.json").write_text("{}"), "damaged"),
        (lambda f: (f / "artifact.json").write_text("[1]"), "damaged: not a mapping"),
        (lambda f: replace(f / "artifact.json", '"mean"', '"sum"'), "do not have its checksum"),
        (lambda f: (f / "model.pt2").unlink(), "model.pt2: missing or damaged"),
        (lambda f: flip(next(f.glob("tables/main-8.npy"))), "main-8.npy: missing or damaged"),
        (lambda f: flip(f / "model.pt2"), "model.pt2: missing or damaged"),
        (lambda f: other_machine(f, "torch", "2.0.0"), "compiled for torch 2.0.0, this is"),
        (lambda f: other_machine(f, "cpu_capability", "SVE"), "compiled for SVE"),
    ],
)
def test_an_artifact_that_cannot_run_is_refused(made, tmp_path, damage, message):
    folder = tmp_path / "artifact"
    shutil.copytree(made[1], folder)
    load(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_machine(folder: Path, key: str, value: str) -> None:
    from ssr_rec.serving.artifact import digest_of

    values = json.loads((folder / "artifact.json").read_text())
    values["compiled_for"][key] = value
    values.pop("sha256")
    (folder / "artifact.json").write_text(json.dumps({**values, "sha256": digest_of(values)}))


def test_raw_rows_of_a_drawn_log_are_its_ids(made, dataset):
    scorer = load(made[1])
    table = pq.read_table(dataset / "test" / "00000.parquet")
    logits, sparse = eager_logits(made[0], 205)
    found = scorer.predict(table)
    for task, label in enumerate(scorer.labels):
        np.testing.assert_allclose(found[label], logits[:, task].sigmoid().numpy(), atol=1e-5)
    assert torch.equal(scorer.score(sparse).sigmoid()[:, 0], torch.from_numpy(found["click"]))


EXPORTED = [
    *("ssr-d", "mlp switched", "deepfm", "dcn_v2 switched", "mmoe", "ple", "autoint", "autofis many pairs switched"),
    *("afn+", "wukong", "rankmixer"),
]


def test_every_over_arch_has_an_export_test():
    assert {CASES[case]["name"] for case in EXPORTED} == set(OVER_ARCHS)


@pytest.mark.parametrize("case", EXPORTED)
def test_every_over_arch_exports(dataset, tmp_path, case):
    options = [f"--over_arch.{key}={json.dumps(value)}" for key, value in CASES[case].items()]
    # AFN's exponentials of large sums would make a rounding of the sum a difference of the result.
    noise = 0.1 if case == "afn+" else 0.3
    run = make_run(tmp_path / "run", dataset, [*options, "--embeddings.dim=8"], noise)
    report = export_run(run, tmp_path / "artifact")
    assert report["parity"]["max_difference"] < 1e-5 and report["parity"]["rows"] == 205
    logits, sparse = eager_logits(run, 100)
    scorer = load(tmp_path / "artifact")
    for rows in (1, 2, 100):
        torch.testing.assert_close(scorer.score(first_rows(sparse, rows)), logits[:rows], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tables", "dense", "features"),
    [
        ("int4", "bf16", ["tags", "history"]),
        ("int8", "fp32", ["tags", "user", "history", "price"]),
    ],
)
def test_every_precision_exports_with_fields_in_any_order(dataset, tmp_path, tables, dense, features):
    options = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=8", f"--data.features={features}"]
    run = make_run(tmp_path / "run", dataset, options)
    report = export_run(run, tmp_path / "artifact", Form(tables, dense))
    assert 0 < report["parity"]["max_difference"] < report["parity"]["tolerance"]
    assert read_manifest(tmp_path / "artifact").tables == tables
    scorer, (logits, sparse) = load(tmp_path / "artifact"), eager_logits(run, 60)
    for rows in (1, 60):
        assert (scorer.score(first_rows(sparse, rows)) - logits[:rows]).abs().max() < 0.3


def test_a_run_of_two_ranks_exports(dataset, tmp_path):
    run, report = train_run(dataset, tmp_path, *JOBS["2 ranks, tables cut"])
    exported = export_run(run, tmp_path / "artifact")
    assert exported["parity"]["max_difference"] < 1e-5
    for task, measures in exported["measures"]["artifact"].items():
        assert measures["auc"] == pytest.approx(report["test"][task]["auc"], abs=1e-4)
        assert measures["logloss"] == pytest.approx(report["test"][task]["logloss"], abs=1e-5)


def test_a_child_of_a_process_that_has_scored_is_refused_not_left_waiting(made: tuple[Path, Path]) -> None:
    scorer = load(made[1])
    rows = [{feature.name: [1, 2] if feature.kind == "list" else 1 for feature in scorer.schema.features}] * 200
    scorer.predict(rows)

    def child(sender: Connection) -> None:
        try:
            scorer.predict(rows)
        except ValueError as error:
            sender.send(str(error))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(30), "the child waits for threads of its parent's"
    assert "was forked from" in receiver.recv()
    process.join(30)
