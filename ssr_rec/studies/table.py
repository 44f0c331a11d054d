"""Puts a comparison in numbers: mean and deviation over seeds, Welch's test, a Markdown table, a sentence per task."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ssr_rec.common.errors import UserError
from ssr_rec.common.formatting import decimal, probability, short_number
from ssr_rec.runs.measures import goodness, main_measure, title
from ssr_rec.runs.report import Report
from ssr_rec.runs.table import markdown_table
from ssr_rec.studies.doublings import doublings_text
from ssr_rec.studies.study import Job, Plan, Reports

FLOPS_BATCH = 1024
"""The paper gives the FLOPs of a batch of so many samples (4.1.2)."""
SIGNIFICANT = 0.05
OF_BINARY = ("auc", "gauc", "logloss")
METRICS = (*OF_BINARY, "xauc", "rmse", "mae")


def welch(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return two-sided p of Welch's t-test; nan with fewer than two values on a side, or without any spread on both."""
    if min(len(ours), len(theirs)) < 2 or len({*ours}) == len({*theirs}) == 1:
        return math.nan
    with warnings.catch_warnings():
        # SciPy warns of a side without spread; the other side has enough for a p.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p of each of several tests corrected for their number (Holm 1979); nan, no test, stays and counts not.

    Below a level, the chance that any of the tests finds what is not there is below it too, however they depend.
    """
    ranked = sorted((p, index) for index, p in enumerate(ps) if not math.isnan(p))
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(ranked):
        corrected[index] = least = max(least, min(1.0, (len(ranked) - rank) * p))
    return corrected


def summarise(plan: Plan, reports: Reports, workers: Mapping[str, int]) -> pd.DataFrame:
    """Return one row per task and system, full precision; what table.csv holds.

    ``<metric>_mean`` and ``_sd`` (n - 1) are over the winner's finished seeds, ``<metric>_seed<s>`` are their values.
    ``measure`` is the metric that systems are ranked by: AUC, of a number XAUC, or RMSE where a run's test is bounded.
    ``best_baseline`` is the baseline with the best mean of it on the task's test rows; ``p`` is against it,
    ``p_corrected`` for all such tests of the frame, and ``significant`` a better mean with ``p_corrected`` below .05.

    Raises:
        UserError: no run has finished.
    """
    if not any(job.seed == 0 for job in reports):
        raise UserError("no run has finished, so there is nothing to tabulate")
    tasks = plan.schema.select(None, _labels(plan)).labels
    there = {name for report in reports.values() for measures in report.test.values() for name in measures}
    metrics = [name for name in METRICS if name in OF_BINARY or name in there]
    rows = [_row(plan, reports, workers, system, task, metrics) for task in tasks for system in plan.trials]
    frame = pd.DataFrame(rows)
    for task in tasks:
        _test_best_baseline(frame, frame.index[frame["task"] == task], plan.seeds)
    frame["p_corrected"] = holm(frame["p"].tolist())
    frame["significant"] &= frame["p_corrected"] < SIGNIFICANT
    return frame


def runs_frame(plan: Plan, reports: Reports, workers: Mapping[str, int]) -> pd.DataFrame:
    """Return one row per run that the comparison needs, whether it is there or not; what runs.csv holds."""
    missing = {job for system in plan.trials for job in plan.trial_jobs(system) if job not in reports}
    rows = []
    for job in plan.wanted(reports, missing):
        trial, report = plan.trials[job.system][job.trial], reports.get(job)
        row: dict[str, Any] = {**job._asdict(), "run": job.name, "finished": report is not None}
        if report is not None:
            row |= {key: getattr(report, key) for key in ("samples_per_s", "seconds", "steps", "best_step")}
            row |= {"num_parameters": report.over_arch.num_parameters, "workers": workers.get(job.name)}
            for part, tasks in (("validation", report.validation), ("test", report.test)):
                for task, metrics in tasks.items():
                    row |= {f"{part}/{task}/{name}": value for name, value in metrics.items()}
        rows.append(row | trial.settings)
    return pd.DataFrame(rows)


def comparison_text(plan: Plan, frame: pd.DataFrame) -> str:
    """Return caption, a Markdown table and a sentence per task, the settings that were chosen, and what is missing."""
    parts = [_caption(plan, frame)]
    for task, rows in frame.groupby("task", sort=False):
        parts += [f"### {task}", _task_table(plan, rows), task_sentence(rows), doublings_text(rows)]
    systems = frame.drop_duplicates("system").to_dict("records")
    chosen = [f"- {row['system']}: {row['chosen']}" for row in systems if row["chosen"]]
    if chosen:
        parts += ["### Chosen on validation", "\n".join(chosen)]
    notes = [_note(plan, row) for row in systems]
    commits = sorted({commit for cell in frame["commits"] for commit in cell.split()})
    if len(commits) > 1:
        parts.append(f"The runs are of several versions of this code: {', '.join(commits)}.")
    return "\n\n".join(filter(None, [*parts, *(f"† {note}" for note in notes if note)])) + "\n"


def task_sentence(rows: pd.DataFrame) -> str:
    """Say who leads one task, by how much, and the best of the others against the best baseline."""
    task, name = rows["task"].iloc[0], rows["measure"].iloc[0]
    mean = f"{name}_mean"
    known = rows.dropna(subset=[mean])
    if known.empty:
        return f"No system has a test {title(name)} for {task}."
    leader = _best(known, name)
    sentence = f"{task}: {leader['system']} leads with {decimal(leader[mean])} test {title(name)}"
    others, baselines = known[~known["baseline"]], known[known["baseline"]]
    if others.empty or baselines.empty:
        rest = known.drop(leader.name)
        if rest.empty:
            return sentence + "."
        second = _best(rest, name)
        return f"{sentence}, {_signed(leader[mean] - second[mean])} over the next, {second['system']}."
    ours, theirs = _best(others, name), _best(baselines, name)
    lead = ours[mean] - theirs[mean]
    share = ours["num_parameters"] / theirs["num_parameters"]
    if goodness(name, lead) >= 0:
        sentence += f", {_signed(lead)} over the best baseline, {theirs['system']} (p {probability(ours['p'])})"
        return f"{sentence}, with {share:.2g} times its parameters."
    return (
        f"{sentence}; {ours['system']}, the best that is no baseline, has {_signed(lead)} "
        f"(p {probability(ours['p'])}), with {share:.2g} times the parameters of {theirs['system']}."
    )


def _best(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return the row with the best mean of a measure; every one has a mean."""
    return rows.loc[(rows[f"{name}_mean"] * goodness(name, 1)).idxmax()]


def _row(
    plan: Plan, reports: Reports, workers: Mapping[str, int], system: str, task: str, metrics: Sequence[str]
) -> dict[str, Any]:
    final = plan.final_jobs(system, reports)
    found = {job.seed: reports[job] for job in final if job in reports}
    first = next(iter(found.values()), None)
    parameters = first.over_arch.num_parameters if first else None
    flops = first.over_arch.flops_per_sample if first else None
    shared = sorted({workers[job.name] for job in final if job.seed in found and job.name in workers})
    used = [reports[job] for job in {*plan.trial_jobs(system), *final} if job in reports]
    row: dict[str, Any] = {
        "task": task,
        "system": system,
        "baseline": plan.study.systems[system].baseline,
        "curve": plan.study.systems[system].curve,
        "num_parameters": math.nan if parameters is None else parameters,
        "flops_1024": math.nan if flops is None else flops * FLOPS_BATCH,
        "samples_per_s": float(np.median([r.samples_per_s or math.nan for r in found.values()])) if found else math.nan,
        "workers": " or ".join(map(str, shared)),
        "trials": len(plan.judged(system, reports)),
        "seeds": len(found),
        "sparsity": float(np.mean([_sparsity(report) for report in found.values()])) if found else math.nan,
        "winner": final[0].trial if final else None,
        "commits": " ".join(sorted({report.git_commit[:10] for report in used if report.git_commit})),
        "chosen": _chosen(plan, final[0]) if final else "",
        "measure": _measure(reports, task),
    }
    for name in metrics:
        values = {seed: report.measure("test", task, name) for seed, report in found.items()}
        known = [value for value in values.values() if value is not None]
        row[f"{name}_mean"] = float(np.mean(known)) if known else math.nan
        row[f"{name}_sd"] = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
        row |= {f"{name}_seed{seed}": values.get(seed) for seed in range(plan.seeds)}
    return row


def _measure(reports: Reports, task: str) -> str:
    """Return the measure that systems are ranked by: one that all runs have, since bounded ones have no XAUC."""
    found = [{*report.test.get(task, {})} for report in reports.values()]
    return main_measure(dict.fromkeys(set.intersection(*found) if found else ()))


def _sparsity(report: Report) -> float:
    """Return the share of exact zeros after the filters, the mean over the layers; nan without any filter."""
    layers = report.over_arch.filters.get("layers", [])
    shares = [layer["sparsity"] for layer in layers if "sparsity" in layer]
    return float(np.mean(shares)) if shares else math.nan


def _test_best_baseline(frame: pd.DataFrame, rows: pd.Index, seeds: int) -> None:
    """Fill ``best_baseline``, ``p`` and, for a better mean, ``significant`` of one task's rows."""
    name = frame.loc[rows[0], "measure"]
    mean, columns = f"{name}_mean", [f"{name}_seed{seed}" for seed in range(seeds)]
    baselines = frame.loc[rows][frame.loc[rows, "baseline"]].dropna(subset=[mean])
    best = None if baselines.empty else _best(baselines, name)
    for index in rows:
        ours = frame.loc[index]
        p = math.nan
        if best is not None and not ours["baseline"]:
            p = welch(*([float(value) for value in row[columns].dropna()] for row in (ours, best)))
        frame.loc[index, "best_baseline"] = None if best is None else best["system"]
        frame.loc[index, "p"] = p
        frame.loc[index, "significant"] = best is not None and goodness(name, ours[mean] - best[mean]) > 0


def _caption(plan: Plan, frame: pd.DataFrame) -> str:
    shared = sorted({int(number) for row in frame["workers"] for number in row.split(" or ") if number})
    numbers = " or ".join(map(str, shared)) or "an unknown number of"
    searched = f" in the mean of {plan.study.search_seeds} seeds" if plan.study.search_seeds > 1 else ""
    return (
        f"**{plan.schema.name}** ({plan.schema.dataset_id}), test split. Each system's trial with the best validation "
        f"figure{searched}, mean ± standard deviation over {plan.seeds} seed(s). Params: the over-arch without "
        f"embedding tables and heads. FLOPs: one forward pass of {FLOPS_BATCH:,} samples, a multiply-add as two. "
        f"samples/s: training on one core, median, while {numbers} run(s) share the machine. sparsity: exact zeros "
        "after the filters. "
        "p: Welch's t-test, two-sided, against the best baseline of the task; * better with p < "
        f"{decimal(SIGNIFICANT, 2)} after Holm's correction for all of them."
    )


def _task_table(plan: Plan, rows: pd.DataFrame) -> str:
    metrics = [name for name in METRICS if f"{name}_mean" in rows and rows[f"{name}_mean"].notna().any()]
    best_baseline = rows["best_baseline"].iloc[0]
    best = {name: _best(rows, name)[f"{name}_mean"] for name in metrics}
    header = ["system", "Params", "FLOPs", *map(title, metrics)]
    header += [f"p against {best_baseline}" if best_baseline else "p"]
    has_sparsity = bool(rows["sparsity"].notna().any())
    header += [*(["sparsity"] if has_sparsity else []), "samples/s", "trials"]
    lines = []
    for row in rows.to_dict("records"):
        cells = [f"{row['system']} †" if _note(plan, row) else row["system"]]
        cells += [_short(row["num_parameters"]), _short(row["flops_1024"])]
        for name in metrics:
            cell = _mean_sd(row[f"{name}_mean"], row[f"{name}_sd"])
            cell = f"**{cell}**" if row[f"{name}_mean"] == best[name] else cell
            cells.append(f"{cell} *" if name == row["measure"] and row["significant"] else cell)
        planned = len(plan.trials[row["system"]])
        trials = str(planned) if row["trials"] == planned else f"{row['trials']} of {planned}"
        cells.append(probability(row["p"]))
        if has_sparsity:
            cells.append("-" if math.isnan(row["sparsity"]) else f"{row['sparsity']:.1%}")
        lines.append([*cells, _short(row["samples_per_s"]), trials])
    return markdown_table(header, lines)


def _note(plan: Plan, row: Mapping[str, Any]) -> str:
    """Return what a system lacks, '' for nothing."""
    planned, budget, missing, parts = len(plan.trials[row["system"]]), plan.study.trials, [], []
    if planned < budget:
        parts.append(f"{row['system']}: its grid has only {planned} of the budget's {budget} trials.")
    if row["trials"] < planned:
        missing.append(f"{row['trials']} of {planned} trials")
    if row["seeds"] < plan.seeds:
        missing.append(f"{row['seeds']} of {plan.seeds} seeds")
    if missing:
        parts.append(f"{row['system']}: only {' and '.join(missing)} finished.")
    return " ".join(parts)


def _chosen(plan: Plan, job: Job) -> str:
    """Return the winner's search values, by the last part of their keys where that is enough."""
    searched = {key for system in plan.study.systems.values() for key in system.search}
    last = Counter(key.rpartition(".")[2] for key in searched)
    settings = plan.trials[job.system][job.trial].settings
    short = {key: key.rpartition(".")[2] for key in settings}
    return ", ".join(f"{short[key] if last[short[key]] == 1 else key} {value}" for key, value in settings.items())


def _labels(plan: Plan) -> list[str] | None:
    """Return the labels of all runs, which make_plan has checked to be the same."""
    return next(iter(plan.trials.values()))[0].config.data.labels


def _mean_sd(mean: float, sd: float) -> str:
    return decimal(mean) if math.isnan(sd) else f"{decimal(mean)} ± {decimal(sd)}"


def _signed(difference: float) -> str:
    return f"{'+' if difference >= 0 else ''}{decimal(difference)}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else short_number(value)
