"""Say when a model is bad: worse than a constant, or predicting far too much or too little."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ssr_rec.common.formatting import decimal
from ssr_rec.data.schema import Schema

CALIBRATION = 0.8, 1.25
"""Mean prediction over the mean label; outside, a model's predictions are not to be used as such."""
FAR = 0.1
"""A share of missing or out-of-vocabulary values that differs so much from training's is named as a reason."""
MOST_REASONS = 3


def quality_warnings(
    schema: Schema, parts: Mapping[str, Mapping[str, Mapping[str, Any]]], ranked: Collection[str] = ()
) -> list[str]:
    """Return a sentence for every measure of a bad model, and one with the likely reason where the data has one.

    Args:
        schema: the dataset's.
        parts: ``validation`` and ``test``, of datasets by days the mean of the next days -> task -> measures.
        ranked: tasks that a loss of rankings alone has trained, whose measures of probabilities mean nothing.
    """
    found = [
        f"{task}: trained to rank alone, so that its scores are no probabilities, and logloss, NE and calibration say "
        f"nothing of it; a share of cross-entropy (train.losses.{task}.cross_entropy) makes them such"
        for task in ranked
    ]
    splits: list[str] = []
    numbers = set(schema.number_names)
    for part, tasks in parts.items():
        before = len(found)
        for task, measures in tasks.items():
            if task in ranked:
                continue
            ne, calibration = measures.get("ne"), measures.get("calibration")
            if ne is not None and ne > 1:
                found.append(
                    f"{part} {task}: NE {decimal(ne)} is above 1: the model is worse than predicting the share of "
                    "positive rows for every row"
                )
            if calibration is not None and (calibration < CALIBRATION[0] or calibration > CALIBRATION[1]):
                found.append(
                    f"{part} {task}: calibration {decimal(calibration)}: the mean prediction is that many times the "
                    + ("mean of the labels" if task in numbers else "share of positive rows")
                )
        if len(found) > before:
            splits.append(schema.days.names[-1] if schema.days else part)
    reasons = [reason for split in dict.fromkeys(splits) if (reason := _reason(schema, split)) is not None]
    return found + reasons


def _reason(schema: Schema, split: str) -> str | None:
    """Return which features of a split are unlike those of training."""
    # Of days, of those that the vocabularies are of.
    trained = schema.lookups_of(["train"] if schema.days is None else schema.days.names[: schema.days.fitted])
    far: list[tuple[float, str]] = []
    for name, there in schema.splits[split].lookups.items():
        for kind, word in (("oov", "out of vocabulary"), ("missing", "missing")):
            here, before = there.share(kind), trained[name].share(kind) if name in trained else 0.0  # type: ignore[arg-type]
            if name in schema.feature_names and here - before > FAR:
                far.append((before - here, f"{here:.1%} of {name} are {word} ({before:.1%} in training)"))
    if not far:
        return None
    told = ", ".join(sentence for _, sentence in sorted(far)[:MOST_REASONS])
    return f"likely reason: on {split} {told}; data.oov_dropout trains the row of such values"
