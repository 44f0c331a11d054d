"""Parameters of tests of which make test runs one case, and .ci/run all."""

from typing import Any

import pytest


def one_quick(first: Any, *others: Any) -> list[Any]:
    """The first case as it is, the others marked slow; a case of several arguments is a tuple."""
    return [first, *(slow(other) for other in others)]


def slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
