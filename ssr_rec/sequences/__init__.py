"""Sequence encoders turn the events of a history into more fields of the input vector, in pure tensor code.

    encoder = DIN(event_dim=32, target_dim=32, field_dim=16, max_length=50, settings=DINConfig())
    fields = encoder(events, lengths, target)     # (N, E), (B,), (B, Q) -> (B, encoder.out_fields * D)

``SequenceEncoder`` is the contract. The settings of all encoders are in ``settings.py``, which imports no torch;
their ``name`` is the key in ``ENCODERS`` (``registry.py``). ``build_encoder`` also takes a class of one's own.

Shapes, here and in every docstring of the package:

    B  rows of a batch                   D  embedding dim of a field
    N  events of all rows together       E  dims of an event
    L  most events of a row              Q  dims of the target
    m  fields that an encoder adds       A  attention heads x dims of a head
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "base": ("SequenceEncoder",),
    "choice": ("EncoderConfig",),
    "din": ("DIN",),
    "hstu": ("HSTU",),
    "jagged": ("unpad",),
    "pool": ("Pool",),
    "registry": ("ENCODERS", "build_encoder"),
    "settings": (
        "CustomEncoderConfig",
        "DINConfig",
        "EncoderSettings",
        "HSTUConfig",
        "PoolConfig",
        "TargetAttentionConfig",
        "TransformerConfig",
    ),
    "target_attention": ("TargetAttention",),
    "transformer": ("Transformer",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that reading a config needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
