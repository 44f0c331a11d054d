"""Over-archs turn the concatenated embeddings into features for the task heads, in pure tensor code.

    over_arch = SSR(num_fields=26, embedding_dim=16, num_tasks=1, config=SSRConfig(filter="static"))
    features = over_arch(x)                     # (B, F*D) -> (B, over_arch.out_features)

Some take the embeddings of further tables too, and some return logits beside the features; see ``OverArch``.

``OverArch`` is the contract. The settings of all of them are in ``*settings.py``, which
import no torch; their ``name`` is the key in ``OVER_ARCHS`` (``registry.py``).

Shapes, here and in every docstring of the package:

    B  samples in a batch           V  views of an SSR layer (b in the paper)
    F  fields                       d  dims of a view (d_v)
    D  embedding dim of a field     T  tasks; in ICS, its iterations
    H  features of the output

``(B, F*D)`` stands for B rows of all embeddings one after another, whatever the dims of the single fields.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "afn": ("AFN",),
    "autofis": ("AutoFIS",),
    "autofis_settings": ("AutoFISConfig",),
    "autoint": ("AutoInt",),
    "base": (
        "Flops",
        "OverArch",
    ),
    "choice": ("OverArchConfig",),
    "dcn_v2": ("DCNv2",),
    "deepfm": ("DeepFM",),
    "mlp": ("MLP",),
    "mmoe": ("MMoE",),
    "ple": ("PLE",),
    "rankmixer": ("RankMixer",),
    "registry": ("OVER_ARCHS",),
    "settings": (
        "AFNConfig",
        "AutoIntConfig",
        "DCNv2Config",
        "DeepFMConfig",
        "MLPConfig",
        "MMoEConfig",
        "PLEConfig",
        "RankMixerConfig",
        "WukongConfig",
    ),
    "ssr": (
        "SSR",
        "ssr_statistics",
    ),
    "ssr_settings": ("SSRConfig",),
    "wukong": ("Wukong",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that reading a config needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
