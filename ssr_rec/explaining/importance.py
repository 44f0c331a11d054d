"""Measures what a model loses when a feature's values are exchanged between rows: permutation importance.

Breiman, "Random Forests", Machine Learning 45, 2001. A column keeps its distribution and loses its connection with the
other columns and the labels. Columns that say the same stand in for one another, so each alone may look needless; name
them as one group to ask for their joint worth. The columns of a sequence are always exchanged together: an event's
item, age and action belong to one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.rows import BATCH_ROWS, SplitRows
from ssr_rec.metrics.exact import auc, logloss, of_task
from ssr_rec.model.ctr_model import CTRModel, logits_of

MEASURES = ("auc", "logloss")


@dataclass(frozen=True)
class Importance:
    """Says what the model loses without a group of columns.

    Attributes:
        name: of the feature, sequence or group.
        columns: features that were exchanged together.
        auc: task -> AUC lost, one value a seed; above 0 where the columns matter.
        logloss: task -> logloss added, in nats a row, one value a seed.
    """

    name: str
    columns: list[str]
    auc: dict[str, list[float]]
    logloss: dict[str, list[float]]

    def mean(self, measure: str, task: str) -> float:
        """Return the mean over the seeds."""
        return float(np.mean(getattr(self, measure)[task]))

    def spread(self, measure: str, task: str) -> float:
        """Return the standard deviation over the seeds; nan of one seed."""
        values = getattr(self, measure)[task]
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    @property
    def total(self) -> float:
        """Return the logloss added, the mean over seeds and tasks that have rows: what the columns are ranked by."""
        values = np.array(list(self.logloss.values()))
        return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")


def column_groups(schema: Schema, named: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return what is exchanged together: each sequence, each other feature alone, and the groups that were named.

    Raises:
        UserError: a group that has the name of something else, names an unknown column or a part of a sequence.
    """
    sequence_of = {name: sequence for sequence in schema.sequences for name in sequence.features}
    groups: dict[str, list[str]] = {}
    for feature in schema.feature_names:
        sequence = sequence_of.get(feature)
        if sequence is None:
            groups[feature] = [feature]
        elif len(sequence.features) == 1:
            groups[sequence.name] = [feature]
        else:
            groups[f"{sequence.name} (all columns)"] = list(sequence.features)
    groups |= {name: [name] for name in schema.dense_names}
    for name, columns in named.items():
        if name in groups:
            raise UserError(f"--group {name}: there is a feature or sequence of that name; choose another")
        for column in columns:
            if column not in [*schema.feature_names, *schema.dense_names]:
                known = ", ".join([*schema.feature_names, *schema.dense_names])
                raise UserError(f"--group {name}: no feature {column!r} in the run; it has {known}")
            sequence = sequence_of.get(column)
            if sequence is not None and not set(sequence.features) <= set(columns):
                raise UserError(
                    f"--group {name}: {column!r} is a column of the sequence {sequence.name!r}, whose events must stay "
                    f"whole; name all of {', '.join(sequence.features)}"
                )
        groups[name] = list(columns)
    return groups


def permutation_importance(
    model: CTRModel,
    rows: SplitRows,
    groups: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Importance]:
    """Return the importance of each group of columns, the most important first.

    Args:
        model: in eval mode.
        rows: at least one of each class for an AUC.
        groups: name -> features that are exchanged together.
        seeds: of the permutations; one of each for each group.
        progress: told after each permutation how many are done, and of how many.
    """
    scored = Scored(model, rows)
    base = _measured(scored.logits, rows)
    found: list[Importance] = []
    for place, (name, columns) in enumerate(groups.items()):
        tasks = list(base)
        one = Importance(name, list(columns), {task: [] for task in tasks}, {task: [] for task in tasks})
        for seed in seeds:
            order = np.random.default_rng((seed, place)).permutation(rows.block.num_rows)
            here = _measured(scored.exchanged(columns, order), rows)
            for task in tasks:
                one.auc[task].append(base[task]["auc"] - here[task]["auc"])
                one.logloss[task].append(here[task]["logloss"] - base[task]["logloss"])
            progress(place * len(seeds) + seeds.index(seed) + 1, len(groups) * len(seeds))
        found.append(one)
    return sorted(found, key=lambda one: -one.total)


class Scored:
    """Scores rows again and again with some columns exchanged, and does over only what the exchange changes.

    The input vectors are kept. A feature that has only its own field moves with its dims of them; a column or target of
    a sequence goes through tables and encoder anew.

    Attributes:
        logits: ``(N, T)`` of the rows as they are.
    """

    def __init__(self, model: CTRModel, rows: SplitRows) -> None:
        self.model, self.rows = model, rows
        dense = model.dense
        seen: list[tuple[Tensor, ...]] = []
        domains: list[tuple[Tensor, ...]] = []
        handles = [
            dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)),
            dense.heads.register_forward_pre_hook(lambda _, inputs: domains.append(inputs[1:])),
        ]
        try:
            self.logits = rows.logits(model)
        finally:
            for handle in handles:
                handle.remove()
        kept = len(dense.over_arch.extra_tables) + 1  # a domain may come behind
        self._inputs = [torch.cat(parts) for parts in list(zip(*seen, strict=True))[:kept]]
        self._domain = torch.cat([ids for (ids,) in domains]) if dense.domain is not None else None
        dims = [dense.over_arch.field_dims, *dense.over_arch.extra_tables.values()]
        ends = [np.cumsum([0, *of_fields]).tolist() for of_fields in dims]
        pairs = dense.histories.pairs() if dense.histories is not None else []
        encoded = {feature.name for history, _ in pairs for feature in (*history.columns, *history.targets)}
        if dense.vectors is not None:
            encoded |= {*dense.vectors.names}  # an over-arch's further inputs mix the fields that are made
        if dense.domain is not None:
            encoded |= {dense.domain.name}
        self._fields = {
            name: [slice(end[place], end[place + 1]) for end in ends]
            for place, name in enumerate(dense.field_names)
            if name not in encoded and name in rows.schema.feature_names
        }

    def exchanged(self, columns: Sequence[str], order: np.ndarray) -> np.ndarray:
        """Return the logits ``(N, T)`` of the rows with the columns of rows ``order (N,)``."""
        if not set(columns) <= set(self._fields):
            return self.rows.exchanged(columns, order).logits(self.model)
        dense, logits, taken = self.model.dense, [], torch.from_numpy(order)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_ROWS):
                inputs = [x[start : start + BATCH_ROWS].clone() for x in self._inputs]
                for column in columns:
                    for x, whole, field in zip(inputs, self._inputs, self._fields[column], strict=True):
                        x[:, field] = whole[taken[start : start + BATCH_ROWS], field]
                domain = None if self._domain is None else self._domain[start : start + BATCH_ROWS]
                logits.append(logits_of(inputs, dense.over_arch, dense.heads, dense.bf16, domain))
        return torch.cat(logits).numpy()


def _measured(logits: np.ndarray, rows: SplitRows) -> dict[str, dict[str, float]]:
    found = {}
    for i, task in enumerate(rows.schema.labels):
        if rows.schema.number(task) is not None:
            continue
        parts = (logits[:, i], rows.block.labels[:, i], of_task(rows.block.weights, i))
        found[task] = {"auc": auc(*parts), "logloss": logloss(*parts)}
    return found
