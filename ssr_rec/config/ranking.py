"""Names the measures of rankings within groups that ``train.ranking_metrics`` may ask for."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

PATTERN = r"^(mrr|(ndcg|hit)@[1-9][0-9]{0,3})$"

RankingMeasure = Annotated[str, Field(pattern=PATTERN)]
"""``mrr``, ``ndcg@K`` or ``hit@K``, K at most 9999."""


def is_ranking(name: str) -> bool:
    """Return whether a measure is one of a ranking."""
    return re.fullmatch(PATTERN, name) is not None
