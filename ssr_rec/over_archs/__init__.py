"""Over-archs: pure tensor code from the concatenated embeddings to features for the task heads.

    over_arch = SSR(num_fields=26, embedding_dim=16, num_tasks=1, config=SSRConfig(filter="static"))
    features = over_arch(x)                     # (B, F*D) -> (B, over_arch.out_features)

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

from ssr_rec.over_archs.base import Flops, OverArch
from ssr_rec.over_archs.mlp import MLP, MLPConfig
from ssr_rec.over_archs.ssr import SSR, SSRConfig, ssr_statistics

OVER_ARCHS: dict[str, type[OverArch]] = {"ssr": SSR, "mlp": MLP}

OverArchConfig = Annotated[SSRConfig | MLPConfig, Field(discriminator="name")]
"""Any over-arch's config; ``name`` says which."""

__all__ = [
    "MLP",
    "OVER_ARCHS",
    "SSR",
    "Flops",
    "MLPConfig",
    "OverArch",
    "OverArchConfig",
    "SSRConfig",
    "ssr_statistics",
]
