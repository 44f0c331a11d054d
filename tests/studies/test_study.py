"""Study files: what they make, what they refuse, and how a winner is chosen."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from ssr_rec.config.run import RunConfig
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.schema import Schema
from ssr_rec.runs.report import Report
from ssr_rec.studies.equal_terms import judging_tasks
from ssr_rec.studies.study import Job, best_trial, draw_trials, make_plan
from ssr_rec.studies.study_file import Study, choose, read_study

STUDY = {
    "trials": 3,
    "base": {"embeddings": {"dim": 8, "optimizer": "adam"}, "train": {"batch_size": 64}},
    "search": {"embeddings.weight_decay": [0, 1e-6], "optimizer.learning_rate": [1e-3, 1e-2]},
    "systems": {
        "Dense MLP": {"base": {"over_arch": {"name": "mlp", "hidden": [8]}}, "search": {"over_arch.dropout": [0, 0.2]}},
        "SSR-S": {
            "baseline": False,
            "base": {"over_arch": {"num_views": 2, "view_dim": 8}, "embeddings": {"dim": 4}},
            "search": {"optimizer.learning_rate": [5e-3]},
        },
    },
}

STUDIES = Path(__file__).parents[2] / "configs" / "compare"


@pytest.fixture
def plan_of(dataset):
    """Makes the plan of a study given as a dict, by default the one above on 2 seeds."""

    def make(study=STUDY, seeds=2, over_archs=("all",), **options):
        chosen = choose(Study.model_validate(study), over_archs, options.get("where", "study"))
        return make_plan(chosen, Schema.read(dataset), str(dataset), seeds, **options)

    return make


def report(auc, test_auc=0.5):
    metrics = {"click": {"auc": auc}, "like": {"auc": auc}}
    test = {task: {"auc": test_auc} for task in metrics}
    return Report(name="x", over_arch={}, dataset={}, validation=metrics, test=test)


def test_a_study_becomes_runs(plan_of, dataset):
    plan = plan_of()
    first = plan.trials["Dense MLP"][0]
    assert first.settings == {"embeddings.weight_decay": 0, "optimizer.learning_rate": 1e-3, "over_arch.dropout": 0}
    assert (first.config.embeddings.dim, first.config.train.batch_size, first.config.seed) == (8, 64, 0)
    assert first.config.data.path == str(dataset)
    for trials in plan.trials.values():
        for trial in trials:
            assert trial.config.embeddings.weight_decay == trial.settings["embeddings.weight_decay"]
            assert trial.config.optimizer.learning_rate == trial.settings["optimizer.learning_rate"]
    # A system's own base and list are stronger than the shared ones, and over_arch is SSR where nothing names it.
    ssr = [trial.config for trial in plan.trials["SSR-S"]]
    assert {config.optimizer.learning_rate for config in ssr} == {5e-3}
    assert {(config.over_arch.name, config.embeddings.dim) for config in ssr} == {("ssr", 4)}


def test_equal_budget_or_the_whole_grid(plan_of):
    plan = plan_of()
    assert {system: len(trials) for system, trials in plan.trials.items()} == {"Dense MLP": 3, "SSR-S": 2}
    assert plan.num_jobs() == 3 + 1 + 2 + 1
    assert [len(trials) for trials in plan_of(trials=1).trials.values()] == [1, 1]
    assert [len(trials) for trials in plan_of(trials=99).trials.values()] == [8, 2]


def test_drawn_trials_are_different_start_with_the_first_values_and_only_grow():
    search = {"a": [1, 2, 3], "b": ["x", "y"], "c": [0.0, 0.5]}
    everything = draw_trials("AFN", search, 100)
    grid = [dict(zip("abc", values, strict=True)) for values in product(*search.values())]
    assert everything[0] == {"a": 1, "b": "x", "c": 0.0}
    assert len(everything) == 12 and all(point in everything for point in grid)
    for budget in range(1, 12):
        assert draw_trials("AFN", search, budget) == everything[:budget]
    assert draw_trials("Wukong", search, 6) != everything[:6]
    assert draw_trials("AFN", {}, 4) == [{}]


def test_the_draw_is_the_same_in_every_process():
    """Python salts the hash of a string per process; the draw must not depend on it."""
    points = draw_trials("RankMixer", {"a": list(range(100))}, 4)
    assert [point["a"] for point in points] == [0, 53, 22, 11]


def test_other_systems_do_not_change_a_system_s_trials(plan_of):
    alone = plan_of(over_archs=["dense_mlp"])
    assert list(alone.trials) == ["Dense MLP"]
    assert alone.trials["Dense MLP"] == plan_of().trials["Dense MLP"]


def test_overrides_reach_every_run_and_fix_what_was_searched(plan_of):
    plan = plan_of(overrides=["--train.epochs=7", "--embeddings={dim: 12}", "--optimizer.learning_rate=0.5"])
    for system, trials in plan.trials.items():
        assert {(t.config.train.epochs, t.config.embeddings.dim) for t in trials} == {(7, 12)}
        assert {t.config.optimizer.learning_rate for t in trials} == {0.5}
        assert [t.settings for t in trials] == ([{"over_arch.dropout": 0}, {"over_arch.dropout": 0.2}], [{}])[
            system == "SSR-S"
        ]


def test_the_resolved_study_makes_the_same_runs(plan_of, tmp_path):
    plan = plan_of(over_archs=["SSR-S", "Dense MLP"], trials=2, overrides=["--train.epochs=7"])
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plan.study.model_dump(mode="json", exclude_defaults=True)))
    again = plan_of(read_study(path).model_dump())
    assert again.trials == plan.trials and again.study.systems == plan.study.systems


def test_runs_of_a_job(plan_of, tmp_path):
    plan = plan_of()
    config = plan.config(Job("Dense MLP", 2, 1), tmp_path)
    assert (config.name, config.runs, config.seed) == ("dense_mlp-t2-s1", str(tmp_path), 1)
    assert config.over_arch == plan.trials["Dense MLP"][2].config.over_arch


def test_a_search_on_two_seeds_goes_by_their_mean(plan_of):
    mlp, ssr = "Dense MLP", "SSR-S"
    one = {**STUDY["systems"][ssr], "search": {"embeddings.weight_decay": [0], "optimizer.learning_rate": [5e-3]}}
    plan = plan_of({**STUDY, "search_seeds": 2, "systems": {**STUDY["systems"], ssr: one}}, seeds=3)
    # SSR-S has one trial, so nothing to choose: its first seed leads to the others as before.
    searched = [Job(mlp, trial, seed) for seed in range(2) for trial in range(3)]
    assert plan.trial_jobs(mlp) == searched and plan.num_jobs() == (3 * 2 + 1) + 3
    # Trial 0 is the best on seed 0 alone, trial 2 in the mean; trial 1, the best of all, has lost a seed.
    values = {0: (0.80, 0.60), 1: (0.90,), 2: (0.75, 0.74)}
    reports = {Job(mlp, t, seed): report(value) for t, found in values.items() for seed, value in enumerate(found)}
    assert not any(job.seed == 2 for job in plan.wanted(reports)), "a seed of a trial is still out"
    wanted = plan.wanted(reports, failed={Job(mlp, 1, 1)})
    assert [job for job in wanted if job.system == mlp] == [*searched, Job(mlp, 2, 2)]
    assert plan.final_jobs(mlp, reports) == [Job(mlp, 2, seed) for seed in range(3)]
    assert plan.judged(mlp, reports)[2]["click"]["auc"] == pytest.approx(0.745) and set(plan.judged(mlp, reports)) == {
        0,
        2,
    }
    assert plan.study.search_seeds == 2, "the resolved study says it"


def test_a_figure_that_a_seed_lacks_is_no_mean(plan_of):
    plan = plan_of({**STUDY, "search_seeds": 2}, seeds=2)
    reports = {Job("Dense MLP", 0, 0): report(0.7), Job("Dense MLP", 0, 1): report(None)}
    assert plan.judged("Dense MLP", reports)[0]["click"]["auc"] is None


def test_fewer_seeds_than_the_search_needs_are_refused(plan_of):
    with pytest.raises(ValueError, match=r"search_seeds=3 needs as many --seeds, or more; it is 2"):
        plan_of({**STUDY, "search_seeds": 3}, seeds=2)


@pytest.mark.parametrize(
    "over_arch, drawn",
    [({"filter": "static"}, 2), ({"filter": "adaptive", "index_seed": 5}, 7), ({"filter": "dynamic"}, None)],
)
def test_each_seed_draws_dims_of_its_own(plan_of, tmp_path, over_arch, drawn):
    base = {"over_arch": {"name": "ssr", "num_views": 2, "view_dim": 8, **over_arch}}
    plan = plan_of({"systems": {"SSR": {"base": base}}})
    trial = plan.trials["SSR"][0].config.over_arch
    assert plan.config(Job("SSR", 0, 0), tmp_path).over_arch == trial
    later = plan.config(Job("SSR", 0, 2), tmp_path).over_arch
    assert later == (trial if drawn is None else trial.model_copy(update={"index_seed": drawn}))


def test_order_trial_by_trial_then_the_winners_seed_by_seed(plan_of):
    plan = plan_of(seeds=3)
    mlp, ssr = "Dense MLP", "SSR-S"
    trials = [Job(mlp, 0, 0), Job(ssr, 0, 0), Job(mlp, 1, 0), Job(ssr, 1, 0), Job(mlp, 2, 0)]
    assert plan.wanted({}) == trials
    reports = {Job(ssr, 0, 0): report(0.6), Job(ssr, 1, 0): report(0.7)}
    assert plan.wanted(reports) == [*trials, Job(ssr, 1, 1), Job(ssr, 1, 2)]
    reports |= {Job(mlp, 0, 0): report(0.8), Job(mlp, 2, 0): report(0.9)}
    assert plan.wanted(reports) == [*trials, Job(ssr, 1, 1), Job(ssr, 1, 2)], "a trial is still out"
    finals = [Job(ssr, 1, 1), Job(mlp, 2, 1), Job(ssr, 1, 2), Job(mlp, 2, 2)]
    assert plan.wanted(reports, failed={Job(mlp, 1, 0)}) == [*trials, *finals]
    assert plan.final_jobs(mlp, reports) == [Job(mlp, 2, 0), Job(mlp, 2, 1), Job(mlp, 2, 2)]
    assert plan.final_jobs(ssr, {}) == []


def test_the_winner_is_chosen_by_validation_whatever_the_test_says(plan_of):
    mlp = "Dense MLP"
    reports = {
        Job(mlp, 0, 0): report(0.70, test_auc=0.99),
        Job(mlp, 1, 0): report(0.71, test_auc=0.01),
        Job(mlp, 2, 0): report(0.69, test_auc=0.98),
    }
    assert plan_of().final_jobs(mlp, reports)[0] == Job(mlp, 1, 0)


@pytest.mark.parametrize(
    ("config", "winner"),
    [
        ({}, 2),  # means of click and like: .6, .6, .65, nan
        ({"monitor_task": "click"}, 1),
        ({"monitor_task": "like"}, 3),
        ({"monitor": "logloss"}, 1),
        ({"monitor": "logloss", "monitor_task": "like"}, 2),
    ],
)
def test_best_trial_follows_the_monitor(config, winner):
    validation = {
        3: {"click": {"auc": None, "logloss": 9.0}, "like": {"auc": 1.0, "logloss": 9.0}},
        0: {"click": {"auc": 0.5, "logloss": 0.6}, "like": {"auc": 0.7, "logloss": 0.5}},
        1: {"click": {"auc": 0.9, "logloss": 0.2}, "like": {"auc": 0.3, "logloss": 0.5}},
        2: {"click": {"auc": 0.7, "logloss": 0.5}, "like": {"auc": 0.6, "logloss": 0.4}},
    }
    assert best_trial(validation, TrainConfig(**config)) == winner


def test_the_earliest_of_equal_trials_wins():
    equal = {"click": {"auc": 0.7}}
    assert best_trial({2: equal, 1: equal, 4: equal}, TrainConfig()) == 1


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        ({"base": {"train": {"batchsize": 3}}}, {}, "system 'Dense MLP' with {'over_arch.dropout': 0}: unknown key"),
        ({"base": {"train": {"batchsize": 3}}}, {}, "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ({"base": {"seed": 1}}, {}, "system 'Dense MLP': seed is not the study's to set; use --seeds"),
        ({"base": {"data": {"path": "x"}}}, {}, "data.path is not the study's to set; use --data"),
        ({}, {"overrides": ["--name=x"]}, "name is not the study's to set; use --out"),
        ({}, {"overrides": ["--train.epochs=0"]}, "train.epochs"),
        ({}, {"overrides": ["--train.epochs", "5"]}, "argument '--train.epochs' is not understood"),
        ({"search": {"over_arch.dropuot": [0]}}, {}, "unknown key 'over_arch.mlp.dropuot'; did you mean 'dropout'?"),
        ({"search": {"trials.epochs": [1]}}, {}, "unknown key 'trials'"),
        (
            {"base": {"train": 3}, "search": {"train.epochs": [1]}},
            {},
            "train.epochs: 'train' is a value, not a section",
        ),
        # The second of a list's values counts as well as the first.
        ({"search": {"train.epochs": [1, "2"]}}, {"trials": 9}, "with {'train.epochs': '2', "),
        (
            {"search": {"train.monitor": ["auc", "logloss"]}},
            {"trials": 9},
            "train.monitor must be the same in all runs",
        ),
        (
            {"search": {"train.task_weights": [{}, {"like": 0.0}]}},
            {"trials": 9},
            "chosen by auc of click and like, or of click; set train.monitor_task",
        ),
        (
            {"systems": {"A": {}, "B": {"base": {"data": {"days": "all"}}}}},
            {},
            "data.days must be the same in all runs; it is None, all",
        ),
        (
            {"base": {"data": {"days": "all"}, "train": {"max_steps": 9}}, "search": {"train.batch_size": [64, 128]}},
            {"trials": 9},
            "train.batch_size must be the same in all runs, since train.max_steps then ends on one day; it is 64, 128",
        ),
        ({"base": {"train": {"monitor_task": "buy"}}}, {}, "system 'Dense MLP': train.monitor_task names 'buy'"),
        ({"base": {"data": {"features": ["zzz"]}}}, {}, "zzz"),
        ({"systems": {"A": {}, "a ": {}}}, {}, "system 'a ' makes no run folder of its own"),
        ({"systems": {"+": {}}}, {}, "system '+' makes no run folder of its own"),
        ({}, {"over_archs": ["SSR-S", "SSR-X"]}, "has no system 'SSR-X'; it has Dense MLP, SSR-S"),
    ],
)
def test_a_bad_study_is_refused_before_anything_runs(plan_of, study, options, message):
    with pytest.raises(ValueError) as refusal:
        plan_of(STUDY | {"search": {}} | study, where="my.yaml", **options)
    assert message in str(refusal.value)
    assert "my.yaml" in str(refusal.value) or "override" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails: 3\nsystems: {A: {}}", "trails: Extra inputs are not permitted"),
        ("systems: {A: {basline: true}}", "systems.A.basline: Extra inputs are not permitted"),
        ("systems: {}", "systems: Dictionary should have at least 1 item"),
        ("systems: {A: {search: {train.epochs: []}}}", "systems.A.search.train.epochs: List should have at least 1"),
        (
            "systems: {A: {}}\nsearch: {train.epochs: [1, 2, 1]}",
            "search.train.epochs: a value is listed twice: [1, 2, 1]",
        ),
        (
            "systems: {A: {}}\nsearch: {embeddings.weight_decay: [0, 0.0]}",
            "embeddings.weight_decay: a value is",
        ),
        ("systems: {A: {}}\ntrials: 0", "trials: Input should be greater than or equal to 1"),
        ("systems: [", "not YAML"),
        ("", "systems: Field required"),
    ],
)
def test_a_study_file_is_refused_by_name_and_key(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        read_study(path)
    assert str(refusal.value).startswith(f"{path}: ") and message in str(refusal.value)


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("systems: {A: {search: {embeddings.weight_decay: [0, 1e-6]}}}")
    assert read_study(path).systems["A"].search == {"embeddings.weight_decay": [0, 1e-6]}


def test_no_such_study(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory; name a study"):
        read_study(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["ablation", "axes", "ics", "scaling"])
def test_the_shipped_studies_make_runs(dataset, name):
    study = read_study(STUDIES / f"{name}.yaml")
    plan = make_plan(study, Schema.read(dataset), str(dataset), 2)
    assert plan.num_jobs() == 2 * len(study.systems)


def test_the_systems_of_the_paper_are_one_study(dataset):
    study = read_study(STUDIES / "systems.yaml")
    assert len(study.systems) == 11
    plan = make_plan(study, Schema.read(dataset), str(dataset), 3)
    assert {len(trials) for trials in plan.trials.values()} == {study.trials}
    assert {name.startswith("SSR") for name, system in study.systems.items() if not system.baseline} == {True}


@pytest.mark.parametrize(("monitor", "tasks"), [("auc", ["click"]), ("rmse", ["like"]), ("logloss", ["click"])])
def test_a_number_judges_by_its_own_measures_alone(dataset, monitor, tasks):
    number = NumberLabel(name="like", mean=0.0, std=1.0, low=0.0, high=1.0)
    schema = Schema.read(dataset).model_copy(update={"numbers": [number]})
    assert judging_tasks(RunConfig(train={"monitor": monitor}), schema) == tasks
