"""DeepFM against its equations as plain loops, and TorchRec's factorization machine."""

from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torchrec.modules.deepfm import FactorizationMachine

from ssr_rec.over_archs.deepfm import DeepFM, factorization_machine
from ssr_rec.over_archs.settings import DeepFMConfig

FIELDS, DIM, ROWS = 4, 3, 6


def build(tasks: int, **settings: Any) -> DeepFM:
    torch.manual_seed(0)
    return DeepFM(FIELDS, DIM, tasks, DeepFMConfig(**({"hidden": [7, 5], "initializer": "torch"} | settings))).double()


def batch(tasks: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FIELDS * DIM, generator=draw, dtype=torch.float64)
    return x, torch.randn(rows, FIELDS * tasks, generator=draw, dtype=torch.float64)


def pairwise_fm(row: list[float]) -> float:
    """Sum over all pairs of fields and all dims, one multiplication at a time."""
    return sum(row[i * DIM + d] * row[j * DIM + d] for i, j in combinations(range(FIELDS), 2) for d in range(DIM))


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_equals_its_equations_written_out(tasks: int, layer_norm: bool) -> None:
    model, (x, first_order) = build(tasks, layer_norm=layer_norm), batch(tasks)
    scale = [1.0]
    if model.fm_scale is not None:
        torch.nn.init.normal_(model.fm_scale)
        scale = model.fm_scale.tolist()
    features, logits = model(x, first_order)
    for row, (values, weights) in enumerate(zip(x.tolist(), first_order.tolist(), strict=True)):
        for t in range(tasks):
            linear = sum(weights[f * tasks + t] for f in range(FIELDS))
            assert logits[row, t].item() == pytest.approx(linear + scale[t] * pairwise_fm(values), rel=1e-12, abs=1e-12)
    w, y = model.state_dict(), x
    for i in range(2):
        layer = i * (3 if layer_norm else 2)
        y = y @ w[f"layers.{layer}.weight"].T + w[f"layers.{layer}.bias"]
        y = (F.layer_norm(y, y.shape[1:], eps=1e-6) if layer_norm else y).clamp(min=0)
    torch.testing.assert_close(features, y, rtol=1e-12, atol=1e-12)


def test_fm_is_torchrec_s_summed_over_the_dims() -> None:
    # TorchRec's multiplies every number with every other one, across dims too: the paper's FM for one dim only.
    x = batch(1)[0].view(ROWS, FIELDS, DIM)
    expected = sum(FactorizationMachine()([x[:, :, d : d + 1]]) for d in range(DIM))
    torch.testing.assert_close(factorization_machine(x), expected, rtol=1e-12, atol=1e-12)


def test_one_task_has_no_scale_and_several_start_with_the_paper_s() -> None:
    single, several = build(1), build(2)
    assert single.extra_tables == {"first_order": (1,) * FIELDS}
    assert several.extra_tables == {"first_order": (2,) * FIELDS}
    assert single.num_parameters == single.layers.flops().matmul // 2 + 7 + 5 == several.num_parameters - 2
    x, first_order = batch(1)
    torch.testing.assert_close(
        several(x, first_order.repeat_interleave(2, 1))[1], single(x, first_order)[1].expand(-1, 2)
    )


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm_is_for_the_deep_branch_only(kind: str) -> None:
    model, (x, first_order) = build(1, input_norm=kind), batch(1)
    features, logits = model(x, first_order)
    groups = x.view(ROWS, -1, DIM if kind == "per_field" else 1)
    mean, std = groups.mean((0, 2), keepdim=True), (groups.var((0, 2), unbiased=False, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(features, model.layers(((groups - mean) / std).flatten(1)))
    assert torch.equal(logits, build(1)(x, first_order)[1])


def test_logits_keep_float32_under_bfloat16() -> None:
    model, (x, first_order) = build(2).float(), batch(2)
    x, first_order = (100 * x).float(), first_order.float()
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = model(x, first_order)
        from_bf16 = model(x.bfloat16(), first_order.bfloat16())[1]
    assert features.dtype == torch.bfloat16
    assert torch.equal(logits, model(x, first_order)[1])
    assert torch.equal(from_bf16, model(x.bfloat16().float(), first_order.bfloat16().float())[1])


def test_dropout_acts_in_training_only() -> None:
    model, inputs = build(1, dropout=0.5), batch(1)
    assert not torch.equal(model(*inputs)[0], model(*inputs)[0])
    assert torch.equal(model(*inputs)[1], model(*inputs)[1])
    assert torch.equal(model.eval()(*inputs)[0], build(1).eval()(*inputs)[0])


def test_cost_of_the_defaults() -> None:
    model = DeepFM(39, 16, 1)
    weights = 624 * 320 + 2 * 320 * 320
    assert model.out_features == 320
    assert model.num_parameters == weights + 3 * 320
    # First order 39, FM 3 * 624 + 3 * 16 + 1, their sum 1; bias and ReLU of the layers.
    assert model.flops_per_sample == 2 * weights + 39 + 3 * 624 + 3 * 16 + 1 + 1 + 3 * 2 * 320
    assert DeepFM(39, 16, 2).flops_per_sample - model.flops_per_sample == 39 + 2 + 1
    assert DeepFM(39, 16, 1, DeepFMConfig(input_norm="per_dim")).flops_per_sample - model.flops_per_sample == 2 * 624


def test_fields_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="DeepFM needs fields of equal dims"):
        DeepFM(2, [4, 8], 1)


@pytest.mark.parametrize("settings", [{"hidden": []}, {"hidden": [0]}, {"dropout": 1.0}, {"initializer": "zeros"}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        DeepFMConfig(**settings)


def test_labels() -> None:
    assert DeepFMConfig().label == "DeepFM 3x320"
    assert DeepFMConfig(hidden=[8, 4]).label == "DeepFM 8-4"
