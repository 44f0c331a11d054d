"""The losses that compare the rows of a group, such as a request, with one another, without a loop over groups.

Both compare the positive rows of a group with its other rows that are in the batch. A group without a positive or
without a negative row says nothing of their order and adds nothing, so that a row alone adds nothing either.

A row counts by its weight wherever it stands: a row of weight 2 is the row twice, one of weight 0 (a label that was not
observed) is not there.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ssr_rec.common.errors import UserError
from ssr_rec.config.losses import PairwiseConfig, SoftmaxConfig
from ssr_rec.model.losses.base import TaskLoss


class RankingLoss(TaskLoss):
    """Computes ``(1 - c) * ranking + c * cross-entropy`` of each row; the ranking loss of a negative row is 0.

    A ranking loss alone leaves open what is added to all logits of a group, so that its scores are no probabilities.
    With a share ``c`` of cross-entropy they are (Sculley, "Combined Regression and Ranking", KDD 2010; Li et al.,
    "Click-through Prediction for Advertising in Twitter Timeline", KDD 2015).
    """

    within_groups: ClassVar[bool] = True

    def forward(  # type: ignore[override]
        self, logits: Tensor, labels: Tensor, weights: Tensor | None, groups: Tensor | None
    ) -> Tensor:
        """Return the loss (B,) of each row, in nats.

        Args:
            logits: (B,).
            labels: (B,) 0 or 1.
            weights: (B,), 0 or more; None: all rows count the same.
            groups: (B,) int64 the group of each row, from 0 and below B.

        Raises:
            UserError: without groups.
        """
        if groups is None:
            raise UserError(f"{self.settings.name}: the rows have no groups; prepare the log with together")
        there = torch.ones_like(labels) if weights is None else weights
        positive, negative = labels * there, (1 - labels) * there
        both = _sums(negative, groups) > 0  # among positive rows alone there is no order to learn
        ranking = self.ranking(logits, (positive > 0) & both, torch.where(both, there, 0.0), groups)
        share = self.settings.cross_entropy
        if not share:
            return ranking
        return (1 - share) * ranking + share * binary_cross_entropy_with_logits(logits, labels, reduction="none")

    @abstractmethod
    def ranking(self, logits: Tensor, positive: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        """Return the ranking loss (B,), 0 of rows that are not ``positive``.

        Args:
            logits: (B,).
            positive: (B,) the positive rows of groups that have negatives, too.
            weights: (B,), 0 in groups without a negative.
            groups: (B,).
        """


class Softmax(RankingLoss):
    """Computes ``-ln`` of the softmax of each positive row over its group.

    Bruch et al., "An Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank with Binary Relevance", ICTIR
    2019; of one positive a group it is ListNet's (Cao et al., ICML 2007).
    """

    settings_class = SoftmaxConfig

    def ranking(self, logits: Tensor, positive: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        # What is not there may hold anything, and must not reach the gradient.
        x = torch.where(weights > 0, logits, 0.0)
        seen = torch.where(weights > 0, x, -torch.inf).detach()
        highest = torch.full_like(x, -torch.inf).scatter_reduce(0, groups, seen, "amax")[groups]
        highest = torch.where(weights > 0, highest, 0.0)
        sums = _sums(weights * (x - highest).exp(), groups)
        return torch.where(positive, highest + torch.where(positive, sums, 1.0).log() - x, 0.0)


class Pairwise(RankingLoss):
    """Computes of each positive row the mean of ``ln(1 + exp(negative - positive))`` over the negatives of its group.

    RankNet (Burges et al., ICML 2005) and BPR (Rendle et al., UAI 2009). Each positive row counts once, however many
    negatives there are, so that long groups do not outweigh the others. It takes memory for every pair of a positive
    and a negative row of one group.
    """

    settings_class = PairwiseConfig

    def ranking(self, logits: Tensor, positive: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        negative = torch.where(positive, 0.0, weights)
        of_group = _sums(negative, groups)
        # Negatives group by group, so that those of a positive row are a stretch.
        rows = torch.nonzero(negative > 0).squeeze(1)
        rows = rows[torch.argsort(groups[rows], stable=True)]
        number = torch.zeros_like(groups).index_add(0, groups[rows], torch.ones_like(rows))
        first = number.cumsum(0) - number
        left = torch.nonzero(positive).squeeze(1)
        pairs = number[groups[left]]
        starts = torch.repeat_interleave(first[groups[left]] - (pairs.cumsum(0) - pairs), pairs)
        right = rows[starts + torch.arange(len(starts), device=logits.device)]
        left = torch.repeat_interleave(left, pairs)
        losses = softplus(logits[right] - logits[left]) * (negative[right] / of_group[left])
        return torch.zeros_like(logits).index_add(0, left, losses)


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """Return the sum (B,) of ``values`` (B,) over the group of each row."""
    return torch.zeros_like(values).index_add(0, groups, values)[groups]
