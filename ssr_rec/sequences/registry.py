"""Lists the encoders that a config can name, and makes one from its settings."""

from __future__ import annotations

from typing import Any

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import own_class, own_settings
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
    encoder_class: Any = own_class(settings.path, SequenceEncoder, "encoder")
    values: dict[str, Any] = dict(settings.settings)
    if settings.fields is not None:
        values.setdefault("fields", settings.fields)
    own = own_settings(encoder_class, values, f"encoder {settings.path}")
    encoder: SequenceEncoder = encoder_class(event_dim, target_dim, field_dim, max_length, own)
    if not isinstance(getattr(encoder, "out_fields", None), int):
        raise UserError(f"encoder {settings.path} has no out_fields: call set_output in its constructor")
    return encoder
