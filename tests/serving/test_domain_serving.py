"""A model with a domain, served: the graph, and the artifact on raw rows with values that training has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_rec.config.run import resolve
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.explaining.importance import Scored
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.serving.export import export_run
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import restore_model
from ssr_rec.serving.user_once import encode_user_once
from tests.checkpointing.test_warm_values import SPEC, write_log
from tests.made_run import make_run
from tests.over_archs.test_contract import CASES
from tests.serving.test_serving_model import both

DOMAIN = {"domain": "item", "heads": {"per_domain": True, "hidden": [6]}, "embeddings": {"dim": 8}}
OPTIONS = ["--domain=kind", "--heads={per_domain: true, hidden: [6]}", "--embeddings.dim=8"]
OPTIONS += ["--over_arch={name: ssr, num_views: 2, view_dim: 8, domain_views: 1}"]
ROW = {"item": "i3", "code": "c3", "price": 12, "tags": ["t1", "t2"]}


@pytest.mark.parametrize("case", ["ssr-s", "ssr-d", "deepfm", "ple", "mmoe"])
def test_the_graph_scores_as_the_trained_model(dataset: Path, case: str) -> None:
    over_arch = {**CASES[case], **({"domain_views": 2} if case.startswith("ssr") else {})}
    for features in (None, ["price", "tags", "item", "user"]):
        served, trained = both(
            dataset, resolve({**DOMAIN, "over_arch": over_arch, "data": {"features": features}}, "t")
        )
        torch.testing.assert_close(served, trained, atol=2e-6 * float(trained.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights on a log of two kinds, the domain."""
    folder = tmp_path_factory.mktemp("kinds")
    prepare([str(write_log(folder / "log.csv", 2, True))], folder / "data", make_spec(SPEC, "test"))
    return make_run(folder / "run", folder / "data", OPTIONS)


def test_explaining_exchanges_columns_of_a_model_with_a_domain(run: Path) -> None:
    restored = restore_model(run)
    rows = SplitRows.read(restored.data, restored.schema, "test", 60)
    scored, order = Scored(restored.model, rows), np.random.default_rng(0).permutation(rows.block.num_rows)
    for columns in (["item"], ["kind"], ["kind", "price"]):
        wanted = rows.exchanged(columns, order).logits(restored.model)
        np.testing.assert_allclose(scored.exchanged(columns, order), wanted, atol=1e-5)
        assert np.abs(wanted - scored.logits).max() > 1e-3


@pytest.mark.slow
def test_an_artifact_scores_raw_rows_as_the_run(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "artifact")
    scorer, eager = load(tmp_path / "artifact"), RunScorer(run)
    kinds = ["k", "new", "never seen", None]
    rows = [{**ROW, "kind": kind, "price": price} for price in range(40) for kind in kinds]
    for some in (rows[:1], rows[2:4], rows):
        mine, wanted = scorer.predict(some), eager.predict(some)
        for task in wanted:
            np.testing.assert_allclose(mine[task], wanted[task], atol=1e-6)
    assert len({round(float(p), 5) for p in scorer.predict(rows[:4])["click"]}) == 4, "four domains, four scores"
    for user, candidates in (
        ({"kind": "never seen", "tags": ["t1"]}, [{"item": f"i{n}", "code": "c", "price": n} for n in range(5)]),
        ({"tags": ["t1"], "code": "c"}, [{"item": "i1", "kind": kind, "price": 3} for kind in kinds]),
    ):
        once = scorer.predict_encoded(encode_user_once(scorer.encoder, user, candidates))
        wanted = eager.predict([{**user, **candidate} for candidate in candidates])
        for task in wanted:
            np.testing.assert_allclose(once[task], wanted[task], atol=1e-6)
