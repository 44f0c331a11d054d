"""AFN learns cross features of any order by logarithmic neurons; AFN+ adds a deep network with tables of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import Flops, OverArch, equal_dim
from ssr_rec.over_archs.layers import DenseStack, Dropout, InputNorm, make_input_norm
from ssr_rec.over_archs.settings import AFNConfig

NEURON_STD = 0.1
"""Start of the orders, from the authors' code: normal, small enough that exp stays near 1."""
MOMENTUM = 0.1
"""Weight of a new batch in the running statistics, as in the authors' code."""
MAX_EXPONENT = 30.0
"""exp of it is 1e13: beyond every useful cross feature, and float32 still holds its square, which batch norm and the
optimizers take."""


class LogarithmicNeurons(nn.Module):
    """Transforms logarithmically: neuron n is the cross feature ``e^b_n * prod_f |x_f|^W_fn``.

    (B, F*D) -> (B, N*D), neuron after neuron, dim by dim:

        u_f = BN_f(ln(max(|x_f|, clamp_min)))    y_n = BN_n(exp(min(sum_f W_fn u_f + b_n, MAX_EXPONENT)))

    With batch norm the orders act on normalised logarithms. Always at least float32: an error in the exponent is a
    factor in the output.
    """

    def __init__(self, num_fields: int, dim: int, config: AFNConfig) -> None:
        super().__init__()
        neurons = config.num_neurons
        self.clamp_min = config.clamp_min
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(num_fields, neurons))
        self.bias = nn.Parameter(torch.zeros(neurons))
        nn.init.normal_(self.weight, 0.0, NEURON_STD)
        self.log_norm = InputNorm("per_field", (dim,) * num_fields, MOMENTUM) if config.batch_norm else None
        self.exp_norm = InputNorm("per_field", (dim,) * neurons, MOMENTUM) if config.batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            u = x.abs().clamp(min=self.clamp_min).log()
            if self.log_norm is not None:
                u = self.log_norm(u)
            z = F.linear(u.unflatten(1, (-1, self.dim)).transpose(1, 2), self.weight.t(), self.bias)
            y = z.clamp(max=MAX_EXPONENT).exp().transpose(1, 2).flatten(1)
            return y if self.exp_norm is None else self.exp_norm(y)

    def flops(self) -> Flops:
        fields, neurons = self.weight.shape
        # abs, clamp and log of the inputs; bias, clamp and exp of the outputs.
        total = Flops(2 * fields * neurons * self.dim, 3 * fields * self.dim + 3 * neurons * self.dim)
        for norm in (self.log_norm, self.exp_norm):
            if norm is not None:
                total += norm.flops()
        return total


class HiddenLayers(nn.Sequential):
    """Runs ReLU layers with the norm of ``hidden_norm``, each followed by dropout (if any): (B, fan_in) -> (B, H)."""

    def __init__(self, fan_in: int, hidden: Sequence[int], config: AFNConfig) -> None:
        super().__init__()
        for width in hidden:
            self.append(DenseStack(fan_in, [width], config.initializer, layer_norm=config.hidden_norm == "layer"))
            if config.hidden_norm == "batch":
                self.append(InputNorm("per_dim", (width,), MOMENTUM))
            if config.dropout:
                self.append(Dropout(config.dropout))
            fan_in = width

    def flops(self) -> Flops:
        total = Flops()
        for layer in self:
            if isinstance(layer, DenseStack | InputNorm):
                total += layer.flops()
        return total


class AFN(OverArch):
    """Puts ReLU layers over logarithmic neurons; AFN+ concatenates them with a deep network over the tables "deep".

    (B, F*D) -> (B, hidden[-1]); with ``plus`` a second (B, F*D), -> (B, hidden[-1] + deep_hidden[-1]). A linear head
    over the concatenation is the sum of a logit of each branch.

    Raises:
        UserError: fields of different dims; in ``forward``, the second input missing with ``plus`` or given without.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: AFNConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or AFNConfig()
        dim = equal_dim(self, "AFN")
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.neurons = LogarithmicNeurons(num_fields, dim, config)
        self.layers = HiddenLayers(config.num_neurons * dim, config.hidden, config)
        self.out_features = config.hidden[-1]
        self.deep_layers: HiddenLayers | None = None
        if config.plus:
            self.extra_tables = {"deep": self.field_dims}
            self.deep_norm = make_input_norm(config.input_norm, self.field_dims)
            self.deep_layers = HiddenLayers(self.in_features, config.deep_hidden, config)
            self.out_features += config.deep_hidden[-1]

    def forward(self, x: Tensor, deep: Tensor | None = None) -> Tensor:
        if (deep is not None) != self.config.plus:
            raise UserError(f"AFN with plus={self.config.plus} takes {2 if self.config.plus else 1} input(s)")
        features = self.layers(self.neurons(self.input_norm(x)))
        if deep is None or self.deep_layers is None:
            return features
        deep_features = self.deep_layers(self.deep_norm(deep))
        return torch.cat([features, deep_features], dim=1)

    def flops(self) -> Flops:
        total = self.input_norm.flops() + self.neurons.flops() + self.layers.flops()
        if self.deep_layers is not None:
            total += self.deep_norm.flops() + self.deep_layers.flops()
        return total
