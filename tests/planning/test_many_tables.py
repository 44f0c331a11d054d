"""Five hundred tables: planned fast enough, and evenly."""

import random
import time
from dataclasses import replace

import pytest

from ssr_rec.planning.remedies import plan_case
from tests.planning.small import make_case


@pytest.mark.slow
def test_five_hundred_tables_are_planned_in_half_a_minute() -> None:
    rng = random.Random(0)
    rows = {f"table_{i}": int(10 ** rng.uniform(2, 7.5)) + i for i in range(500)}
    dims = {name: rng.choice([16, 32, 64, 128]) for name in rows}
    lengths = {name: rng.uniform(2, 40) for name in rows if rng.random() < 0.2}
    case = make_case(rows, ["--train.batch_size=65536"], nodes=2, per_node=8, lengths=lengths)
    config = case.config.model_copy(update={"embeddings": case.config.embeddings.model_copy(update={"dims": dims})})
    started = time.process_time()  # of one core: on a busy machine the clock says little
    planned = plan_case(replace(case, config=config))
    assert time.process_time() - started < 30
    assert planned.fits
    assert planned.estimate.imbalance < 1.1
