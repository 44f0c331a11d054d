"""Over-archs: pure tensor code from the concatenated embeddings to features for the task heads.

    over_arch = SSR(num_fields=26, embedding_dim=16, num_tasks=1, config=SSRConfig(filter="static"))
    features = over_arch(x)                     # (B, F*D) -> (B, over_arch.out_features)

Some take the embeddings of further tables too, and some return logits beside the features; see ``OverArch``.

``OverArch`` is the contract. Each config stands beside its class; its ``name`` is the key in ``OVER_ARCHS``.

Shapes, here and in every docstring of the package:

    B  samples in a batch           V  views of an SSR layer (b in the paper)
    F  fields                       d  dims of a view (d_v)
    D  embedding dim of a field     T  tasks; in ICS, its iterations
    H  features of the output

``(B, F*D)`` stands for B rows of all embeddings one after another, whatever the dims of the single fields.
"""

from typing import Annotated

from pydantic import Field

from ssr_rec.over_archs.afn import AFN, AFNConfig
from ssr_rec.over_archs.autofis import AutoFIS, AutoFISConfig
from ssr_rec.over_archs.autoint import AutoInt, AutoIntConfig
from ssr_rec.over_archs.base import Flops, OverArch
from ssr_rec.over_archs.dcn_v2 import DCNv2, DCNv2Config
from ssr_rec.over_archs.deepfm import DeepFM, DeepFMConfig
from ssr_rec.over_archs.mlp import MLP, MLPConfig
from ssr_rec.over_archs.mmoe import MMoE, MMoEConfig
from ssr_rec.over_archs.rankmixer import RankMixer, RankMixerConfig
from ssr_rec.over_archs.ssr import SSR, SSRConfig, ssr_statistics
from ssr_rec.over_archs.wukong import Wukong, WukongConfig

OVER_ARCHS: dict[str, type[OverArch]] = {
    "ssr": SSR,
    "mlp": MLP,
    "deepfm": DeepFM,
    "dcn_v2": DCNv2,
    "mmoe": MMoE,
    "autoint": AutoInt,
    "autofis": AutoFIS,
    "afn": AFN,
    "wukong": Wukong,
    "rankmixer": RankMixer,
}

OverArchConfig = Annotated[
    SSRConfig
    | MLPConfig
    | DeepFMConfig
    | DCNv2Config
    | MMoEConfig
    | AutoIntConfig
    | AutoFISConfig
    | AFNConfig
    | WukongConfig
    | RankMixerConfig,
    Field(discriminator="name"),
]
"""Any over-arch's config; ``name`` says which."""

__all__ = [
    "AFN",
    "MLP",
    "OVER_ARCHS",
    "SSR",
    "AFNConfig",
    "AutoFIS",
    "AutoFISConfig",
    "AutoInt",
    "AutoIntConfig",
    "DCNv2",
    "DCNv2Config",
    "DeepFM",
    "DeepFMConfig",
    "Flops",
    "MLPConfig",
    "MMoE",
    "MMoEConfig",
    "OverArch",
    "OverArchConfig",
    "RankMixer",
    "RankMixerConfig",
    "SSRConfig",
    "Wukong",
    "WukongConfig",
    "ssr_statistics",
]
