"""A warm start on a dataset whose number labels are scaled otherwise says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ssr_rec.checkpointing.warm_rows import Here, _check_numbers
from tests.model.test_losses import SCHEMA, SECONDS


def test_labels_of_another_scale_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    there, scaled = Here(Path(), SCHEMA), SECONDS.model_copy(update={"std": 31.0})
    with caplog.at_level(logging.WARNING):
        _check_numbers(
            "warm_start=x", there, Here(Path(), SCHEMA.model_copy(update={"numbers": [SECONDS.widened(-1, 900)]}))
        )
        assert not caplog.records
        _check_numbers("warm_start=x", there, Here(Path(), SCHEMA.model_copy(update={"numbers": [scaled]})))
    assert "'watch_s' in units of mean 20 and deviation 30, this dataset has 20 and 31" in caplog.text
