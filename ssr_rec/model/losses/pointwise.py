"""The losses of single rows that a config can name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ssr_rec.common.errors import UserError
from ssr_rec.config.losses import CrossEntropyConfig, FocalConfig, LogNormalConfig, MSEConfig
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.metrics.links import Link
from ssr_rec.model.losses.base import TaskLoss


class CrossEntropy(TaskLoss):
    """Computes binary cross-entropy in nats, perhaps with smoothed labels."""

    settings_class = CrossEntropyConfig

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        targets = labels * (1 - smoothing) + smoothing / 2 if smoothing else labels
        return binary_cross_entropy_with_logits(logits, targets, reduction="none")


class Focal(TaskLoss):
    """Computes ``-a_t (1 - p_t)^gamma ln p_t``, p_t being the probability of the label that the row has.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Its probabilities are not calibrated: a row that is
    predicted well enough adds nothing.
    """

    settings_class = FocalConfig

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        towards = (2 * labels - 1) * logits
        # As a power of a probability the gradient would be infinite where it is 0 and gamma below 1.
        losses = -torch.exp(self.settings.gamma * logsigmoid(-towards)) * logsigmoid(towards)
        alpha = self.settings.alpha
        return losses if alpha is None else losses * (alpha * labels + (1 - alpha) * (1 - labels))


class MSE(TaskLoss):
    """Computes the squared error of a number, in units of the label's variance in training.

    The head predicts the standardised label, so that any unit trains alike and losses of several tasks compare: 1 is
    the loss of predicting the mean.
    """

    settings_class = MSEConfig
    kinds = ("number",)
    is_squared = True

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.number is not None
        return (logits - (labels - self.number.mean) / self.number.std).square()

    def link(self) -> Link:
        assert self.number is not None
        return Link(function="identity", scale=self.number.std, shift=self.number.mean)


class LogNormal(TaskLoss):
    """Fits a log-normal distribution to ``1 + y``: the head predicts the mean of ln(1 + y), its variance is learned.

    Of one variance for all rows, the likelihood's best means are those of least squares, whatever the variance, and its
    best variance is the mean square of what they leave. So a row's loss is the squared error of the standardised
    ln(1 + y), and the variance is fitted beside it, by a term of the likelihood whose value is taken off again. The
    prediction is the mean of the distribution, ``exp(mu + variance / 2) - 1`` (Johnson, Kotz, Balakrishnan, "Continuous
    Univariate Distributions" 1, ch. 14), not ``exp(mu) - 1``, which is its median and too low on average.
    """

    settings_class = LogNormalConfig
    kinds = ("number",)
    is_squared = True
    RATE = 10.0
    """By how much the variance moves faster than other parameters, which start nearer to where they end."""

    def __init__(self, settings: LogNormalConfig, number: NumberLabel | None = None) -> None:
        super().__init__(settings, number)
        if number is None or number.log_mean is None or number.log_std is None:
            low = "" if number is None else f", and {number.name!r} goes down to {number.low:g}"
            raise UserError(f"log_normal: it is for labels from 0 on{low}; use mse")
        self.log_mean, self.log_std = number.log_mean, number.log_std
        self.log_variance = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        squares = (logits - (labels.log1p() - self.log_mean) / self.log_std).square()
        log_variance = self.RATE * self.log_variance
        fit = (squares.detach() * torch.exp(-log_variance) + log_variance) / 2
        return squares + (fit - fit.detach())

    def link(self) -> Link:
        variance = self.log_std**2 * float(torch.exp(self.RATE * self.log_variance.detach().double()))
        middle = self.log_mean + variance / 2
        return Link(function="exp", inner_scale=self.log_std, inner_shift=middle, shift=-1.0, least=0.0)
