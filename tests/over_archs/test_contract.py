"""What every over-arch keeps to, whatever it computes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.registry import OVER_ARCHS
from ssr_rec.training.optimizer import is_decayed
from tests.cases import slow

F, D, T = 5, 4, 2
DIMS = [3, 1, 8, 2, 6]
CONFIGS = TypeAdapter(OverArchConfig)
SMALL_SSR = {"name": "ssr", "filter": "dynamic", "num_views": 3, "view_dim": 8, "num_layers": 2}
EVERY_SWITCH = {"residual": True, "fusion_layers": 2, "input_norm": "per_dim", "output": "mean", "output_mlp": [6]}
CASES: dict[str, dict[str, Any]] = {
    "ssr-d": {**SMALL_SSR},
    "ssr-d switched": {**SMALL_SSR, **EVERY_SWITCH, "gate": True},
    "ssr-d wider before the fusion": {**SMALL_SSR, "filter_dim": 13, "gate": True},
    "ssr-s": {**SMALL_SSR, "filter": "static"},
    "ssr-s residual": {**SMALL_SSR, "filter": "static", "residual": True, "output": "mean"},
    "ssr-a": {**SMALL_SSR, "filter": "adaptive"},
    "ssr-s switched": {**SMALL_SSR, **EVERY_SWITCH, "filter": "static"},
    "ssr top-k": {**SMALL_SSR, "filter": "topk", "top_k": 4},
    "ssr without filter": {**SMALL_SSR, "filter": "none"},
    "dcn_v2": {"name": "dcn_v2", "hidden": [16, 8]},
    "dcn_v2 switched": {
        "name": "dcn_v2",
        "num_cross_layers": 2,
        "rank": 3,
        "structure": "stacked",
        "hidden": [16, 8],
        "layer_norm": True,
        "input_norm": "per_dim",
    },
    "dcn_v2 cross only": {"name": "dcn_v2", "num_cross_layers": 2, "hidden": []},
    "dcn_v2 mixture": {"name": "dcn_v2", "num_cross_layers": 2, "rank": 3, "num_experts": 4, "hidden": [8]},
    "autoint": {"name": "autoint", "num_layers": 2, "num_heads": 2, "attention_dim": 4},
    "autoint switched": {
        "name": "autoint",
        "num_layers": 2,
        "num_heads": 3,
        "attention_dim": 4,
        "scale": True,
        "residual": False,
        "layer_norm": True,
        "deep_hidden": [16, 8],
        "input_norm": "across_fields",
    },
    "autofis search": {"name": "autofis", "hidden": [16, 8]},
    "autofis search switched": {
        "name": "autofis",
        "hidden": [16, 8],
        "layer_norm": True,
        "input_norm": "per_field",
        "initializer": "torch",
        "grda_c": 0.01,
    },
    "autofis": {"name": "autofis", "hidden": [16, 8], "pairs": [[0, 1]]},
    "autofis many pairs switched": {
        "name": "autofis",
        "hidden": [16, 8],
        "pairs": [[0, 4], [1, 2], [2, 3]],
        "input_norm": "per_dim",
    },
    "autofis no pairs": {"name": "autofis", "hidden": [16, 8], "pairs": []},
    "rankmixer": {"name": "rankmixer", "num_tokens": 3, "dim": 12, "num_layers": 2},
    "rankmixer switched": {
        "name": "rankmixer",
        "num_tokens": 4,
        "dim": 8,
        "num_layers": 1,
        "ffn_ratio": 3,
        "input_norm": "per_dim",
        "initializer": "torch",
    },
    "wukong": {
        "name": "wukong",
        "num_layers": 2,
        "fmb_embeddings": 2,
        "lcb_embeddings": 3,
        "fm_rank": 3,
        "fmb_hidden": [8],
        "hidden": [8],
    },
    "wukong switched": {
        "name": "wukong",
        "num_layers": 2,
        "fmb_embeddings": 4,
        "lcb_embeddings": 3,
        "fm_rank": 2,
        "fmb_hidden": [],
        "hidden": [],
        "input_norm": "per_field",
        "initializer": "torch",
    },
    "mmoe": {"name": "mmoe", "num_experts": 3, "expert_hidden": [8, 6], "tower_hidden": [5]},
    "ple": {
        "name": "ple",
        "num_task_experts": 1,
        "num_shared_experts": 2,
        "expert_hidden": [8, 6],
        "tower_hidden": [5],
    },
    "ple switched": {
        "name": "ple",
        "num_levels": 1,
        "expert_hidden": [8],
        "tower_hidden": [],
        "input_norm": "per_dim",
        "initializer": "torch",
    },
    "mmoe switched": {
        "name": "mmoe",
        "num_experts": 2,
        "expert_hidden": [8],
        "tower_hidden": [],
        "input_norm": "per_dim",
        "initializer": "torch",
    },
    "deepfm": {"name": "deepfm", "hidden": [16, 8]},
    "deepfm switched": {
        "name": "deepfm",
        "hidden": [16, 8],
        "layer_norm": True,
        "input_norm": "per_field",
        "initializer": "torch",
    },
    "afn": {"name": "afn", "num_neurons": 6, "hidden": [16, 8]},
    "afn switched": {
        "name": "afn",
        "num_neurons": 6,
        "hidden": [16, 8],
        "batch_norm": False,
        "hidden_norm": "layer",
        "input_norm": "per_dim",
        "initializer": "torch",
    },
    "afn+": {"name": "afn", "num_neurons": 6, "hidden": [16, 8], "plus": True, "deep_hidden": [12, 4]},
    "afn+ switched": {
        "name": "afn",
        "num_neurons": 6,
        "hidden": [16, 8],
        "plus": True,
        "deep_hidden": [12, 4],
        "hidden_norm": "none",
        "input_norm": "per_field",
    },
    "mlp": {"name": "mlp", "hidden": [16, 8]},
    "mlp switched": {
        "name": "mlp",
        "hidden": [16, 8],
        "activation": "gelu",
        "layer_norm": True,
        "input_norm": "per_dim",
    },
}

EQUAL_DIMS_ONLY = {"deepfm", "autofis", "autoint", "afn", "wukong"}

every_case = pytest.mark.parametrize("case", CASES)


def build(case: str, dims: int | list[int] = D, seed: int = 0) -> OverArch:
    torch.manual_seed(seed)
    config = CONFIGS.validate_python(CASES[case])
    return OVER_ARCHS[config.name](F, dims, T, config)


def batch(over_arch: OverArch, rows: int = 16) -> tuple[Tensor, ...]:
    """x and the embeddings of the over-arch's extra tables."""
    generator = torch.Generator().manual_seed(5)
    widths = [over_arch.in_features, *map(sum, over_arch.extra_tables.values())]
    return tuple(torch.randn(rows, width, generator=generator) for width in widths)


def parts(y: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Features, and the logits that some over-archs bring."""
    return y if isinstance(y, tuple) else (y,)


def weighted_sum(y: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    torch.manual_seed(11)
    return torch.stack([(part.double() * torch.randn(part.shape)).sum() for part in parts(y)]).sum()


def test_every_over_arch_has_a_case_and_a_config() -> None:
    names = {case["name"] for case in CASES.values()}
    config_names = {
        get_args(config.model_fields["name"].annotation)[0] for config in get_args(get_args(OverArchConfig)[0])
    }
    assert names == config_names - {"custom"} == set(OVER_ARCHS)


@every_case
@pytest.mark.parametrize("dims", [D, DIMS], ids=["equal dims", "dims per field"])
@pytest.mark.parametrize("rows", [1, 7])
def test_shape(case: str, dims: int | list[int], rows: int) -> None:
    if dims == DIMS and CASES[case]["name"] in EQUAL_DIMS_ONLY:
        with pytest.raises(ValueError, match="equal dims"):
            build(case, dims)
        return
    over_arch = build(case, dims).eval()
    features, *logits = parts(over_arch(*batch(over_arch, rows)))
    assert features.shape in ((rows, over_arch.out_features), (rows, T, over_arch.out_features))
    assert features.isfinite().all()
    assert all(added.shape == (rows, T) and added.isfinite().all() for added in logits)


@every_case
def test_rows_are_scored_apart(case: str) -> None:
    over_arch = build(case).eval()
    inputs = batch(over_arch)
    single = [parts(over_arch(*(x[i : i + 1] for x in inputs))) for i in range(16)]
    for alone, together in zip(map(torch.cat, zip(*single, strict=True)), parts(over_arch(*inputs)), strict=True):
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * max(1.0, float(together.detach().abs().max())))


@every_case
def test_every_parameter_and_the_input_get_a_gradient(case: str) -> None:
    over_arch = build(case)
    inputs = [x.requires_grad_() for x in batch(over_arch, 64)]
    weighted_sum(over_arch(*inputs)).backward()
    for name, tensor in [*zip(["x", *over_arch.extra_tables], inputs, strict=True), *over_arch.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@every_case
def test_the_seed_decides_the_weights_and_the_output(case: str) -> None:
    first, again, other = build(case, seed=1), build(case, seed=1), build(case, seed=2)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    inputs = batch(first)
    outputs = [parts(over_arch(*inputs))[0] for over_arch in (first, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@every_case
def test_state_dict_round_trip(case: str) -> None:
    source, target = build(case, seed=1), build(case, seed=2).eval()
    inputs = batch(source)
    source(*inputs)  # running statistics are part of the state too
    target.load_state_dict(source.state_dict())
    assert all(map(torch.equal, parts(target(*inputs)), parts(source.eval()(*inputs))))


@every_case
def test_num_parameters(case: str) -> None:
    over_arch = build(case)
    assert over_arch.num_parameters == sum(p.numel() for p in over_arch.parameters()) > 0
    next(over_arch.parameters()).requires_grad_(False)
    assert over_arch.num_parameters == sum(p.numel() for p in list(over_arch.parameters())[1:])


@every_case
def test_flops_per_sample(case: str) -> None:
    over_arch = build(case).eval()
    over_arch(*batch(over_arch, 8))  # the counter takes the operators that are there when it is made
    with FlopCounterMode(display=False) as counter:
        over_arch(*batch(over_arch, 8))
    assert over_arch.flops().matmul * 8 == counter.get_total_flops()
    assert over_arch.flops_per_sample == over_arch.flops().matmul + over_arch.flops().elementwise
    assert over_arch.flops().elementwise > 0


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in ("ssr-s", "ssr-d", "mlp") else pytest.mark.slow) for name in CASES]
)
def test_export_with_any_batch_size(case: str) -> None:
    over_arch = build(case).eval()
    rows = {0: torch.export.Dim("rows", min=1)}
    example = batch(over_arch, 4)
    program = torch.export.export(over_arch, example, dynamic_shapes=(rows,) * len(example), strict=True)
    for n in (1, 9):
        inputs = batch(over_arch, n)
        torch.testing.assert_close(parts(program.module()(*inputs)), parts(over_arch(*inputs)))


# Their operators are those of others in CASES, so that capturing them is enough.
ALIKE = ["ssr-d wider before the fusion", "ssr-s residual", "ssr-a", "dcn_v2 cross only", "autofis no pairs"]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("ssr-s", "aot_eager"),
        ("ssr-d", "aot_eager"),
        *(slow((name, "aot_eager" if name in ALIKE else "inductor")) for name in CASES if "switched" not in name),
    ],
)
def test_compiles_forward_and_backward_in_one_graph(case: str, backend: str) -> None:
    torch._dynamo.reset()  # as many models in one process as here are more than it compiles one function for
    over_arch = build(case).double()
    inputs = [x.double() for x in batch(over_arch)]
    start = {key: value.clone() for key, value in over_arch.state_dict().items()}
    compiled = torch.compile(over_arch, fullgraph=True, backend=backend)
    results = []
    for forward in (compiled, over_arch):
        over_arch.load_state_dict(start)  # running statistics are back where they were
        over_arch.zero_grad()
        y = forward(*inputs)
        weighted_sum(y).backward()
        results.append((parts(y), [p.grad.clone() for p in over_arch.parameters()]))
    torch.testing.assert_close(*results)


@every_case
def test_bfloat16_autocast(case: str) -> None:
    over_arch = build(case)
    inputs = batch(over_arch)
    with torch.autocast("cpu", torch.bfloat16):
        y = over_arch(*inputs)
        weighted_sum(y).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in over_arch.parameters())
    for rough, exact in zip(parts(y), parts(build(case)(*inputs)), strict=True):
        # On average: top-k may choose another dim after rounding.
        assert (rough.float() - exact).abs().mean() < 0.02 + 0.02 * exact.abs().mean()


@pytest.mark.slow
def test_importing_an_over_arch_does_not_import_torchrec_and_builds_nothing(tmp_path: Path) -> None:
    code = "import sys; from ssr_rec.over_archs import SSR, SSRConfig; sys.exit('torchrec' in sys.modules)"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("surplus", [-1, 1, D])
def test_x_of_another_width_is_refused(case: str, surplus: int) -> None:
    over_arch = build(case)
    x, *extra = batch(over_arch)
    wrong = torch.randn(len(x), over_arch.in_features + surplus)
    with pytest.raises(
        ValueError, match=rf"x is {wrong.shape[1]} wide, \w+ was built for {over_arch.in_features}, 5 fields"
    ):
        over_arch(wrong, *extra)


@pytest.mark.parametrize("case", CASES)
def test_weight_decay_is_of_weights_alone(case: str) -> None:
    over_arch = build(case)
    spared = {n for n, m in over_arch.named_modules() if "norm" in n.lower() or "Norm" in type(m).__name__}
    for name, parameter in over_arch.named_parameters():
        owner, _, last = name.rpartition(".")
        plain = last not in ("bias", "alpha", "gamma") and owner not in spared and parameter.dim() > 1
        assert is_decayed(f"module.dense.over_arch.{name}", parameter) == plain, name
    decayed = [name for name, p in over_arch.named_parameters() if is_decayed(name, p)]
    assert decayed, "an over-arch without weights"
