"""The numbers of a comparison against ones computed by hand, and the words around them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from ssr_rec.data.schema import Schema
from ssr_rec.runs.report import Report
from ssr_rec.studies.figure import draw_costs
from ssr_rec.studies.study import Job, make_plan
from ssr_rec.studies.study_file import Study
from ssr_rec.studies.table import comparison_text, holm, runs_frame, summarise, task_sentence, welch

MLP, MIXER, SSR = "Dense MLP", "RankMixer", "SSR-S"
PARAMS = {MLP: 200, MIXER: 1000, SSR: 400}
# Test AUC of click by system and seed, of the winning trial.
CLICK = {MLP: [0.70, 0.70, 0.70], MIXER: [0.71, 0.72, 0.73], SSR: [0.76, 0.77, 0.81]}


@pytest.fixture
def plan(dataset):
    mlp = {"over_arch": {"name": "mlp", "hidden": [8]}}
    study = {
        "trials": 2,
        "search": {"train.epochs": [1, 2]},
        "systems": {
            MLP: {"base": mlp},
            MIXER: {"base": mlp, "search": {"over_arch.dropout": [0, 0.5], "embeddings.learning_rate": [0.1]}},
            SSR: {"baseline": False, "search": {"optimizer.learning_rate": [1e-3]}},
        },
    }
    return make_plan(Study.model_validate(study), Schema.read(dataset), str(dataset), seeds=3)


def report(system, seed, click, validation=0.6):
    like = {"auc": None, "logloss": 0.3}
    values = {
        "name": system,
        "dataset": {},
        "over_arch": {"num_parameters": PARAMS[system], "flops_per_sample": 2 * PARAMS[system]},
        "samples_per_s": [3000.0, 1000.0, 9000.0][seed],
        "seconds": 5.0,
        "validation": {"click": {"auc": validation}, "like": {"auc": validation}},
        "test": {"click": {"auc": click, "gauc": click - 0.1, "logloss": 1 - click}, "like": like},
    }
    return Report.model_validate(values)


@pytest.fixture
def reports():
    """Trial 1 wins everywhere; trial 0 tests far better and must not be seen in the table."""
    found = {Job(system, 0, 0): report(system, 0, 0.99, validation=0.5) for system in CLICK}
    for system, values in CLICK.items():
        found |= {Job(system, 1, seed): report(system, seed, value) for seed, value in enumerate(values)}
    return found


def welch_by_hand(ours, theirs):
    """p of Welch's test by its textbook formulas, the tail of t's density integrated numerically."""
    means = [sum(values) / len(values) for values in (ours, theirs)]
    squares = [
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, mean in zip((ours, theirs), means, strict=True)
    ]
    t = abs(means[0] - means[1]) / math.sqrt(sum(squares))
    df = sum(squares) ** 2 / sum(s**2 / (len(v) - 1) for s, v in zip(squares, (ours, theirs), strict=True))
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    return 1 - 2 * scale * float(np.trapezoid(density, x))


def test_welch_p():
    # Two values each and equal spread: two degrees of freedom, where p = 1 - t / sqrt(t^2 + 2), with t = sqrt(2).
    assert welch([0.72, 0.74], [0.70, 0.72]) == pytest.approx(1 - math.sqrt(2) / 2, abs=1e-12)
    ours, theirs = CLICK[SSR], CLICK[MIXER]
    assert welch(ours, theirs) == pytest.approx(welch_by_hand(ours, theirs), abs=1e-9)
    assert welch(ours, theirs) == welch(theirs, ours)
    # The spread of one side must not be pooled with the other's.
    narrow, wide = [0.700, 0.701, 0.702, 0.703], [0.71, 0.75]
    assert welch(narrow, wide) == pytest.approx(welch_by_hand(narrow, wide), abs=1e-9)


@pytest.mark.parametrize("ours, theirs", [([0.7], [0.6, 0.7]), ([0.7, 0.8], []), ([0.7, 0.7], [0.6, 0.6])])
def test_no_p_without_spread(ours, theirs):
    assert math.isnan(welch(ours, theirs))


def test_correction_for_the_number_of_tests():
    """By the definition: the i-th smallest of m is multiplied by m - i + 1, and none is below a smaller one's."""
    ps = [0.01, math.nan, 0.04, 0.03, 0.005, 0.6]
    assert holm(ps) == pytest.approx([0.04, math.nan, 0.09, 0.09, 0.025, 0.6], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02] and math.isnan(holm([math.nan])[0])


def test_the_star_is_for_what_the_number_of_tests_leaves(plan, reports):
    """One p of .03 among two tests is no finding."""
    values = [0.738, 0.75, 0.745]
    for seed, value in enumerate(values):
        mixer = reports[Job(MIXER, 1, seed)].test["click"]["auc"]
        reports[Job(SSR, 1, seed)].test["click"]["auc"] = value
        reports[Job(MIXER, 1, seed)].test["like"]["auc"] = mixer
        reports[Job(MLP, 1, seed)].test["like"]["auc"] = mixer - 0.1
        reports[Job(SSR, 1, seed)].test["like"]["auc"] = [0.70, 0.72, 0.71][seed]
    frame = summarise(plan, reports, {}).set_index(["task", "system"])
    click, like = frame.loc[("click", SSR)], frame.loc[("like", SSR)]
    assert 0.025 < click["p"] < 0.05 < like["p"]
    assert click["p_corrected"] == pytest.approx(2 * click["p"]) and like["p_corrected"] == pytest.approx(like["p"])
    assert not click["significant"] and not like["significant"]


def test_means_deviations_and_tests_of_the_winners(plan, reports):
    frame = summarise(plan, reports, {})
    assert list(frame["task"].unique()) == ["click", "like"] and len(frame) == 6
    click = frame[frame["task"] == "click"].set_index("system")
    assert click["auc_mean"].to_dict() == pytest.approx({MLP: 0.70, MIXER: 0.72, SSR: 0.78})
    # Sample deviations by hand: (.01^2 + 0 + .01^2) / 2, and (.02^2 + .01^2 + .03^2) / 2.
    assert click["auc_sd"].to_dict() == pytest.approx({MLP: 0, MIXER: 0.01, SSR: math.sqrt(0.0007)}, abs=1e-12)
    assert click["gauc_mean"].to_dict() == pytest.approx({MLP: 0.60, MIXER: 0.62, SSR: 0.68})
    assert click["logloss_mean"].to_dict() == pytest.approx({MLP: 0.30, MIXER: 0.28, SSR: 0.22})
    assert click.loc[SSR, ["auc_seed0", "auc_seed1", "auc_seed2"]].tolist() == CLICK[SSR]
    assert set(click["samples_per_s"]) == {3000.0} and set(click["trials"]) == {2} and set(click["winner"]) == {1}
    assert click["flops_1024"].to_dict() == {system: 2048 * params for system, params in PARAMS.items()}
    assert set(click["best_baseline"]) == {MIXER}
    assert click["p"].isna().to_dict() == {MLP: True, MIXER: True, SSR: False}
    assert click.loc[SSR, "p"] == pytest.approx(welch_by_hand(CLICK[SSR], CLICK[MIXER]), abs=1e-9)
    assert click["significant"].to_dict() == {MLP: False, MIXER: False, SSR: click.loc[SSR, "p"] < 0.05}


@pytest.mark.parametrize(
    ("values", "significant"),
    [([0.76, 0.77, 0.78], True), ([0.66, 0.67, 0.68], False), ([0.70, 0.72, 0.77], False)],
)
def test_the_star_needs_a_small_p_and_a_better_mean(plan, reports, values, significant):
    reports |= {Job(SSR, 1, seed): report(SSR, seed, value) for seed, value in enumerate(values)}
    frame = summarise(plan, reports, {})
    row = frame[(frame["task"] == "click") & (frame["system"] == SSR)].iloc[0]
    assert row["significant"] == significant
    assert (row["p"] < 0.05) == (values != [0.70, 0.72, 0.77])
    line = next(line for line in comparison_text(plan, frame).splitlines() if line.startswith(f"| {SSR}"))
    assert ("** *" in line) == significant


def test_runs_of_several_commits_are_said(plan, reports):
    for job, one in reports.items():
        commit = {MLP: "a" * 40, MIXER: None, SSR: "a" * 40}[job.system]
        reports[job] = one.model_copy(update={"git_commit": commit})
    assert "versions of this code" not in comparison_text(plan, summarise(plan, reports, {}))
    # Also a trial that lost took part in the choice.
    reports[Job(SSR, 0, 0)] = reports[Job(SSR, 0, 0)].model_copy(update={"git_commit": "b" * 40})
    assert f"versions of this code: {'a' * 10}, {'b' * 10}." in comparison_text(plan, summarise(plan, reports, {}))


def test_table_and_sentence(plan, reports):
    text = comparison_text(plan, summarise(plan, reports, {"dense_mlp-t1-s0": 2, "rankmixer-t1-s1": 16}))
    assert text.startswith("**tiny** (tiny-0)")
    assert "over 3 seed(s)" in text and "while 2 or 16 run(s) share the machine" in text and "1,024 samples" in text
    click, like = text[text.index("### click") :].split("### like")
    assert "| system    | Params | FLOPs |" in click and "p against RankMixer" in click
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in click.split("\n")
        if "|" in line
    }
    assert lines[MIXER][:5] == ["1.00k", "2.05M", ".7200 ± .0100", ".6200 ± .0100", ".2800 ± .0100"]
    assert lines[MIXER][5:] == ["-", "3.00k", "2"]
    assert f"### Chosen on validation\n\n- {MLP}: epochs 2\n- {MIXER}: epochs 2, dropout 0.5, embeddings" in like
    assert lines[SSR][2:5] == ["**.7800 ± .0265** *", "**.6800 ± .0265**", "**.2200 ± .0265**"]
    assert lines[MLP][2] == ".7000 ± .0000"
    p = summarise(plan, reports, {}).set_index(["task", "system"]).loc[("click", SSR), "p"]
    assert (
        f"SSR-S leads with .7800 test AUC, +.0600 over the best baseline, RankMixer (p {p:.4f}".replace("p 0.", "p .")
        in click
        and "with 0.4 times its parameters." in click
    )
    assert "versions of this code" not in text
    # A metric that no system has is no column; one of a single class has no AUC.
    assert "GAUC" not in like and "AUC" not in like.split("\n")[2] and "No system has a test AUC for like." in like
    assert "†" not in text


@pytest.mark.parametrize(("name", "sign"), [("xauc", 1), ("rmse", -1)])
def test_a_number_is_ranked_by_its_own_measure(plan, reports, tmp_path, name, sign):
    """By XAUC, or where evaluations are bounded by RMSE, of which less is better."""
    for job, one in reports.items():
        value = sign * one.test["click"]["auc"] + 10 * (sign < 0)
        seconds = {name: value, "rmse": 10 - one.test["click"]["auc"], "calibration": 1.0}
        reports[job] = one.model_copy(update={"test": {"click": one.test["click"], "like": seconds}})
    frame = summarise(plan, reports, {})
    click, like = (frame[frame["task"] == task].set_index("system") for task in ("click", "like"))
    assert set(click["measure"]) == {"auc"} and set(like["measure"]) == {name}
    for key in ("best_baseline", "significant"):
        assert like[key].to_dict() == click[key].to_dict()
    assert like["p"].to_dict() == pytest.approx(click["p"].to_dict(), nan_ok=True)
    assert like.loc[SSR, f"{name}_mean"] == pytest.approx(0.78 if sign > 0 else 9.22)
    text = comparison_text(plan, frame).split("### like")[1]
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert ("XAUC" in header) == (name == "xauc") and "RMSE" in header and " AUC" not in header
    assert next(line for line in lines if "**" in line).startswith(f"| {SSR}")
    lead = ".7800 test XAUC, +.0600" if sign > 0 else "9.2200 test RMSE, -.0600"
    assert f"like: SSR-S leads with {lead} over the best baseline, RankMixer" in text
    draw_costs(frame, "tiny", tmp_path / "costs.png")


def test_where_the_test_of_a_run_is_bounded_all_are_ranked_by_what_they_have(plan, reports):
    """By XAUC the best system, whose runs have none, would be left out."""
    for job, one in reports.items():
        auc = one.test["click"]["auc"]
        seconds = {"rmse": 10 - auc} if job.system == SSR else {"xauc": auc, "rmse": 10 - auc}
        reports[job] = one.model_copy(update={"test": {"click": one.test["click"], "like": seconds}})
    frame = summarise(plan, reports, {})
    assert frame.groupby("task")["measure"].agg(set).to_dict() == {"click": {"auc"}, "like": {"rmse"}}
    assert "like: SSR-S leads with 9.2200 test RMSE, -.0600 over the best baseline" in comparison_text(plan, frame)


def test_one_seed_has_no_deviation_and_no_p(dataset, plan, reports):
    alone = make_plan(plan.study, plan.schema, str(dataset), seeds=1)
    text = comparison_text(alone, summarise(alone, {job: r for job, r in reports.items() if job.seed == 0}, {}))
    line = next(line for line in text.splitlines() if line.startswith("| SSR-S"))
    assert "| **.7600** |" in line and "±" not in line and "|                   - |" in line
    assert "over the best baseline, RankMixer (p -)" in text


def test_sparsity_has_a_column_where_filters_report_it(plan, reports):
    assert "sparsity |" not in comparison_text(plan, summarise(plan, reports, {}))
    for job, found in reports.items():
        if job.system == "SSR-S":
            layers = [{"sparsity": 0.5 + 0.1 * job.seed}, {"sparsity": 0.9}, {"input_coverage": 1.0}]
            over_arch = found.over_arch.model_copy(update={"filters": {"layers": layers}})
            reports[job] = found.model_copy(update={"over_arch": over_arch})
    frame = summarise(plan, reports, {})
    expected = sum((0.5 + 0.1 * seed + 0.9) / 2 for seed in range(3)) / 3
    assert frame.loc[frame["system"] == "SSR-S", "sparsity"].tolist() == pytest.approx([expected] * 2)
    assert frame.loc[frame["system"] != "SSR-S", "sparsity"].isna().all()
    assert "| sparsity |" in comparison_text(plan, frame) and f"{expected:.1%}" in comparison_text(plan, frame)


def test_what_is_missing_is_marked(plan, reports):
    del reports[Job(MLP, 0, 0)], reports[Job(SSR, 1, 2)], reports[Job(MIXER, 0, 0)]
    for seed in range(3):
        del reports[Job(MIXER, 1, seed)]
    frame = summarise(plan, reports, {})
    text = comparison_text(plan, frame)
    assert "| Dense MLP † |" in text and "| SSR-S †     |" in text and "| RankMixer † |" in text
    assert "† Dense MLP: only 1 of 2 trials finished." in text
    assert "† SSR-S: only 2 of 3 seeds finished." in text
    assert "† RankMixer: only 0 of 2 trials and 0 of 3 seeds finished." in text
    click = frame[frame["task"] == "click"].set_index("system")
    assert set(click["best_baseline"]) == {MLP} and math.isnan(click.loc[MIXER, "auc_mean"])
    with pytest.raises(ValueError, match="no run has finished"):
        summarise(plan, {}, {})


def test_a_grid_smaller_than_the_budget_is_marked(dataset, plan, reports):
    """The table must not pass a system with fewer trials than the others for one on equal terms."""
    grown = make_plan(plan.study, plan.schema, str(dataset), seeds=3, trials=3)
    reports |= {Job(MIXER, 2, 0): report(MIXER, 0, 0.1, validation=0.1)}
    text = comparison_text(grown, summarise(grown, reports, {}))
    assert "† Dense MLP: its grid has only 2 of the budget's 3 trials.\n" in text
    assert "† SSR-S: its grid has only 2 of the budget's 3 trials.\n" in text
    assert "| RankMixer   |" in text and "| SSR-S †     |" in text
    del reports[Job(SSR, 1, 2)]
    text = comparison_text(grown, summarise(grown, reports, {}))
    assert "† SSR-S: its grid has only 2 of the budget's 3 trials. SSR-S: only 2 of 3 seeds finished.\n" in text


def test_sentences_of_other_line_ups(plan, reports):
    frame = summarise(plan, reports, {})
    click = frame[frame["task"] == "click"]
    baselines = task_sentence(click[click["baseline"]])
    assert baselines == "click: RankMixer leads with .7200 test AUC, +.0200 over the next, Dense MLP."
    assert task_sentence(click[click["system"] == MLP]) == "click: Dense MLP leads with .7000 test AUC."
    reports |= {Job(SSR, 1, seed): report(SSR, seed, 0.7 + seed / 1000) for seed in range(3)}
    frame = summarise(plan, reports, {})
    behind = task_sentence(frame[frame["task"] == "click"])
    assert behind.startswith(
        "click: RankMixer leads with .7200 test AUC; SSR-S, the best that is no baseline, has -.0190"
    )
    assert behind.endswith("with 0.4 times the parameters of RankMixer.")


def test_every_run_has_a_row_with_its_settings_and_metrics(plan, reports):
    del reports[Job(SSR, 1, 2)]
    runs = runs_frame(plan, reports, {"ssr_s-t0-s0": 4}).set_index("run")
    assert len(runs) == 3 * (2 + 2)
    assert runs.loc["ssr_s-t0-s0", ["train.epochs", "workers", "validation/click/auc", "test/click/auc"]].tolist() == [
        1,
        4,
        0.5,
        0.99,
    ]
    assert runs.loc["rankmixer-t1-s2", "test/click/logloss"] == pytest.approx(0.27)
    assert not runs.loc["ssr_s-t1-s2", "finished"] and runs["finished"].sum() == 11


@pytest.mark.slow
def test_picture(plan, reports, tmp_path):
    """Several panels, a curve, a system without runs, and points on top of each other."""
    for job in list(reports):
        if job.system == MLP:
            del reports[job]
    frame = summarise(plan, reports, {})
    frame["curve"] = frame["system"].map({MIXER: "family", SSR: "family"})
    draw_costs(frame, "tiny", tmp_path / "curve.png")
    frame["num_parameters"], frame["curve"] = 100.0, None
    draw_costs(frame, "tiny", tmp_path / "points.png")
    for name in ("curve.png", "points.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_labels_cover_neither_points_nor_each_other(tmp_path, monkeypatch):
    """Eleven systems of about the same cost, as the paper's table has them."""
    import pandas as pd
    from matplotlib.figure import Figure

    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "task": "click",
            "system": [f"System {i}" for i in range(11)],
            "baseline": [i < 9 for i in range(11)],
            "curve": None,
            "num_parameters": 250e3 * np.exp(0.3 * rng.standard_normal(11)),
            "flops_1024": 500e6 * np.exp(0.3 * rng.standard_normal(11)),
            "auc_mean": 0.74 + 0.002 * rng.standard_normal(11),
            "auc_sd": 0.0003,
            "measure": "auc",
        }
    )
    drawn = SimpleNamespace(figure=None)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (setattr(drawn, "figure", self), save(self, path)))
    draw_costs(frame, "tiny", tmp_path / "points.png")
    for ax, cost in zip(drawn.figure.axes, ("num_parameters", "flops_1024"), strict=True):
        boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
        assert sorted(boxes) == sorted(frame["system"])
        points = ax.transData.transform(frame[[cost, "auc_mean"]].to_numpy(dtype=float))
        names = list(boxes)
        for i, name in enumerate(names):
            assert not any(boxes[name].overlaps(boxes[other]) for other in names[i + 1 :])
            assert not any(boxes[name].contains(x, y) for x, y in points)
