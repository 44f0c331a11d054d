"""Lists the over-archs that a config can name, and makes one from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import own_class, own_settings
from ssr_rec.over_archs.afn import AFN
from ssr_rec.over_archs.autofis import AutoFIS
from ssr_rec.over_archs.autoint import AutoInt
from ssr_rec.over_archs.base import Domain, OverArch
from ssr_rec.over_archs.dcn_v2 import DCNv2
from ssr_rec.over_archs.deepfm import DeepFM
from ssr_rec.over_archs.mlp import MLP
from ssr_rec.over_archs.mmoe import MMoE
from ssr_rec.over_archs.ple import PLE
from ssr_rec.over_archs.rankmixer import RankMixer
from ssr_rec.over_archs.settings import CustomOverArchConfig, OverArchSettings
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.wukong import Wukong

OVER_ARCHS: dict[str, type[OverArch]] = {
    "ssr": SSR,
    "mlp": MLP,
    "deepfm": DeepFM,
    "dcn_v2": DCNv2,
    "mmoe": MMoE,
    "ple": PLE,
    "autoint": AutoInt,
    "autofis": AutoFIS,
    "afn": AFN,
    "wukong": Wukong,
    "rankmixer": RankMixer,
}


def build_over_arch(
    num_fields: int,
    embedding_dim: int | Sequence[int],
    num_tasks: int,
    config: OverArchSettings,
    domain: Domain | None = None,
) -> OverArch:
    """Make the over-arch that a config names.

    Args:
        domain: of the rows, for one that has parts for each.

    Raises:
        UserError: sizes that do not fit, or a class of one's own that is not there, is no ``OverArch``, or does not
            take these settings; the message has one line.
    """
    made: Any = OVER_ARCHS.get(config.name)
    if not isinstance(config, CustomOverArchConfig):
        of_domains = {"domain": domain} if made.takes_domain else {}
        over_arch: OverArch = made(num_fields, embedding_dim, num_tasks, config, **of_domains)
        return over_arch
    name = f"over_arch {config.path}"
    made = own_class(config.path, OverArch, "over_arch")
    of_domains = {"domain": domain} if made.takes_domain else {}
    settings = own_settings(made, config.settings, name)
    over_arch = made(num_fields, embedding_dim, num_tasks, settings, **of_domains)
    if not isinstance(getattr(over_arch, "out_features", None), int):
        raise UserError(f"{name} has no out_features: set it in its constructor, the width of what forward returns")
    return over_arch
