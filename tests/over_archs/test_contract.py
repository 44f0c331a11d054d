"""What every over-arch keeps to, whatever it computes."""

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs import OVER_ARCHS, OverArch, OverArchConfig

F, D, T = 5, 4, 2
DIMS = [3, 1, 8, 2, 6]
CONFIGS = TypeAdapter(OverArchConfig)
SMALL_SSR = {"name": "ssr", "filter": "dynamic", "num_views": 3, "view_dim": 8, "num_layers": 2}
EVERY_SWITCH = {"residual": True, "fusion_layers": 2, "input_norm": "per_dim", "output": "mean", "output_mlp": [6]}
CASES: dict[str, dict[str, Any]] = {
    "ssr-d": {**SMALL_SSR},
    "ssr-d switched": {**SMALL_SSR, **EVERY_SWITCH, "gate": True},
    "ssr-s": {**SMALL_SSR, "filter": "static"},
    "ssr-s switched": {**SMALL_SSR, **EVERY_SWITCH, "filter": "static"},
    "mlp": {"name": "mlp", "hidden": [16, 8]},
    "mlp switched": {
        "name": "mlp",
        "hidden": [16, 8],
        "activation": "gelu",
        "layer_norm": True,
        "input_norm": "per_dim",
    },
}

every_case = pytest.mark.parametrize("case", CASES)


def build(case: str, dims: int | list[int] = D, seed: int = 0) -> OverArch:
    torch.manual_seed(seed)
    config = CONFIGS.validate_python(CASES[case])
    return OVER_ARCHS[config.name](F, dims, T, config)


def batch(rows: int = 16, width: int = F * D) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(5))


def test_every_over_arch_has_a_case_and_a_config() -> None:
    names = {case["name"] for case in CASES.values()}
    config_names = {
        get_args(config.model_fields["name"].annotation)[0] for config in get_args(get_args(OverArchConfig)[0])
    }
    assert names == config_names == set(OVER_ARCHS)


@every_case
@pytest.mark.parametrize("dims", [D, DIMS], ids=["equal dims", "dims per field"])
@pytest.mark.parametrize("rows", [1, 7])
def test_shape(case: str, dims: int | list[int], rows: int) -> None:
    over_arch = build(case, dims).eval()
    y = over_arch(batch(rows, 20))
    assert y.shape in ((rows, over_arch.out_features), (rows, T, over_arch.out_features))
    assert y.isfinite().all()


@every_case
def test_rows_are_scored_apart(case: str) -> None:
    over_arch, x = build(case).eval(), batch()
    torch.testing.assert_close(torch.cat([over_arch(row[None]) for row in x]), over_arch(x))


@every_case
def test_every_parameter_and_the_input_get_a_gradient(case: str) -> None:
    over_arch, x = build(case), batch(64).requires_grad_()
    y = over_arch(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, tensor in [("x", x), *over_arch.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@every_case
def test_the_seed_decides_the_weights_and_the_output(case: str) -> None:
    first, again, other = build(case, seed=1), build(case, seed=1), build(case, seed=2)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert torch.equal(first(batch()), again(batch()))
    assert not torch.equal(first(batch()), other(batch()))


@every_case
def test_state_dict_round_trip(case: str) -> None:
    source, target = build(case, seed=1), build(case, seed=2).eval()
    source(batch())  # running statistics are part of the state too
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(batch()), source.eval()(batch()))


@every_case
def test_num_parameters(case: str) -> None:
    over_arch = build(case)
    assert over_arch.num_parameters == sum(p.numel() for p in over_arch.parameters()) > 0
    next(over_arch.parameters()).requires_grad_(False)
    assert over_arch.num_parameters == sum(p.numel() for p in list(over_arch.parameters())[1:])


@every_case
def test_flops_per_sample(case: str) -> None:
    over_arch = build(case).eval()
    with FlopCounterMode(display=False) as counter:
        over_arch(batch(8))
    assert over_arch.flops().matmul * 8 == counter.get_total_flops()
    assert over_arch.flops_per_sample == over_arch.flops().matmul + over_arch.flops().elementwise
    assert over_arch.flops().elementwise > 0


@every_case
def test_export_with_any_batch_size(case: str) -> None:
    over_arch = build(case).eval()
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(over_arch, (batch(4),), dynamic_shapes=({0: rows},), strict=True)
    for n in (1, 9):
        torch.testing.assert_close(program.module()(batch(n)), over_arch(batch(n)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["ssr-d", "ssr-s", "mlp"])
def test_compiles_forward_and_backward_in_one_graph(case: str, backend: str) -> None:
    over_arch, x = build(case).double(), batch().double()
    compiled = torch.compile(over_arch, fullgraph=True, backend=backend)
    weight = torch.randn(len(x), over_arch.out_features).double()
    results = []
    for forward in (compiled, over_arch):
        over_arch.zero_grad()
        y = forward(x)
        (y * weight).sum().backward()
        results.append((y, [p.grad.clone() for p in over_arch.parameters()]))
    torch.testing.assert_close(*results)


@every_case
def test_bfloat16_autocast(case: str) -> None:
    over_arch = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = over_arch(batch())
        y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in over_arch.parameters())
    torch.testing.assert_close(y.float(), build(case)(batch()), rtol=0.1, atol=0.25)


def test_importing_an_over_arch_does_not_import_torchrec() -> None:
    code = "import sys; from ssr_rec.over_archs import SSR, SSRConfig; sys.exit('torchrec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", OVER_ARCHS)
@pytest.mark.parametrize(
    ("fields", "dims", "tasks", "message"),
    [
        (0, 4, 1, "num_fields=0"),
        (2, [4], 1, "1 dims for num_fields=2"),
        (2, [4, 0], 1, "at least one dim"),
        (2, 4, 0, "num_tasks=0"),
    ],
)
def test_impossible_shapes_are_refused(name: str, fields: int, dims: Any, tasks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OVER_ARCHS[name](fields, dims, tasks, CONFIGS.validate_python({"name": name}))


@pytest.mark.parametrize("config", [{"name": "nope"}, {"num_views": 3}, {"name": "mlp", "num_views": 3}])
def test_the_name_decides_which_settings_exist(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CONFIGS.validate_python(config)
