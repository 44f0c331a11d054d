"""Defines what becomes of a learning rate after the warm-up."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings

ScheduleName = Literal["constant", "linear", "cosine", "polynomial", "step"]
KEYS: dict[ScheduleName, tuple[str, ...]] = {
    "constant": (),
    "linear": ("steps", "end"),
    "cosine": ("steps", "end"),
    "polynomial": ("steps", "end", "power"),
    "step": ("steps", "factor"),
}
"""The keys that each schedule reads."""


class ScheduleConfig(Settings):
    """Configures how a learning rate falls, by the number of steps since the warm-up.

    It is a function of the step alone: a run that is resumed goes on with the rates of an uninterrupted one.
    """

    name: ScheduleName = Field("constant", description="linear, cosine and polynomial fall to end, step by factors")
    steps: int | None = Field(
        None, ge=1, description="over which the rate falls, after the warm-up; of step: between two falls"
    )
    end: float = Field(0.0, ge=0, le=1, description="share of the rate that is left in the end, and after it")
    power: float = Field(2.0, gt=0, description="of polynomial: (1 - t / steps) ** power")
    factor: float = Field(0.1, gt=0, lt=1, description="of step: what each fall multiplies the rate with")

    @model_validator(mode="after")
    def _of_its_name(self) -> ScheduleConfig:
        defaults: dict[str, Any] = {name: field.default for name, field in type(self).model_fields.items()}
        for key in ("steps", "end", "power", "factor"):
            if key not in KEYS[self.name] and getattr(self, key) != defaults[key]:
                readers = " or ".join(name for name, keys in KEYS.items() if key in keys)
                value = getattr(self, key)
                raise UserError(f"{key}={value}: {self.name} does not read it; remove it, or use {readers}")
        if self.name != "constant" and self.steps is None:
            raise UserError(f"{self.name} needs steps: over how many the rate falls (the console counts a run's steps)")
        return self
