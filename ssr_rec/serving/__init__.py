"""Serving restores a trained model, exports it and scores raw rows.

from ssr_rec.serving import load
probabilities = load("artifacts/ssr_s").predict(rows)["click"]
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the scorer when it is first asked for, as the rest of the package does without it."""
    if name in ("load", "Scorer"):
        from ssr_rec.serving import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
