"""Shows the use of a dataset's tables as a Markdown table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ssr_rec.data.features import LogBuckets, RawHash
from ssr_rec.data.schema import Schema
from ssr_rec.data.splits import Lookups
from ssr_rec.data.table_usage import Use
from ssr_rec.runs.curves import COLORS, DPI

MOST_SPLITS = 8
HEADER = (
    "feature",
    "encoding",
    "table rows",
    "ids seen",
    "used",
    "lookups",
    "missing",
    "oov",
    "top id",
    "top 1 %",
    "values",
    "load",
    "collide",
    "expected",
)


def dataset_table(schema: Schema) -> str:
    """Return a dataset in one line, as the paper's Table 1 has it, over all splits.

    Feature values are rows of all tables but those of missing and unknown values; a shared table counts once, one whose
    size only a config says not at all.
    """
    rows = sum(split.num_rows for split in schema.splits.values())
    positive = {}
    for label in (name for name in schema.labels if schema.number(name) is None):
        counted = [(s.counted.get(label, s.num_rows), s.positive_rate[label]) for s in schema.splits.values()]
        positive[label] = sum(count * rate for count, rate in counted) / max(1, sum(count for count, _ in counted))
    kinds = Counter("numerical" if isinstance(f.encoding, LogBuckets) else f.kind for f in schema.features)
    tables = {f.table: f for f in schema.features if not isinstance(f.encoding, RawHash)}
    values = sum(
        f.num_embeddings - sum(hasattr(f.encoding, name) for name in ("missing_id", "oov_id")) for f in tables.values()
    )
    lists = {"list": "list features"} if kinds["list"] else {}
    names = {"categorical": "categorical", "numerical": "numerical", **lists}
    header = ["data", "samples", "positive", *names.values(), "feature values"]
    cells = [schema.name, f"{rows:,}", " / ".join(f"{label} {share:.2%}" for label, share in positive.items()) or "-"]
    cells += [*(str(kinds[kind]) for kind in names), f"{values:,}"]
    return "\n".join([f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1), f"| {' | '.join(cells)} |"])


def use_table(uses: Sequence[Use]) -> str:
    """Return one line per feature; a dash is what does not apply to it or is not known."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|" + "--:|" * (len(HEADER) - 2)]
    for use in uses:
        cells = [
            *(use.name, use.kind, "-" if use.table_rows is None else f"{use.table_rows:,}"),
            *(f"{use.ids:,}", _percent(use.used), f"{use.lookups:,}"),
            *(_percent(share) for share in (use.missing, use.oov, use.top_id, use.top_percent)),
            "-" if use.values is None else f"{use.values:,}",
            "-" if use.load is None else f"{use.load:.3g}",
            *(_percent(share) for share in (use.collisions, use.expected_collisions)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def split_table(found: Mapping[str, Mapping[str, Lookups]]) -> str:
    """Return the missing and out-of-vocabulary shares of each feature in each split; of many, in the first and last."""
    splits = list(found)
    if len(splits) > MOST_SPLITS:
        splits = [splits[0], *splits[1 - MOST_SPLITS :]]
    lines = [f"| missing / oov | {' | '.join(splits)} |", "|---|" + "--:|" * len(splits)]
    for name in dict.fromkeys(name for split in splits for name in found[split]):
        cells = [_shares(found[split].get(name)) for split in splits]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(found: Lookups | None) -> str:
    return "-" if found is None else f"{_percent(found.share('missing'))} / {_percent(found.share('oov'))}"


def unknown(uses: Sequence[Use]) -> str | None:
    """Return what the report cannot say for want of the raw values, or None."""
    names = [use.name for use in uses if use.buckets is not None and use.values is None]
    if not names:
        return None
    return (
        f"not known: how many values of {', '.join(names)} collide. Their ids do not tell; it is measured when a whole "
        "log is prepared, and was not for this dataset, or days were added since"
    )


def draw_use(uses: Sequence[Use], path: str | Path) -> None:
    """Draw rows and lookups of every table as a PNG: how full each table is, and where its lookups go."""
    figure = Figure(figsize=(13, max(3.0, 1.4 + 0.32 * len(uses))), dpi=DPI, layout="constrained")
    rows, lookups = figure.subplots(1, 2, sharey=True)
    places, names = range(len(uses)), [use.name for use in uses]
    rows.barh(places, [use.table_rows or 0 for use in uses], color="#d5dde6", label="rows of the table")
    rows.barh(places, [use.ids for use in uses], height=0.45, color=COLORS[0], label="ids seen in training")
    rows.set_xscale("log")
    rows.set_xlim(left=0.7)  # so that a single row is seen
    rows.set_yticks(places, names)
    rows.invert_yaxis()
    rows.set_title("tables", loc="left", fontsize=10)
    starts = [0.0] * len(uses)
    parts = {
        "missing": ([use.missing or 0.0 for use in uses], COLORS[7]),
        "out of vocabulary": ([use.oov or 0.0 for use in uses], COLORS[1]),
        "other ids": ([1 - (use.missing or 0.0) - (use.oov or 0.0) for use in uses], "#b9d3e8"),
    }
    for label, (shares, color) in parts.items():
        lookups.barh(places, shares, left=starts, color=color, label=label)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    lookups.plot([use.top_percent for use in uses], places, "k|", markersize=12, label="share of the top 1 % of ids")
    lookups.xaxis.set_major_formatter(PercentFormatter(1.0))
    lookups.set_title("lookups in training", loc="left", fontsize=10)
    for axes in (rows, lookups):
        axes.margins(y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}" if share == 0 or share >= 1e-4 else f"{share:.1e}"
