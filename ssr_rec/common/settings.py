"""Defines the frozen, strict base of every component's config: unknown keys and wrong types are refused."""

from datetime import date
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Widths = list[Annotated[int, Field(ge=1)]]
"""Of dense layers, one after another."""
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def first_problem(error: ValidationError) -> str:
    """Return the first complaint of a pydantic error as ``where: what (got value)``, on one line.

    A whole section is not repeated, and where there is no place, as in a check of the top level, none is named.
    """
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    # pydantic repeats an unknown tag in its message, however long it is.
    what = problem["msg"] if len(problem["msg"]) <= 600 else f"{problem['msg'][:300]} ... {problem['msg'][-300:]}"
    if problem["type"] == "string_type" and isinstance(problem["input"], (int, float, date)):
        what += "; quote it"
    if problem["type"] == "value_error":  # our own words, which say themselves what of a whole section is wrong
        what = what.removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], dict) else f" (got {str(problem['input'])[:80]!r})"
    return " ".join(f"{where and where + ': '}{what}{got}".split())


class Settings(BaseModel):
    """Is the base of all configs and of the schema.

    Strict on purpose: ``"8"`` is not an int and an unknown key is an error, because a silently
    coerced or ignored setting is a wrong experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
