"""Defines the settings of the sequence encoders, importable without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import OWN_CLASS
from ssr_rec.common.settings import Settings, Share, Widths
from ssr_rec.over_archs.settings import Start, sizes

AttentionDropout = Annotated[Share, Field(description="share of attention weights dropped")]


class EncoderSettings(Settings):
    """Defines what the config of every encoder has."""

    name: str
    fields: int | None = Field(
        default=None,
        ge=1,
        description="fields that the encoder adds to the input vector, made by a linear layer without bias; "
        "null: as many as its own width is, which must be a multiple of the embedding dim",
    )


class PoolConfig(EncoderSettings):
    """Configures pooling of the events, which no target weighs."""

    name: Literal["pool"] = "pool"
    mode: Literal["mean", "sum", "last"] = Field(default="mean", description="last: the most recent event")

    @property
    def label(self) -> str:
        """Return the name that a table shows."""
        return f"{self.mode} pooling"


class DINConfig(EncoderSettings):
    """Configures the activation unit of DIN (Zhou et al., KDD 2018)."""

    name: Literal["din"] = "din"
    hidden: Widths = Field(
        default=[36], min_length=1, description="widths of the activation unit's layers; the last one, of 1, is added"
    )
    activation: Literal["prelu", "dice", "sigmoid", "relu"] = Field(
        default="prelu", description="dice: with the batch's statistics in training (the paper has both it and prelu)"
    )
    softmax: bool = Field(
        default=False, description="weights of a row sum to 1; the paper leaves them, which keeps their intensity"
    )
    dropout: AttentionDropout = 0.0
    initializer: Start = "glorot"

    @property
    def label(self) -> str:
        """Return the name that a table shows, with the unit's widths."""
        return f"DIN {sizes(self.hidden)}"


class TargetAttentionConfig(EncoderSettings):
    """Configures multi-head scaled dot product attention whose only query is the target."""

    name: Literal["target_attention"] = "target_attention"
    num_heads: int = Field(default=2, ge=1, description="attention heads")
    attention_dim: int | None = Field(
        default=None, ge=1, description="dims of all heads together, a multiple of num_heads; null: those of an event"
    )
    layer_norm: bool = Field(
        default=False, description="compare events and target by their LayerNorms, so that fresh embeddings differ too"
    )
    dropout: AttentionDropout = 0.0
    initializer: Start = "glorot"

    @property
    def label(self) -> str:
        """Return the name that a table shows, with heads and their dims."""
        return f"target attention {self.num_heads}x{self.attention_dim or 'E'}{' LN' if self.layer_norm else ''}"


class TransformerConfig(EncoderSettings):
    """Configures the Behavior Sequence Transformer: self-attention over events and the target (Chen et al., 2019)."""

    name: Literal["transformer"] = "transformer"
    dim: int | None = Field(
        default=None,
        ge=1,
        description="width to which linear layers bring events and target; null: as they are, of equal dims",
    )
    positions: Literal["age", "index", "none"] = Field(
        default="age",
        description="what is embedded beside each event; age: time to the row's own, in buckets of half an octave "
        "(the paper's); index: events since, the most recent 1",
    )
    position_dim: int | None = Field(default=None, ge=1, description="dims of that embedding; null: those of a field")
    age_buckets: int = Field(default=64, ge=1, description="buckets of an age; 64 reach 2**32 of its units")
    num_layers: int = Field(default=1, ge=1, description="layers, each attention and feed-forward (1 in the paper)")
    num_heads: int = Field(default=8, ge=1, description="attention heads, a divisor of width + position_dim")
    ffn_ratio: int = Field(default=4, ge=1, description="hidden width of the feed-forward network over its input's")
    output: Literal["target", "mean", "concat"] = Field(
        default="target",
        description="what the last layer gives: the target's vector, the mean of all, or all one after another, "
        "events older than the history zeros (the paper's)",
    )
    dropout: Share = Field(default=0.0, description="share dropped after attention and after feed-forward (.2 there)")
    initializer: Start = "glorot"

    @model_validator(mode="after")
    def _settings_without_effect_are_errors(self) -> TransformerConfig:
        if self.positions == "none" and self.position_dim is not None:
            raise UserError(f"position_dim={self.position_dim} has no effect with positions='none': remove it")
        _only_with_ages(self, "positions", self.positions == "age")
        return self

    @property
    def label(self) -> str:
        """Return the name that a table shows, with layers and heads."""
        return f"transformer {self.num_layers}x{self.num_heads} heads"


class HSTUConfig(EncoderSettings):
    """Configures hierarchical sequential transduction units (Zhai et al., ICML 2024)."""

    name: Literal["hstu"] = "hstu"
    dim: int | None = Field(
        default=None,
        ge=1,
        description="width to which linear layers bring events and target; null: as they are, of equal dims",
    )
    num_layers: int = Field(default=2, ge=1, description="layers")
    num_heads: int = Field(default=2, ge=1, description="attention heads")
    attention_dim: int | None = Field(
        default=None, ge=1, description="dims of queries and keys of one head; null: width / num_heads"
    )
    value_dim: int | None = Field(
        default=None, ge=1, description="dims of values and gates of one head; null: width / num_heads"
    )
    bias: Literal["position_age", "position", "age", "none"] = Field(
        default="position_age", description="relative attention bias: of the distance in events, in time, or both"
    )
    age_buckets: int = Field(default=64, ge=1, description="buckets of a difference of ages, half an octave each")
    dropout: Share = Field(default=0.0, description="share dropped before a layer's last product")
    initializer: Start = "glorot"

    @model_validator(mode="after")
    def _settings_without_effect_are_errors(self) -> HSTUConfig:
        _only_with_ages(self, "bias", "age" in self.bias)
        return self

    @property
    def label(self) -> str:
        """Return the name that a table shows, with layers and heads."""
        return f"HSTU {self.num_layers}x{self.num_heads} heads"


class CustomEncoderConfig(EncoderSettings):
    """Names an encoder from outside this package by its import path."""

    name: Literal["custom"] = "custom"
    path: str = Field(pattern=OWN_CLASS, description="MODULE:CLASS, a subclass of SequenceEncoder")
    settings: dict[str, Any] = Field(
        default={}, description="that class's own settings, checked by its settings_class when the model is built"
    )

    @property
    def label(self) -> str:
        """Return the class, which is the name that a table shows."""
        return self.path.rpartition(":")[2]


def _only_with_ages(settings: TransformerConfig | HSTUConfig, key: str, used: bool) -> None:
    default = type(settings).model_fields["age_buckets"].default
    if not used and settings.age_buckets != default:
        raise UserError(
            f"age_buckets={settings.age_buckets} has no effect with {key}={getattr(settings, key)!r}: remove it"
        )
