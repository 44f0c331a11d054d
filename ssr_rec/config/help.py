"""Lists every key of a config with its type, default and meaning, by section: what ``train.py --help`` ends with."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssr_rec.common.settings import Settings
from ssr_rec.config.losses import LossConfig
from ssr_rec.config.run import RunConfig
from ssr_rec.config.sequences import SequenceConfig
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.sequences.choice import EncoderConfig

WIDTH = 110


def config_help() -> str:
    """Return the text, one paragraph a section."""
    parts = ["Any config key can be set as --section.key=value:", _section("", RunConfig)]
    for name, field in RunConfig.model_fields.items():
        if name not in ("over_arch", "sequences") and (model := _model(field.annotation)) is not None:
            parts.append(_section(name, model))
    for model in get_args(get_args(OverArchConfig)[0]):
        kind = model.model_fields["name"].default
        parts.append(_section("over_arch", model, f"over_arch, with over_arch.name={kind}"))
    parts.append(_section("sequences.NAME", SequenceConfig))
    for model in get_args(get_args(EncoderConfig)[0]):
        kind = model.model_fields["name"].default
        parts.append(_section("sequences.NAME.encoder", model, f"sequences.NAME, with encoder.name={kind}"))
    for model in get_args(get_args(LossConfig)[0]):
        kind = model.model_fields["name"].default
        parts.append(_section("train.losses.LABEL", model, f"train.losses.LABEL, with name={kind}"))
    return "\n\n".join(parts)


def _section(prefix: str, model: type[BaseModel], title: str | None = None) -> str:
    lines = [f"{title or prefix or 'top level'}:"]
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = _model(field.annotation)
        if inner is not None and prefix:
            lines.append(_section(key, inner).replace("\n", "\n  "))
        elif inner is None and not (not prefix and name == "over_arch"):
            text = f"--{key} ({_type(field.annotation)}, default {_default(field)})"
            meaning = f": {' '.join(field.description.split())}" if field.description else ""
            lines.append(textwrap.fill(text + meaning, WIDTH, initial_indent="  ", subsequent_indent="      "))
    return "\n".join(lines)


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if annotation is type(None):
        return "null"
    if arguments and origin in (list, dict, tuple):
        return f"{origin.__name__} of {' to '.join(_type(one) for one in arguments)}"
    if arguments and (origin is Union or "Union" in str(origin)):
        return " | ".join(_type(one) for one in arguments)
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value).strip("'")
