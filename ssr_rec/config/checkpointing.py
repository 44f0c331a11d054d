"""Defines the ``checkpoint`` section of a config."""

from __future__ import annotations

from pydantic import Field

from ssr_rec.common.settings import Settings


class CheckpointConfig(Settings):
    every_steps: int | None = Field(None, ge=1, description="steps between training checkpoints; None: minutes decide")
    every_minutes: float | None = Field(
        10.0, gt=0, description="minutes between training checkpoints, written at a progress row; None: steps decide"
    )
    keep: int = Field(2, ge=1, description="training checkpoints kept, the latest; the best weights are kept besides")
    asynchronous: bool = Field(True, description="write in the background from a copy in host memory")

    @property
    def is_on(self) -> bool:
        """Return whether a run can be resumed; the best weights are always saved."""
        return self.every_steps is not None or self.every_minutes is not None
