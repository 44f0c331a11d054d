"""Lists the encoders that a config can name, and makes one from its settings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import first_problem
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.din import DIN
from ssr_rec.sequences.hstu import HSTU
from ssr_rec.sequences.pool import Pool
from ssr_rec.sequences.settings import CustomEncoderConfig, EncoderSettings
from ssr_rec.sequences.target_attention import TargetAttention
from ssr_rec.sequences.transformer import Transformer

ENCODERS: dict[str, type[SequenceEncoder]] = {
    "pool": Pool,
    "din": DIN,
    "target_attention": TargetAttention,
    "transformer": Transformer,
    "hstu": HSTU,
}


def build_encoder(
    event_dim: int, target_dim: int, field_dim: int, max_length: int, settings: EncoderSettings
) -> SequenceEncoder:
    """Make the encoder that the settings name.

    Raises:
        UserError: an impossible size, or a class of one's own that is not there, is no ``SequenceEncoder``, or does
            not take these settings; the message has one line.
    """
    if not isinstance(settings, CustomEncoderConfig):
        return ENCODERS[settings.name](event_dim, target_dim, field_dim, max_length, settings)
    encoder_class = _import(settings.path)
    values: dict[str, Any] = dict(settings.settings)
    if settings.fields is not None:
        values.setdefault("fields", settings.fields)
    try:
        own = encoder_class.settings_class.model_validate(values)
    except ValidationError as error:
        raise UserError(f"encoder {settings.path}: settings.{first_problem(error)}") from None
    encoder = encoder_class(event_dim, target_dim, field_dim, max_length, own)
    if not isinstance(getattr(encoder, "out_fields", None), int):
        raise UserError(f"encoder {settings.path} has no out_fields: call set_output in its constructor")
    return encoder


def _import(path: str) -> type[SequenceEncoder]:
    where, _, name = path.partition(":")
    try:
        module = import_module(where)
    except ImportError as error:
        raise UserError(f"encoder {path}: cannot import {where} ({error}); is its folder in PYTHONPATH?") from None
    if not hasattr(module, name):
        raise UserError(f"encoder {path}: {where} has no {name}")
    found = getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, SequenceEncoder)):
        raise UserError(f"encoder {path}: must be a subclass of ssr_rec.sequences.SequenceEncoder")
    if not hasattr(found, "settings_class"):
        raise UserError(f"encoder {path}: must have a settings_class, a subclass of EncoderSettings")
    return found
