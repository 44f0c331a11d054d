"""Computes AUC, GAUC, LogLoss, NE and calibration of a fold, exact for any number of ranks.

Every rank collects its own predictions, ``gather_predictions`` brings them to rank 0, and plain NumPy functions do the
rest in float64. The measures rank or average single rows, so they do not depend on how rows were dealt to ranks.
Rank 0 holds the fold in host memory: per row 8 bytes for the group, 8 for the key of its inputs and 5 for each task
(float32 logit, uint8 label), and while it ranks about 65 more.

Shapes: ``N`` rows of the fold, ``n`` rows on this rank, ``T`` tasks. Labels are 0 or 1 in any dtype.

A row may have a weight, 0 or more: a row of weight 2 counts as the row twice, one of weight 0 as if it were not there.
Pairs of rows count by the product of their weights. Whole weights are counted in integers, so that AUC and GAUC are
those of the repeated rows to the last bit; sums of losses are rounded once, so that they do not depend on the order.

Scores are logits throughout. In float32 a sigmoid rounds every logit above about 17 to 1.0, and AUC on probabilities
would count those rows as ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ssr_rec.common.errors import UserError

MOST_COUNTED = 2**31
"""Sum of whole weights below which twice the number of pairs fits an int64."""
ROWS_PER_GATHER = 1_048_576
"""Rows that one collective takes from each rank; bounds the receive buffers on rank 0's device."""


class GroupAUC(NamedTuple):
    value: float
    """Impression-weighted mean of the per-group AUC; nan when no group counts."""
    groups: int
    """Groups that count: those with both classes."""
    rows: float
    """Rows in those groups, each counting by its weight; an int where weights are whole."""


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the area under the ROC curve: the share of (positive, negative) pairs in order, ties counting half.

    Args:
        scores: ``(N,)`` any increasing function of the probability, best the logits.
        labels: ``(N,)``.
        weights: ``(N,)``; None: all rows count the same.

    Returns:
        nan when a class is missing or a score is nan.

    Raises:
        UserError: shapes differ, a label is neither 0 nor 1, or a weight is negative or not finite.
    """
    scores, positive, weights = checked_rows(scores, labels, weights)
    if not len(scores) or np.isnan(scores).any():
        return math.nan
    order = np.argsort(scores)
    weights = None if weights is None else weights[order]
    return float(_auc_of_sorted_groups(scores[order], positive[order], np.zeros(1, np.int64), weights)[0])


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> GroupAUC:
    """Return the mean AUC within a group (a user, say), weighted by the group's rows, over groups with both classes.

    Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017. With weights of rows, a group's AUC
    is the weighted one, and the group counts by the sum of its rows' weights.

    Args:
        scores: ``(N,)`` as in ``auc``.
        labels: ``(N,)``.
        groups: ``(N,)`` the group of each row, in any order.
        weights: ``(N,)`` as in ``auc``.

    Raises:
        UserError: as in ``auc``.
    """
    of_groups, rows = auc_of_groups(scores, labels, groups, weights)
    counts = ~np.isnan(of_groups)
    num_rows = rows[counts].sum().item()
    value = float((of_groups[counts] * rows[counts]).sum() / num_rows) if num_rows else math.nan
    return GroupAUC(value, int(counts.sum()), num_rows)


def auc_of_groups(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(G,)`` AUC, nan without both classes, and ``(G,)`` rows of every group; none at all if a score is nan.

    Rows count by their weights, and groups of rows without any are left out. Arguments and errors as in ``gauc``.
    """
    groups = np.asarray(groups)
    if groups.shape != np.shape(scores):
        raise UserError(f"groups have shape {groups.shape}, scores {np.shape(scores)}; give each row its group")
    if weights is not None:
        groups = groups[np.asarray(weights) != 0]
    scores, positive, weights = checked_rows(scores, labels, weights)
    if not len(scores) or np.isnan(scores).any():
        return np.empty(0), np.empty(0, np.int64)
    order = np.lexsort((scores, groups))
    groups = groups[order]
    group_start = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    if weights is None:
        rows = np.diff(group_start, append=len(groups))
    else:
        weights = weights[order]
        rows = np.add.reduceat(weights, group_start)
    return _auc_of_sorted_groups(scores[order], positive[order], group_start, weights), rows


def _auc_of_sorted_groups(
    scores: np.ndarray, positive: np.ndarray, group_start: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """Return ``(G,)`` AUC of the groups of rows that start at ``group_start (G,)``, sorted by score within a group.

    Pairs of rows and of whole weights are counted in int64, so the result does not depend on the order of tied rows.
    """
    # A tie is a run of equal scores within a group; all its rows have the same negatives below them.
    starts_tie = np.concatenate(([True], scores[1:] != scores[:-1]))
    starts_tie[group_start] = True
    tie_start = np.flatnonzero(starts_tie)
    first_tie = np.searchsorted(tie_start, group_start)
    ties_in_group = np.diff(first_tie, append=len(tie_start))

    if weights is None:
        positives = np.add.reduceat(positive, tie_start, dtype=np.int64)
        negatives = np.diff(tie_start, append=len(scores)) - positives
    else:
        positives = np.add.reduceat(np.where(positive, weights, 0), tie_start)
        negatives = np.add.reduceat(np.where(positive, 0, weights), tie_start)
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[first_tie], ties_in_group)

    twice_right_pairs = np.add.reduceat(positives * (2 * below + negatives), first_tie)
    pairs = np.add.reduceat(positives, first_tie) * np.add.reduceat(negatives, first_tie)
    return np.divide(twice_right_pairs, 2 * pairs, out=np.full(len(pairs), math.nan), where=pairs > 0)


def logloss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean binary cross-entropy in nats; exact for extreme logits; nan without rows.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)``.
        weights: ``(N,)`` as in ``auc``: the mean is over the sum of weights.

    Raises:
        UserError: as in ``auc``.
    """
    logits, positive, weights = checked_rows(logits, labels, weights)
    if not len(logits):
        return math.nan
    wrong_way = np.where(positive, -logits.astype(np.float64), logits)
    losses = np.logaddexp(0.0, wrong_way)
    return float(losses.mean()) if weights is None else math.fsum(losses * weights) / math.fsum(weights)


def ne(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return normalised entropy: logloss over that of always predicting the fold's own rate; below 1 is better.

    He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014. nan when one class is
    missing. Arguments and errors as in ``logloss``; rate and logloss are both weighted.
    """
    _, positive, kept = checked_rows(logits, labels, weights)
    if kept is None:
        rate = float(positive.mean()) if len(positive) else 0.0
    else:
        rate = math.fsum(kept[positive]) / math.fsum(kept) if len(kept) else 0.0
    if not 0.0 < rate < 1.0:
        return math.nan
    return logloss(logits, labels, weights) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def calibration(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean predicted probability over the mean label; 1 is calibrated; nan without a positive row.

    Arguments and errors as in ``logloss``; both means are weighted.
    """
    logits, positive, weights = checked_rows(logits, labels, weights)
    if not positive.any():
        return math.nan
    # exp(-softplus(-x)) is the sigmoid without overflow at either end.
    predicted = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    if weights is None:
        return float(predicted.sum() / positive.sum())
    return math.fsum(predicted * weights) / math.fsum(weights[positive])


def checked_rows(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return scores, labels as booleans and weights of the rows that count, once they are known to be rows of a fold.

    Weights are int64 where all are whole and their pairs fit, else float64.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UserError(f"scores have shape {scores.shape}, labels {labels.shape}; both must be (N,)")
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != scores.shape:
            raise UserError(f"weights have shape {weights.shape}, scores {scores.shape}; give each row its weight")
        fit = np.isfinite(weights) & (weights >= 0)
        if not fit.all():
            raise UserError(f"weights must be finite and not negative, got {weights[~fit][0]}")
        counts = weights != 0
        scores, labels, weights = scores[counts], labels[counts], weights[counts]
        if weights.sum() < MOST_COUNTED and (weights == np.floor(weights)).all():
            weights = weights.astype(np.int64)
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise UserError(f"labels must be 0 or 1, got {labels[~(positive | (labels == 0))][0]}")
    return scores, positive, weights


def evaluate_predictions(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    label_names: Sequence[str],
    weights: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Return every measure of every task.

    Args:
        logits: ``(N, T)``.
        labels: ``(N, T)``.
        groups: ``(N,)`` the GAUC group of each row, or None for a dataset without groups.
        label_names: the ``T`` tasks.
        weights: ``(N, T)`` of each row for each task, 0 where it does not count; None: all rows count the same.

    Returns:
        label -> ``auc``, ``gauc``, ``logloss``, ``ne``, ``calibration`` and, as counts, ``gauc_groups`` and
        ``gauc_rows``; the three of GAUC are absent without groups.

    Raises:
        UserError: shapes do not fit, or what ``auc`` refuses.
    """
    if logits.ndim != 2 or logits.shape != labels.shape or logits.shape[1] != len(label_names):
        raise UserError(
            f"logits {logits.shape} and labels {labels.shape} must both be (N, {len(label_names)}) "
            f"for the tasks {', '.join(label_names)}"
        )
    measures: dict[str, dict[str, float]] = {}
    for task, name in enumerate(label_names):
        x, y, w = logits[:, task], labels[:, task], of_task(weights, task)
        found = {"auc": auc(x, y, w), "logloss": logloss(x, y, w), "ne": ne(x, y, w)}
        measures[name] = {**found, "calibration": calibration(x, y, w)}
        if groups is not None:
            value, num_groups, num_rows = gauc(x, y, groups, w)
            measures[name] |= {"gauc": value, "gauc_groups": num_groups, "gauc_rows": num_rows}
    return measures


def of_task(weights: np.ndarray | None, task: int) -> np.ndarray | None:
    """Return a task's column of weights ``(N, T)``, None where there are none."""
    return None if weights is None else weights[:, task]


def with_equal_rows_tied(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the logits with one value for rows of equal inputs, the lowest that one of them has.

    Matrix products round by a row's place in its batch, so that equal rows differ in their last bits. Left so, AUC and
    GAUC of a log with few distinct rows would depend on the batch size and on the number of ranks.

    Args:
        logits: ``(N, T)``.
        rows: ``(N,)`` int64, equal for equal inputs.
    """
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
    if len(starts) in (0, len(rows)):
        return logits
    lowest = np.minimum.reduceat(logits[order], starts, axis=0)
    tied = np.empty_like(logits)
    tied[order] = np.repeat(lowest, np.diff(starts, append=len(rows)), axis=0)
    return tied


def gather_predictions(
    logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Bring the rows of all ranks to rank 0. Collective: every rank calls it, also one without rows.

    Args:
        logits: ``(n, T)``; ``n`` may differ between ranks and be 0. Half precision becomes float32.
        labels: ``(n, T)``; uint8 is cheapest to send.
        groups: ``(n,)``, or None on every rank. Dtypes are the same on all ranks; tensors may lie on any device.

    Returns:
        On rank 0 ``logits (N, T)``, ``labels (N, T)``, ``groups (N,)`` (or None) with the ranks' rows one after the
        other, None on other ranks. Without a process group, this process's rows.
    """
    gathered_logits = gather_rows(logits.float() if logits.itemsize < 4 else logits)
    gathered_labels = gather_rows(labels)
    gathered_groups = None if groups is None else gather_rows(groups)
    if gathered_logits is None or gathered_labels is None:
        return None
    return gathered_logits, gathered_labels, gathered_groups


def gather_rows(rows: torch.Tensor) -> np.ndarray | None:
    """Return the rows of every rank in rank order on rank 0, None elsewhere; each rank has ``(n, ...)`` of its own."""
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return rows.cpu().numpy()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    ranks, is_root = dist.get_world_size(), dist.get_rank() == 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device))
    sizes_of_ranks = [int(size) for size in sizes]

    pieces: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for start in range(0, max(sizes_of_ranks), ROWS_PER_GATHER):
        # Collectives want equal shapes: the longest rank sets the size and the others pad.
        size = min(ROWS_PER_GATHER, max(sizes_of_ranks) - start)
        sent = torch.zeros((size, *rows.shape[1:]), dtype=rows.dtype, device=device)
        mine = rows[start : start + size]
        sent[: len(mine)] = mine
        received = [torch.empty_like(sent) for _ in range(ranks)] if is_root else None
        dist.gather(sent, received)
        for rank, piece in enumerate(received or []):
            # A copy, so that the padding is freed with the buffer.
            pieces[rank].append(piece[: max(0, sizes_of_ranks[rank] - start)].to("cpu", copy=True))
    if not is_root:
        return None
    return torch.cat([piece for of_rank in pieces for piece in of_rank] or [rows.cpu()]).numpy()
