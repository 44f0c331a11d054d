"""Lists the over-archs that a config can name."""

from __future__ import annotations

from ssr_rec.over_archs.afn import AFN
from ssr_rec.over_archs.autofis import AutoFIS
from ssr_rec.over_archs.autoint import AutoInt
from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.dcn_v2 import DCNv2
from ssr_rec.over_archs.deepfm import DeepFM
from ssr_rec.over_archs.mlp import MLP
from ssr_rec.over_archs.mmoe import MMoE
from ssr_rec.over_archs.rankmixer import RankMixer
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.wukong import Wukong

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
