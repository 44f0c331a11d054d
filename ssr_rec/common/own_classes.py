"""Imports a class or function of the user's own, which a config names by ``MODULE:NAME``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import first_problem

OWN_CLASS = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""Pattern of an import path."""
T = TypeVar("T")


def own_class(path: str, base: type[T], what: str) -> type[T]:
    """Return the class at ``MODULE:CLASS``.

    Args:
        base: what it must be a subclass of.
        what: what messages call it.

    Raises:
        UserError: no such module or class, another kind of class, or one without ``settings_class``.
    """
    found = _imported(path, what)
    if not (isinstance(found, type) and issubclass(found, base)):
        package = base.__module__.rpartition(".")[0]
        raise UserError(f"{what} {path}: must be a subclass of {package}.{base.__name__}")
    if not hasattr(found, "settings_class"):
        raise UserError(f"{what} {path}: must have a settings_class, a pydantic model of its settings")
    return found


def own_function(path: str, what: str) -> Callable[..., Any]:
    """Return the function at ``MODULE:FUNCTION``.

    Raises:
        UserError: no such module or function, or nothing that can be called.
    """
    found = _imported(path, what)
    if not callable(found):
        raise UserError(f"{what} {path}: {type(found).__name__} is no function")
    function: Callable[..., Any] = found
    return function


def _imported(path: str, what: str) -> Any:
    """Return what is at ``MODULE:NAME``; errors as in ``own_function``."""
    where, _, name = path.partition(":")
    try:
        module = import_module(where)
    except ImportError as error:
        raise UserError(f"{what} {path}: cannot import {where} ({error}); is its folder in PYTHONPATH?") from None
    if not hasattr(module, name):
        raise UserError(f"{what} {path}: {where} has no {name}")
    return getattr(module, name)


def own_settings(found: Any, values: dict[str, Any], name: str) -> BaseModel:
    """Return the settings of a class with ``settings_class``.

    Raises:
        UserError: values that it refuses; ``name`` leads the message.
    """
    try:
        settings: BaseModel = found.settings_class.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: settings.{first_problem(error)}") from None
    return settings
