"""Makes the report of a run that has ended, prints it and draws it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssr_rec.common.formatting import decimal
from ssr_rec.config.losses import trained_to_rank
from ssr_rec.model.history_fields import HistoryFields
from ssr_rec.runs.curves import draw_curves
from ssr_rec.runs.days import days_table, draw_days
from ssr_rec.runs.event_shares import draw_event_shares, shares_of
from ssr_rec.runs.filter_curves import draw_filter_curves, filter_rows
from ssr_rec.runs.folder import CONFIG_FILE, CURVES_FILE, METRICS_FILE, plain, read_metrics
from ssr_rec.runs.log import RunLog, num_embedding_parameters
from ssr_rec.runs.measures import shown, title
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.runs.quality import quality_warnings
from ssr_rec.runs.report import REPORT_FILE, Report, Run, write_report
from ssr_rec.training.trainer import Trainer


def build_report(
    log: RunLog, trainer: Trainer, ended: Mapping[str, Any], warm_start: Mapping[str, Any] | None
) -> Report:
    """Return the report of a run.

    Args:
        ended: what ``Trainer.test`` returned.
        warm_start: what ``Trainer.start`` returned.
    """
    config, following = trainer.run_config, trainer.over_arch.following_config()
    dense = trainer.dense
    # A run by days may have lost its best weights after its last evaluation.
    best = {"tasks": {}, "step": None, **trainer.fitted.best}
    of_domain = (ended["domain"],) if ended["domain"] is not None else ()
    over_arch, schema, fitted, test = trainer.over_arch, trainer.schema, trainer.fitted, ended["test"]
    found = {
        "name": log.folder.name,
        "over_arch": {
            "name": config.over_arch.name,
            "kind": config.over_arch.label,
            "num_parameters": over_arch.num_parameters,
            "flops_per_sample": over_arch.flops_per_sample,
            **over_arch.statistics(ended["inputs"], dense.field_names, *of_domain),
        },
        **({"sequences": _encoders(dense.histories, ended["event_shares"])} if dense.histories is not None else {}),
        "num_head_parameters": sum(p.numel() for p in dense.heads.parameters()),
        "num_embedding_parameters": num_embedding_parameters(config, schema, over_arch),
        "test": test,
        "validation": best["tasks"],
        "best_step": best["step"],
        "ceiling": {task: c.model_dump() for task, c in schema.ceiling.get("test", {}).items() if task in test},
        "samples_per_s": fitted.samples_per_s,
        "data_wait": fitted.data_wait,
        "world_size": log.world_size,
        "steps": fitted.steps,
        "epochs": fitted.epochs,
        "stopped_early": fitted.stopped_early,
        "skipped_steps": fitted.skipped,
        "seconds": fitted.seconds,
        "warnings": quality_warnings(
            schema, {"validation": best["tasks"], "test": test}, trained_to_rank(config.train.losses)
        ),
        "seed": config.seed,
        "dataset": {
            "name": schema.name,
            "dataset_id": schema.dataset_id,
            "num_rows": trainer.train.num_rows,
            **({"cut_groups": cut} if (cut := trainer.train.share_cut()) is not None else {}),
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "failed_checkpoints": trainer.checkpoints.failures,
        **{key: ended[key] for key in ("metrics", "deciles", "days") if key in ended},
        **_by_value(config.metrics_by, best, ended),
        "warm_start": warm_start,
        "following": following and following.model_dump(mode="json"),
    }
    return Report.model_validate(plain(found))


def _by_value(column: str | None, best: Mapping[str, Any], ended: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measures by the values of a column, where there is one."""
    if column is None:
        return {}
    splits = {"validation": best.get("by_value"), "test": ended.get("by_value")}
    return {"by_value": {"column": column} | {split: found for split, found in splits.items() if found}}


def finish_report(log: RunLog, report: Report) -> None:
    """Write report.json and the pictures and print the result, on rank 0."""
    if not log.is_root:
        return
    write_report(log.folder, report)
    log.progress.close()
    show_result(log, log.folder, report)
    if log.trackers is not None:
        names = (CONFIG_FILE, METRICS_FILE, REPORT_FILE)
        log.trackers.finish([*(log.folder / name for name in names), *sorted(log.folder.glob("*.png"))])


def show_result(log: RunLog, folder: Path, report: Report) -> None:
    """Print the result of a finished run and draw the pictures that are not there yet, on rank 0."""
    if not log.is_root:
        return
    rows = read_metrics(folder / METRICS_FILE)
    wanted = {CURVES_FILE: lambda path: draw_curves(rows, report, path)}
    what = "test"
    if report.days:
        wanted["days.png"] = lambda path: draw_days([Run(report, [])], path)
        what = f"mean of {len(report.days)} next days,"
        print(days_table([Run(report, [])]))
    if shares_of(report):
        wanted["event_shares.png"] = lambda path: draw_event_shares(report, path)
    if filtered := filter_rows(rows):
        title = f"{report.name}   ·   {report.over_arch.kind}"
        wanted["filters.png"] = lambda path: draw_filter_curves(filtered, title, path)
    pictures = [str(folder / name) for name, draw in wanted.items() if _drawn(folder / name, draw)]
    for task, values in report.test.items():
        print(f"{report.over_arch.kind}  {what} {task}: {_figures(values, report.ceiling.get(task))}")
    if report.over_arch.interactions is not None:
        print(_interactions(report.over_arch.interactions))
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"report {folder / REPORT_FILE}, pictures {', '.join(pictures) or 'none'}", flush=True)


def _drawn(path: Path, draw: Callable[[Path], None]) -> bool:
    """Draw a picture; one that cannot be drawn or written is said, since the run is as good without."""
    try:
        if not path.is_file():
            draw(path)
    except Exception as error:  # whatever a drawing library raises
        print(f"warning: {path}: not drawn: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def _interactions(found: Mapping[str, Any], most: int = 8) -> str:
    """Return which pairs of fields an AutoFIS search left, or how it weighs them in the end, the strongest first."""
    open_gates = sorted((row for row in found["alphas"] if row[2]), key=lambda row: -abs(row[2]))
    strongest = ", ".join(f"{i} x {j} {decimal(alpha, 3)}" for i, j, alpha in open_gates[:most])
    return f"{found['stage']}: {len(open_gates)} of {found['pairs']} pairs of fields; strongest: {strongest or 'none'}"


def _figures(values: Mapping[str, float | None], ceiling: Mapping[str, float | None] | None) -> str:
    # Of a binary task calibration is said where it is bad.
    names = [name for name in shown([values]) if name != "calibration" or "logloss" not in values]
    parts = [f"{title(name)} {decimal(values[name])}{_plus_minus(values, name)}" for name in names]
    if ceiling:
        parts.append(f"(ceiling of the log: AUC {decimal(ceiling['auc'])}, logloss {decimal(ceiling['logloss'])})")
    return "  ".join(parts)


def _plus_minus(values: Mapping[str, float | None], key: str) -> str:
    """Return what a measure of a bounded evaluation may be off by."""
    bound = values.get(f"{key}_bound")
    return "" if bound is None else f" +-{bound:.1e}"


def _encoders(histories: HistoryFields, shares: Mapping[str, Any]) -> dict[str, Any]:
    """Return sequence -> its encoder, what that costs and what it looks at; FLOPs are of a history of full length."""
    return {
        history.name: {
            "encoder": history.config.encoder.name,
            "kind": history.config.encoder.label,
            "fields": encoder.out_fields,
            "max_length": history.max_length,
            "num_parameters": encoder.num_parameters,
            "flops_per_sample": encoder.flops(history.max_length).total,
            **shares.get(history.name, {}),
        }
        for history, encoder in histories.pairs()
    }
