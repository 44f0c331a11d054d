"""ssr_rec trains sharded click-through-rate recommenders with an SSR over-arch (SIGIR'26), and serves them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssr_rec.estimator.classifier import CTRClassifier

__all__ = ["CTRClassifier"]


def __getattr__(name: str) -> Any:
    """Import the estimator when it is first asked for, as reading a config needs none of what it needs."""
    if name == "CTRClassifier":
        from ssr_rec.estimator.classifier import CTRClassifier

        return CTRClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
