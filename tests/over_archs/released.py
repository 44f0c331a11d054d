"""Weights of the authors' TensorFlow code into our SSR; docs/over_archs.md says which switches match that code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.filters import IcsFilter, StaticRandomFilter
from ssr_rec.over_archs.layers import InputNorm
from ssr_rec.over_archs.ssr import SSR


@torch.no_grad()
def load_released_weights(ssr: SSR, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy every array into its place in ``ssr``; nothing is copied when a name or a shape is wrong.

    Kernels are (in, out) as in Keras, and what a view owns is stacked along a first axis of V views::

        input_norm/{gamma,beta,moving_mean,moving_variance}  (F,) per_field, (D,) across_fields, (F*D,) per_dim
        layer{i}/w_proj, layer{i}/w_value                    (V, in, d); w_value with gate
        layer{i}/alpha, layer{i}/gamma                       (V, T), (V, d)
        layer{i}/indices                                     (V, d) integers, filter='static'; no checkpoint has them:
                                    np.random.RandomState(1000 * (i + 1) + v).permutation(in)[:d] for view v
        layer{i}/dense/kernel, layer{i}/dense/bias           (V, d, d), (V, d)
        layer{i}/dense2/kernel, layer{i}/dense2/bias         the same, with fusion_layers=2
        layer{i}/layer_norm/gamma, layer{i}/layer_norm/beta  (V, d)
        output_mlp{j}/kernel, output_mlp{j}/bias             (in, out), (out,)

    i counts layers and j the widths of output_mlp, from 0. The last Dense(1) belongs to a task head.
    """
    targets = released_names(ssr)
    missing, unknown = targets.keys() - arrays.keys(), arrays.keys() - targets.keys()
    if missing or unknown:
        raise UserError(f"arrays for this SSR: missing {sorted(missing)}, unknown {sorted(unknown)}")
    sources = {name: torch.from_numpy(np.array(arrays[name])) for name in targets}
    for name, source in sources.items():
        _check(name, source, targets[name], ssr)
    for name, source in sources.items():
        targets[name].copy_(source)


def released_names(ssr: SSR) -> dict[str, Tensor]:
    """Every array of ``load_released_weights`` for this SSR, as a view of our weights in the released shape."""
    targets: dict[str, Tensor] = {}
    if isinstance(ssr.input_norm, InputNorm):
        norm = ssr.input_norm
        targets |= {"input_norm/gamma": norm.weight, "input_norm/beta": norm.bias}
        targets |= {"input_norm/moving_mean": norm.running_mean, "input_norm/moving_variance": norm.running_var}
    for i, layer in enumerate(ssr.blocks()):
        filter_, fusion = layer.filter, layer.fusion
        if isinstance(filter_, IcsFilter):
            targets |= {f"layer{i}/{name}": tensor for name, tensor in _ics_arrays(filter_).items()}
        elif isinstance(filter_, StaticRandomFilter):
            targets[f"layer{i}/indices"] = filter_.indices
        for name, dense in (("dense", fusion.dense), ("dense2", fusion.dense2)):
            if dense is not None:
                targets |= {f"layer{i}/{name}/kernel": dense.weight, f"layer{i}/{name}/bias": dense.bias}
        targets |= {f"layer{i}/layer_norm/gamma": fusion.norm.weight, f"layer{i}/layer_norm/beta": fusion.norm.bias}
    for j, linear in enumerate(m for m in ssr.output_mlp if isinstance(m, nn.Linear)):
        targets |= {f"output_mlp{j}/kernel": linear.weight.t(), f"output_mlp{j}/bias": linear.bias}
    return targets


def _ics_arrays(ics_filter: IcsFilter) -> dict[str, Tensor]:
    def kernel(linear: nn.Linear) -> Tensor:
        return linear.weight.unflatten(0, (ics_filter.num_views, ics_filter.view_dim)).transpose(1, 2)

    arrays = {"w_proj": kernel(ics_filter.proj), "alpha": ics_filter.alpha}
    if ics_filter.value is not None:
        arrays["w_value"] = kernel(ics_filter.value)
    if ics_filter.gamma is not None:
        arrays["gamma"] = ics_filter.gamma
    return arrays


def _check(name: str, source: Tensor, target: Tensor, ssr: SSR) -> None:
    if source.shape != target.shape:
        raise UserError(f"array {name!r} has shape {tuple(source.shape)}, this SSR needs {tuple(target.shape)}")
    if source.is_floating_point() != target.is_floating_point():
        raise UserError(f"array {name!r} is {source.dtype}, this SSR needs {target.dtype}")
    if name.endswith("/indices"):
        width = ssr.blocks()[int(name[len("layer") : name.index("/")])].filter.width
        distinct = all(row.unique().numel() == row.numel() for row in source)
        if int(source.min()) < 0 or int(source.max()) >= width or not distinct:
            raise UserError(f"array {name!r} must name distinct dims from 0 to {width - 1} in each view")
