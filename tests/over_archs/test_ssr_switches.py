"""Every switch of SSR changes its output and survives a state dict; the config refuses nonsense."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ssr_rec.over_archs.filters import FILTERS
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import FilterName, SSRConfig
from tests.small_ssr import DV, SMALL, STATIC, B, D, F, L, V, batch, build

SWITCHES = [
    ("dynamic", {"gate": True}),
    ("dynamic", {"filter_dim": 13}),
    ("dynamic", {"iterations": 2}),
    ("dynamic", {"alpha_init": 0.4}),
    ("dynamic", {"initializer": "torch"}),
    *[
        (kind, switch)
        for kind in ("static", "dynamic")
        for switch in (
            {"fusion_layers": 2},
            {"residual": True},
            {"layer_norm_eps": 1e-2},
            {"input_norm": "per_dim"},
            {"input_norm": "per_field"},
            {"input_norm": "across_fields"},
            {"output": "mean"},
            {"output_mlp": [9]},
            {"fusion_dropout": 0.3},
            {"input_dropout": 0.3},
        )
    ],
    ("static", {"index_seed": 5}),
]


@pytest.mark.parametrize(("kind", "switch"), SWITCHES, ids=lambda v: str(v))
def test_a_switch_changes_training_output_and_survives_a_state_dict(kind: str, switch: dict[str, Any]) -> None:
    def make(seed: int, **settings: Any) -> SSR:
        torch.manual_seed(seed)
        return SSR(F, D, 1, SSRConfig(**(SMALL | {"filter": kind} | settings)))

    def train_step(ssr: SSR) -> Tensor:
        torch.manual_seed(3)
        return ssr(batch().float())

    plain, switched = make(0), make(0, **switch)
    a, b = train_step(plain), train_step(switched)
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-4)
    assert b.shape == (B, switched.out_features)

    other = make(1, **switch)
    other.load_state_dict(switched.state_dict())
    assert torch.equal(other.eval()(batch().float()), switched.eval()(batch().float()))


def test_a_frozen_alpha_is_kept_in_the_state_dict_and_not_trained() -> None:
    frozen, learned = SSR(F, D, 1, SSRConfig(**SMALL, learn_alpha=False)), SSR(F, D, 1, SSRConfig(**SMALL))
    assert frozen.state_dict().keys() == learned.state_dict().keys()
    assert learned.num_parameters - frozen.num_parameters == L * V * 5
    assert not any("alpha" in name for name, _ in frozen.named_parameters())


def test_dropout_acts_in_training_only() -> None:
    ssr, x = build(fusion_dropout=0.5, input_dropout=0.5), batch()
    assert torch.equal(ssr(x), ssr(x))
    assert torch.equal(ssr(x), build()(x))
    ssr.train()
    assert not torch.equal(ssr(x), ssr(x))


def test_released_fusion_drops_the_dense_part_and_keeps_the_residual() -> None:
    ssr = build(num_layers=1, residual=True, fusion_dropout=0.999999)
    h = ssr.blocks()[0].filter(batch())
    norm = ssr.blocks()[0].fusion.norm
    mean, var = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
    expected = (h - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(ssr.train()(batch()), expected.flatten(1))


@pytest.mark.parametrize(("kind", "over"), [("per_dim", (0,)), ("per_field", (0, 2)), ("across_fields", (0, 1))])
def test_input_norm_in_training_and_its_running_statistics(kind: str, over: tuple[int, ...]) -> None:
    ssr = SSR(F, D, 1, SSRConfig(**SMALL, input_norm=kind)).double().train()
    x = (batch(32) * 3 + 1).view(32, F, D)
    mean, var = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
    y = ssr.prepare(x.flatten(1))
    torch.testing.assert_close(y, ((x - mean) / (var + 1e-3).sqrt()).flatten(1))
    torch.testing.assert_close(ssr.input_norm.running_mean, 0.01 * mean.flatten())
    unbiased = x.var(over, unbiased=True)
    torch.testing.assert_close(ssr.input_norm.running_var, 0.99 + 0.01 * unbiased.flatten())


def test_a_training_batch_of_one_uses_the_running_statistics() -> None:
    ssr, x = build(input_norm="per_dim"), batch(1)
    expected = ssr(x)
    assert torch.equal(ssr.train()(x), expected)
    assert not ssr.input_norm.running_mean.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "static", "gate": True}, r"gate=True has no effect with filter='static'.*filter='dynamic'"),
        ({"filter": "static", "iterations": 3}, "iterations=3 has no effect"),
        ({"filter": "static", "alpha_init": 0.2}, r"alpha_init=0\.2 has no effect"),
        ({"filter": "dynamic", "index_seed": 3}, r"index_seed=3 has no effect with filter='dynamic'"),
        ({"num_view": 3}, "num_view"),
        ({"num_views": "8"}, "num_views"),
        ({"num_views": 0}, "num_views"),
        ({"fusion_layers": 3}, "fusion_layers"),
        ({"fusion_dropout": 1.0}, "fusion_dropout"),
        ({"output_mlp": [0]}, "output_mlp"),
        ({"alpha_init": float("nan")}, "alpha_init"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SSRConfig(**settings)


def test_a_dumped_config_can_be_read_again() -> None:
    for config in (
        SSRConfig(**STATIC, index_seed=2),
        SSRConfig(filter="dynamic", gate=True, alpha_init=-0.1, output_mlp=[4]),
    ):
        assert SSRConfig(**config.model_dump()) == config
        assert SSRConfig.model_validate_json(config.model_dump_json()) == config


def test_every_setting_says_what_it_means() -> None:
    assert [k for k, f in SSRConfig.model_fields.items() if k != "name" and not f.description] == []


def test_the_filter_names_are_those_of_the_table() -> None:
    assert set(FilterName.__args__) == set(FILTERS)


def test_input_norms_over_fields_need_equal_dims() -> None:
    for kind in ("per_field", "across_fields"):
        with pytest.raises(ValueError, match=rf"input_norm='{kind}'.*\[4, 2\].*per_dim"):
            SSR(2, [4, 2], 1, SSRConfig(**SMALL, input_norm=kind))
    assert SSR(2, [4, 2], 1, SSRConfig(**SMALL, input_norm="per_dim"))(torch.randn(3, 6)).shape == (3, V * DV)
