"""Defines the settings of the baselines, and what all over-archs share, importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import OWN_CLASS
from ssr_rec.common.settings import Settings, Share, Widths

Initializer = Literal["glorot", "torch"]
InputNormKind = Literal["none", "per_dim", "per_field", "across_fields"]

Start = Annotated[Initializer, Field(description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own")]
Norm = Annotated[
    InputNormKind, Field(description="batch norm of the input, per dim, per field or per dim across fields")
]
"""Two settings of most over-archs, as a config's help describes them."""


def sizes(hidden: Sequence[int]) -> str:
    """Return widths of a stack for a label: depth x width, or every width where they differ."""
    return f"{len(hidden)}x{hidden[0]}" if len(set(hidden)) == 1 else "-".join(map(str, hidden))


LAYER_NORM_EPS = 1e-6
"""Small, because the variance of fresh embeddings is: docs/over_archs.md has figures."""


class OverArchSettings(Settings):
    """Defines what the config of every over-arch has."""

    name: str
    compile: bool = Field(
        default=False,
        description="run the over-arch as torch.compile makes it: the first steps of training and of evaluation take "
        "up to minutes, those after them less time where many small operations follow one another",
    )


class MLPConfig(OverArchSettings):
    """Configures the Dense MLP."""

    name: Literal["mlp"] = "mlp"
    hidden: Widths = Field(
        default=[320, 320, 320], min_length=1, description="width of each layer; the last one is the output's"
    )
    activation: Literal["relu", "gelu"] = Field(default="relu", description="GELU is the exact one")
    layer_norm: bool = Field(default=False, description="LayerNorm between each dense layer and its activation")
    dropout: Share = Field(default=0.0, description="share of activations dropped after each layer")
    input_norm: Norm = "none"
    initializer: Start = "glorot"

    @property
    def label(self) -> str:
        """Return depth x width, or every width where they differ."""
        return f"Dense MLP {sizes(self.hidden)}"


class DeepFMConfig(OverArchSettings):
    """Configures DeepFM (Guo, Tang, Ye, Li, He, IJCAI 2017)."""

    name: Literal["deepfm"] = "deepfm"
    hidden: Widths = Field(
        default=[320, 320, 320], min_length=1, description="widths of the deep branch; the last one is the output's"
    )
    layer_norm: bool = Field(default=False, description="LayerNorm between each dense layer and its ReLU")
    dropout: Share = Field(default=0.0, description="share of activations dropped after each layer")
    input_norm: InputNormKind = Field(
        default="none", description="batch norm of the deep branch's input; the FM sees the embeddings as they are"
    )
    initializer: Start = "glorot"

    @property
    def label(self) -> str:
        """Return the deep branch's depth x width, or every width where they differ."""
        return f"DeepFM {sizes(self.hidden)}"


class DCNv2Config(OverArchSettings):
    """Configures DCN v2: full rank, low rank (``rank``), or DCN-Mix (``rank`` and ``num_experts`` above 1)."""

    name: Literal["dcn_v2"] = "dcn_v2"
    num_cross_layers: int = Field(default=3, ge=1, description="cross layers; n of them cross n + 1 features")
    rank: int | None = Field(default=None, ge=1, description="r of each layer's W = U V^T; null: a full W")
    num_experts: int = Field(
        default=1, ge=1, description="above 1: DCN-Mix, as many gated experts in each layer, each of rank r"
    )
    structure: Literal["parallel", "stacked"] = Field(
        default="parallel", description="parallel: cross and deep side by side; stacked: deep on top of cross"
    )
    hidden: Widths = Field(
        default=[320, 320, 320], description="width of each ReLU layer of the deep network; empty: cross layers only"
    )
    layer_norm: bool = Field(default=False, description="LayerNorm between each deep layer and its activation")
    dropout: Share = Field(default=0.0, description="share dropped after each deep layer")
    input_norm: Norm = "none"
    initializer: Start = "glorot"

    @model_validator(mode="after")
    def _settings_without_effect_are_errors(self) -> DCNv2Config:
        if self.num_experts > 1 and self.rank is None:
            raise UserError(f"num_experts={self.num_experts} has no effect without a rank: set rank")
        if not self.hidden:
            for key in ("structure", "layer_norm", "dropout"):
                value = getattr(self, key)
                if value != DCNv2Config.model_fields[key].default:
                    raise UserError(f"{key}={value} has no effect with hidden=[]: remove it, or give hidden")
        return self

    @property
    def label(self) -> str:
        """Return cross layers with their rank, if any, and the deep network's widths."""
        name = "DCN v2" if self.num_experts == 1 else "DCN-Mix"
        experts = "" if self.num_experts == 1 else f"{self.num_experts}x"
        cross = f"{name} {self.num_cross_layers} cross" + (f" {experts}r{self.rank}" if self.rank else "")
        if not self.hidden:
            return cross
        return f"{cross}{' + ' if self.structure == 'parallel' else ', then '}{sizes(self.hidden)}"


class ExpertSettings(OverArchSettings):
    """Defines what over-archs of experts, gates and towers have."""

    expert_hidden: Widths = Field(default=[128], min_length=1, description="widths of each expert's ReLU layers")
    tower_hidden: Widths = Field(
        default=[64], description="widths of each task's ReLU layers; empty: the mixtures go to the heads"
    )
    dropout: Share = Field(default=0.0, description="share dropped after each ReLU")
    input_norm: Norm = "none"
    initializer: Initializer = Field(
        default="glorot", description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own; fans of one expert"
    )

    def widths_label(self) -> str:
        """Return the experts' widths, then the towers'."""
        towers = f" + {'-'.join(map(str, self.tower_hidden))}" if self.tower_hidden else ""
        return f"{'-'.join(map(str, self.expert_hidden))}{towers}"


class MMoEConfig(ExpertSettings):
    """Configures the multi-gate mixture of experts."""

    name: Literal["mmoe"] = "mmoe"
    num_experts: int = Field(default=8, ge=2, description="experts, all of them seen by every task (n in the paper)")

    @property
    def label(self) -> str:
        """Return experts x their widths, then the towers' widths."""
        return f"MMoE {self.num_experts}x{self.widths_label()}"


class PLEConfig(ExpertSettings):
    """Configures progressive layered extraction (Tang et al., RecSys 2020); one level is their CGC."""

    name: Literal["ple"] = "ple"
    num_levels: int = Field(default=2, ge=1, description="extraction levels, each fed with the mixtures before it")
    num_task_experts: int = Field(default=2, ge=1, description="experts that one task alone sees, of each task")
    num_shared_experts: int = Field(default=4, ge=1, description="experts that every task sees")

    @property
    def label(self) -> str:
        """Return levels, experts of a task and shared ones x their widths, then the towers' widths."""
        experts = f"{self.num_task_experts}+{self.num_shared_experts}"
        return f"PLE {self.num_levels} levels {experts}x{self.widths_label()}"


class AutoIntConfig(OverArchSettings):
    """Configures AutoInt, and AutoInt+ with ``deep_hidden``.

    The defaults are the paper's text (4.4, 4.5, 5.1). Keys marked "released" switch to what the authors' code does
    instead.
    """

    name: Literal["autoint"] = "autoint"
    num_layers: int = Field(default=3, ge=1, description="interacting layers")
    num_heads: int = Field(default=2, ge=1, description="attention heads (H in the paper)")
    attention_dim: int = Field(default=32, ge=1, description="dims of one head (d' in the paper)")
    scale: bool = Field(default=False, description="released: divide the inner products by sqrt(attention_dim)")
    residual: bool = Field(default=True, description="add a projection of the layer's input before ReLU (eq. 8)")
    layer_norm: bool = Field(default=False, description="released: LayerNorm of each field after ReLU")
    deep_hidden: Widths = Field(
        default=[], description="AutoInt+: widths of ReLU layers beside the attention; empty: none"
    )
    dropout: Share = Field(
        default=0.0, description="released: share dropped of attention weights and after deep layers"
    )
    input_norm: Norm = "none"
    initializer: Start = "glorot"

    @property
    def label(self) -> str:
        """Return layers x heads x dims of a head, and the deep network's widths."""
        attention = f"{self.num_layers}x{self.num_heads}x{self.attention_dim}"
        if not self.deep_hidden:
            return f"AutoInt {attention}"
        return f"AutoInt+ {attention} + {sizes(self.deep_hidden)}"


class AFNConfig(OverArchSettings):
    """Configures AFN and, with ``plus``, AFN+ (Cheng, Shen, Huang, AAAI 2020)."""

    name: Literal["afn"] = "afn"
    num_neurons: int = Field(default=600, ge=1, description="logarithmic neurons (N), one cross feature of D dims each")
    hidden: Widths = Field(
        default=[400, 400, 400], min_length=1, description="widths of the ReLU layers over the cross features"
    )
    plus: bool = Field(default=False, description="AFN+: a deep network beside AFN, with a second set of tables")
    deep_hidden: Widths = Field(
        default=[400, 400, 400], min_length=1, description="plus: widths of the deep network's ReLU layers"
    )
    clamp_min: float = Field(
        default=1e-4, gt=0.0, description="least |embedding| before the logarithm; smaller ones get no gradient"
    )
    batch_norm: bool = Field(default=True, description="batch norm per field after log and per neuron after exp")
    hidden_norm: Literal["none", "batch", "layer"] = Field(
        default="batch", description="batch: batch norm after each ReLU; layer: LayerNorm before it"
    )
    dropout: Share = Field(default=0.0, description="share of activations dropped after each layer")
    input_norm: InputNormKind = Field(
        default="none", description="batch norm of the embeddings before the logarithm and of the deep network's"
    )
    initializer: Initializer = Field(
        default="glorot", description="of the ReLU layers; glorot: uniform, zero bias; torch: nn.Linear's own"
    )

    @model_validator(mode="after")
    def _deep_hidden_needs_plus(self) -> AFNConfig:
        if not self.plus and self.deep_hidden != AFNConfig.model_fields["deep_hidden"].default:
            raise UserError(
                f"deep_hidden={self.deep_hidden} has no effect with plus=false: remove it, or set plus=true"
            )
        return self

    @property
    def label(self) -> str:
        """Return logarithmic neurons and the widths above them, then those of the deep network."""
        afn = f"{self.num_neurons} neurons {sizes(self.hidden)}"
        return f"AFN+ {afn} + {sizes(self.deep_hidden)}" if self.plus else f"AFN {afn}"


class WukongConfig(OverArchSettings):
    """Configures Wukong with the optimised FM of a learned projection (section 3)."""

    name: Literal["wukong"] = "wukong"
    num_layers: int = Field(default=2, ge=1, description="layers of the interaction stack (l in the paper)")
    fmb_embeddings: int = Field(default=16, ge=1, description="embeddings out of a layer's FM block (n_F)")
    lcb_embeddings: int = Field(default=16, ge=1, description="embeddings out of a layer's linear compression (n_L)")
    fm_rank: int = Field(default=8, ge=1, description="embeddings that the FM's other side is projected to (k)")
    fmb_hidden: Widths = Field(
        default=[128], description="widths of the FM block's ReLU layers, before its linear layer to the embeddings"
    )
    hidden: Widths = Field(
        default=[256], description="widths of the ReLU layers after the stack; empty: the flat embeddings"
    )
    dropout: Share = Field(default=0.0, description="share dropped after each ReLU")
    input_norm: Norm = "none"
    layer_norm_eps: float = Field(default=LAYER_NORM_EPS, gt=0.0, description="added to every LayerNorm's variance")
    initializer: Start = "glorot"

    @model_validator(mode="after")
    def _dropout_needs_a_relu_layer(self) -> WukongConfig:
        if self.dropout and not (self.fmb_hidden or self.hidden):
            raise UserError(f"dropout={self.dropout} has no effect without fmb_hidden and hidden: remove it")
        return self

    @property
    def label(self) -> str:
        """Return layers x embeddings of both blocks, and the rank."""
        return f"Wukong {self.num_layers}x({self.fmb_embeddings}+{self.lcb_embeddings}) k={self.fm_rank}"


class RankMixerConfig(OverArchSettings):
    """Configures RankMixer with dense per-token FFNs (arXiv 2507.15551, section 3)."""

    name: Literal["rankmixer"] = "rankmixer"
    num_tokens: int = Field(default=8, ge=1, description="tokens, and heads of the token mixing (T = H in the paper)")
    dim: int = Field(default=96, ge=1, description="dims of a token (D in the paper), a multiple of num_tokens")
    num_layers: int = Field(default=2, ge=1, description="blocks of token mixing and per-token FFN")
    ffn_ratio: int = Field(default=2, ge=1, description="hidden width of the FFN over dim (k in the paper)")
    dropout: Share = Field(default=0.0, description="share dropped after the FFN's activation")
    input_norm: Norm = "none"
    layer_norm_eps: float = Field(default=LAYER_NORM_EPS, gt=0.0, description="added to each token's variance")
    initializer: Initializer = Field(
        default="glorot", description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own; fans of one token"
    )

    @model_validator(mode="after")
    def _heads_divide_the_dim(self) -> RankMixerConfig:
        if self.dim % self.num_tokens:
            raise UserError(
                f"dim={self.dim} is not divisible by num_tokens={self.num_tokens}: token mixing splits each token "
                f"into num_tokens heads"
            )
        return self

    @property
    def label(self) -> str:
        """Return tokens x dims x layers."""
        return f"RankMixer {self.num_tokens}x{self.dim}x{self.num_layers}"


class CustomOverArchConfig(OverArchSettings):
    """Names an over-arch from outside this package by its import path."""

    name: Literal["custom"] = "custom"
    path: str = Field(pattern=OWN_CLASS, description="MODULE:CLASS, a subclass of OverArch")
    settings: dict[str, Any] = Field(
        default={}, description="that class's own settings, checked by its settings_class when the model is built"
    )

    @property
    def label(self) -> str:
        """Return the class, which is the name that a table shows."""
        return self.path.rpartition(":")[2]
