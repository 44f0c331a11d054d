"""Decides whether two configs describe the same run, so that one may go on with the other's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig

MAY_DIFFER = (
    "name", "runs", "resume", "warm_start", "warm_start_optimizer", "device", "sharding", "checkpoint", "track",
    "data.path", "data.synthetic_root", "data.prefetch", "train.epochs", "train.max_steps", "train.patience",
    "train.eval_batch_size", "train.log_every", "train.stall_timeout_s", "train.skip_bad_steps", "train.max_loss",
    "train.metrics", "train.metrics_rows", "train.pipeline",
)  # fmt: skip
"""Config keys that a resumed run may change: they decide when it ends or how it runs, not what the next step does."""


MAY_NOT_DIFFER = ("sharding.qcomms",)
"""Those among them that do."""


def check_same_run(config: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run whose next step would not be this config's.

    A key that the other run does not have is newer than it and had what is now its default.

    Raises:
        UserError: names the keys that differ with both values.
    """
    mine, theirs, defaults = flat_values(config), flat_values(other), flat_values(RunConfig().model_dump(mode="json"))
    theirs |= {key: defaults[key] for key in mine if key in defaults and key not in theirs}
    for key in sorted({*mine, *theirs}):
        allowed = _is_among(MAY_DIFFER, key) and not _is_among(MAY_NOT_DIFFER, key)
        if not allowed and mine.get(key) != theirs.get(key):
            pairs = ((theirs, other), (mine, config))
            # An empty mapping is a value of its own here, and a full one is its keys': show it whole.
            there, here = (
                " ".join(str(flat[key] if key in flat else _at(whole, key)).split())[:200] for flat, whole in pairs
            )
            raise UserError(
                f"{where}: that run had {key}={there}, this one has {here}; give the new "
                "run another --name (and --warm_start to begin with the old weights), or use the old config"
            )


MAKES_ANOTHER_JOB = ("data.path", "train.epochs", "train.max_steps", "train.patience", "train.eval_batch_size")
"""Of the keys that may differ, those with which a finished run would have ended elsewhere."""


def is_same_job(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a finished run is what this config asks for, so that its report is the answer."""
    try:
        check_same_run(config, other, "")
    except ValueError:
        return False
    mine, theirs = flat_values(config), flat_values(other)
    return all(mine.get(key) == theirs.get(key) for key in MAKES_ANOTHER_JOB if key in theirs)


def _is_among(names: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def flat_values(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` of a nested mapping; an empty mapping is a value of its own."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
