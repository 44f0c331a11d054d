"""The frozen, strict base of every component's config: unknown keys and wrong types are refused."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all configs and of the schema.

    Strict on purpose: ``"8"`` is not an int and an unknown key is an error, because a silently
    coerced or ignored setting is a wrong experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
