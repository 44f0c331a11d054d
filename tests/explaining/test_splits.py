"""Which splits a run was trained on before the one that is asked about."""

from types import SimpleNamespace

import pytest

from ssr_rec.explaining.explanation import _splits


def restored(days, names):
    schema = SimpleNamespace(days=SimpleNamespace(names=names), splits=dict.fromkeys(names))
    return SimpleNamespace(schema=schema, config=SimpleNamespace(data=SimpleNamespace(days=days)))


@pytest.mark.parametrize(("split", "trained"), [("10", ["8", "9"]), (None, ["8", "9", "10"]), ("8", ["9", "10", "11"])])
def test_days_before_are_those_of_the_datasets_order_not_of_the_alphabet(split, trained):
    assert _splits(restored("all", ["8", "9", "10", "11"]), split) == (trained, split or "11")
