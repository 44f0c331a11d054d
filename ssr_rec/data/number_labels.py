"""Describes labels that are numbers, such as seconds watched, and scales them as losses do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssr_rec.common.settings import Settings


class NumberLabel(Settings):
    """Describes a label that is a number.

    Its mean and standard deviation (of the population; 1 where that is 0), and those of ln(1 + y), are of the observed
    ones among the first training rows of the shuffle, as those of dense columns are.
    """

    name: Annotated[str, Field(max_length=1000)]
    mean: float
    std: float = Field(gt=0)
    log_mean: float | None = Field(None, description="None where a label is below 0, but on a day added later")
    log_std: float | None = Field(None, gt=0)
    low: float = Field(description="the least of all rows, whatever their split")
    high: float = Field(description="the greatest of all rows")

    def widened(self, low: float | None, high: float | None) -> NumberLabel:
        """Return the same with further rows from ``low`` to ``high``; None: they have none."""
        found = {"low": self.low if low is None else min(self.low, low)}
        found["high"] = self.high if high is None else max(self.high, high)
        return self.model_copy(update=found)
