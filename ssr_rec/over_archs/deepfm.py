"""DeepFM puts a factorization machine and a deep network over the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.base import Flops, OverArch, equal_dim
from ssr_rec.over_archs.layers import DenseStack, make_input_norm
from ssr_rec.over_archs.settings import DeepFMConfig


def factorization_machine(fields: Tensor) -> Tensor:
    """Return the sum of the inner products of all pairs of fields (eq. 2): (B, F, D) -> (B, 1).

    Every pair counted twice and each field with itself is the square of the sum; hence linear in F.
    """
    twice = fields.sum(1).square() - fields.square().sum(1)
    return 0.5 * twice.sum(1, keepdim=True)


class DeepFM(OverArch):
    """Makes the parts of ``logit_t = sum_f w_tf + s_t FM(x) + <v_t, deep(x)> + b_t`` (eq. 1-4); v and b are the head's.

    (B, F*D) and the first order (B, F*T), which holds the T weights of a field one after another, -> the deep
    features (B, hidden[-1]) and logits (B, T). The scales s exist with several tasks only: they share the
    embeddings, so that without s all would get the same FM.

    Raises:
        UserError: fields of different dims, which have no inner product.
    """

    task_parts = ("first_order", "fm_scale")

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: DeepFMConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or DeepFMConfig()
        self.dim = equal_dim(self, "DeepFM")
        self.extra_tables = {"first_order": (num_tasks,) * num_fields}
        self.fm_scale = nn.Parameter(torch.ones(num_tasks)) if num_tasks > 1 else None
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.layers = DenseStack(
            self.in_features,
            config.hidden,
            config.initializer,
            layer_norm=config.layer_norm,
            dropout=config.dropout,
        )
        self.out_features = config.hidden[-1]

    def forward(self, x: Tensor, first_order: Tensor) -> tuple[Tensor, Tensor]:
        # The FM is a small difference of large sums, of which bfloat16 would leave little.
        wide = torch.promote_types(x.dtype, torch.float32)
        fm = factorization_machine(x.to(wide).unflatten(1, (-1, self.dim)))
        if self.fm_scale is not None:
            fm = fm * self.fm_scale
        logits = first_order.to(wide).unflatten(1, (-1, self.num_tasks)).sum(1) + fm
        return self.layers(self.input_norm(x)), logits

    def flops(self) -> Flops:
        fields, tasks = len(self.field_dims), self.num_tasks
        # Sum, square and sum of squares of all dims; then square, difference and sum per dim; then the half.
        fm = 3 * self.in_features + 3 * self.dim + 1 + (tasks if self.fm_scale is not None else 0)
        total = Flops(elementwise=fields * tasks + fm + tasks)
        total += self.input_norm.flops()
        return total + self.layers.flops()
