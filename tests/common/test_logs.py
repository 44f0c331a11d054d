"""What is kept out of the progress lines."""

import logging
import warnings

import pytest

from ssr_rec.common.logs import quiet


def test_chatter_of_the_planner_is_left_out_and_other_warnings_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "filters", [])
    with warnings.catch_warnings():
        quiet()
        quiet()
    logging.warning("Sharding spec not found for model.tables.user")
    logging.warning("Something else")
    assert caplog.messages == ["Something else"]
    assert len(logging.getLogger().filters) == 1
