"""tools/bench_over_arch.py on tiny sizes: what it counts, finds, prints and refuses. Not its speed."""

import importlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssr_rec.over_archs.registry import OVER_ARCHS

TOOLS = Path(__file__).parents[2] / "tools"
F, D = 6, 4
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
SMALL = {
    "ssr": "ssr:num_views=3,view_dim=8",
    "mlp": "mlp:hidden=[12,12]",
    "deepfm": "deepfm:hidden=[12]",
    "dcn_v2": "dcn_v2:hidden=[12,12]",
    "mmoe": "mmoe:num_experts=2,expert_hidden=[12]",
    "ple": "ple:num_shared_experts=1,expert_hidden=[12]",
    "autoint": "autoint:num_layers=2,num_heads=1,attention_dim=8",
    "autofis": "autofis:hidden=[12],pairs=[[0,1],[2,5]]",
    "afn": "afn:num_neurons=5,hidden=[12]",
    "wukong": "wukong:hidden=[12],fmb_hidden=[8]",
    "rankmixer": "rankmixer:num_tokens=4,dim=8",
}


class Products(TorchDispatchMode):
    """FLOPs of matrix products by torch's own formulas; its FlopCounterMode does not go with autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def products(step) -> int:
    with Products() as counter:
        step()
    return counter.flops


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_over_arch")


@pytest.fixture
def cases(bench):
    return importlib.import_module("over_arch_cases")


def step_bytes():
    """The module beside it, once the fixture has put its folder on the path."""
    return importlib.import_module("step_bytes")


@pytest.fixture
def plain(cases):
    return cases.Setting(torch.device("cpu"), bf16=False, compile=False)


@pytest.fixture(autouse=True)
def keep_the_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_an_over_arch_is_its_name_and_its_keys(bench):
    assert set(SMALL) == set(OVER_ARCHS) == set(bench.SIZE_KEYS)
    mlp = bench.parse_over_arch("mlp:hidden=[3,4,5],dropout=0.5")
    assert (mlp.hidden, mlp.dropout) == ([3, 4, 5], 0.5)
    assert bench.parse_over_arch(SMALL["autofis"]).pairs == [(0, 1), (2, 5)]


@pytest.mark.parametrize(("name", "cost"), product(SMALL, ["flops", "parameters"]))
def test_equal_finds_the_nearest_size(bench, name, cost):
    config = bench.parse_over_arch(SMALL[name])
    key = bench.SIZE_KEYS[name]
    unit = 4 if name == "rankmixer" else 1

    def cost_of(size: int) -> int:
        value = [size] * len(getattr(config, key)) if isinstance(getattr(config, key), list) else size
        over_arch = OVER_ARCHS[name](F, D, 1, config.model_copy(update={key: value}))
        return over_arch.flops_per_sample if cost == "flops" else sum(p.numel() for p in over_arch.parameters())

    for side in (-unit, unit):
        target = cost_of(20) + 0.1 * (cost_of(20 + side) - cost_of(20))
        found = bench.resize(config, cost, target, F, D)
        size = getattr(found, key)
        assert set(size if isinstance(size, list) else [size]) == {20}
        assert found.model_copy(update={key: getattr(config, key)}) == config


@pytest.mark.parametrize(
    ("spec", "target", "message"),
    [
        ("mlp:hidden=[4]", 7, r"no nearer than 50, with hidden=1;"),
        ("dcn_v2:hidden=[]", 1e4, "hidden of dcn_v2, which is empty"),
        ("ssr:num_views=2,view_dim=8", 1e7, r"SSR-S 2x8x2 comes no nearer than .*view_dim=24"),
        ("ssr:filter=topk,num_views=2,view_dim=8,top_k=6", 10, "view_dim=6"),
    ],
)
def test_equal_refuses_what_no_size_reaches(bench, spec, target, message):
    with pytest.raises(ValueError, match=message):
        bench.resize(bench.parse_over_arch(spec), "flops", target, F, D)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_step_does_the_arithmetic_it_claims(bench, cases, plain, name, train):
    config = bench.parse_over_arch(SMALL[name])
    case = cases.over_arch_case(config, F, D, 7, train, plain)
    over_arch = OVER_ARCHS[name](F, D, 1, config)
    times = 3 if train else 1
    assert case.flops == times * 7 * over_arch.flops_per_sample
    # The backward may do less than twice the forward: the field pairs of AutoFIS, say, are no product there.
    counted = products(case.step) / (7 * over_arch.flops().matmul)
    exact = name in ("ssr", "mlp", "deepfm", "dcn_v2", "mmoe", "ple")
    assert counted == times if exact else 0.5 * times < counted <= times


def test_bytes_of_an_mlp_by_hand(bench, cases, plain):
    config = bench.parse_over_arch("mlp:hidden=[5,3]")
    inputs, weights, outputs = 7 * 24, 24 * 5 + 5 + 5 * 3 + 3, 7 * 3
    forward = cases.over_arch_case(config, F, D, 7, False, plain)
    assert forward.least_bytes == 4 * (inputs + weights + outputs)
    # Each of the two layers: addmm and ReLU; transposing the weight moves nothing.
    first, second = 24 * 5 + 5 + 7 * 24 + 7 * 5, 5 * 3 + 3 + 7 * 5 + 7 * 3
    assert step_bytes().bytes_moved(forward.step) == 4 * (first + 2 * 7 * 5 + second + 2 * 7 * 3)
    assert step_bytes().saved_bytes(forward.step, forward.resident) == 0

    both = cases.over_arch_case(config, F, D, 7, True, plain)
    assert both.least_bytes == 4 * (3 * (inputs + weights) + 2 * outputs)
    assert step_bytes().saved_bytes(both.step, both.resident) == 4 * (inputs + 7 * 5 + 7 * 3)
    assert step_bytes().saved_bytes(both.step, ()) == 4 * (inputs + 7 * 5 + 7 * 3 + 24 * 5 + 5 * 3)


def test_bytes_moved_by_operator(cases):
    a, b = torch.randn(4, 6), torch.randn(6)

    def moved(step) -> int:
        return step_bytes().bytes_moved(step) // 4

    assert moved(lambda: a.t().reshape(2, 3, 4)) == 0
    assert moved(lambda: torch.ops.aten._unsafe_view(a, [24])) == 0
    assert moved(lambda: a.t().reshape(24)) == 48
    assert moved(lambda: a + b.expand(4, 6)) == 24 + 6 + 24
    assert moved(lambda: a.add_(b)) == 24 + 6 + 24
    assert moved(lambda: a.copy_(b)) == 6 + 24
    assert moved(lambda: a.zero_()) == 24
    assert moved(lambda: torch.empty(9)) == 0
    assert moved(lambda: torch.cat([a, a])) == 96


def test_bf16_is_autocast(bench, cases):
    config = bench.parse_over_arch("mlp:hidden=[5]")
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        setting = cases.Setting(torch.device("cpu"), bf16=bf16, compile=False)
        case = cases.over_arch_case(config, F, D, 7, False, setting)
        assert [y.dtype for y in case.step()] == [dtype]
        assert case.least_bytes == 4 * (7 * 24 + 24 * 5 + 5) + dtype.itemsize * 7 * 5
        assert {g.dtype for g in cases.over_arch_case(config, F, D, 7, True, setting).step()} == {torch.float32}


def test_the_forward_alone_is_that_of_evaluation(bench, cases, plain):
    config = bench.parse_over_arch("mlp:hidden=[50],dropout=0.5")
    forward, both = (cases.over_arch_case(config, F, D, 7, train, plain).step for train in (False, True))
    assert torch.equal(*forward(), *forward()) and not torch.equal(both()[0], both()[0])
    assert not forward()[0].requires_grad


def test_the_option_or_the_config_compiles(bench, cases, plain, monkeypatch):
    monkeypatch.setattr(cases.torch, "compile", lambda module, **_: module)
    for option, key in ((False, "false"), (False, "true"), (True, "false")):
        config = bench.parse_over_arch(f"mlp:hidden=[5],compile={key}")
        setting = cases.Setting(plain.device, bf16=False, compile=option)
        assert cases.over_arch_case(config, F, D, 3, False, setting).fused is (option or key == "true")


def test_operators_and_the_products_of_their_layers(cases, plain):
    found = {case.name: case for case in cases.operator_cases(5, 3, 8, 2, plain)}
    z, parameters = 4 * 5 * 3 * 8, 4 * (3 * 2 + 3 * 8)
    assert found["relu fwd"].least_bytes == found["copy"].least_bytes == 2 * z
    assert found["ICS fwd"].least_bytes == 2 * z + parameters
    assert found["ICS fwd+bwd"].least_bytes == 5 * z + 3 * parameters
    for kind, matmul in (("SSR-S", 2 * 3 * 8 * 8), ("SSR-D", 2 * 3 * 8 * 8 + 2 * 24 * 24)):
        for way, times in (("fwd", 1), ("fwd+bwd", 3)):
            layer, gemms = found[f"{kind} layer {way}"], found[f"{kind} layer {way}: GEMMs"]
            assert gemms.flops == times * 5 * matmul < layer.flops
            for case in (found[f"{kind} layer {way}, plain"], gemms):
                assert products(case.step) == times * 5 * matmul
            # The product of the views reads x and V and writes as much as x; the projection likewise with its W.
            operands = 4 * (5 * 24 + 3 * 64 + (5 * 24 + 24 * 24 if kind == "SSR-D" else 0))
            written = 4 * 5 * 24 * (2 if kind == "SSR-D" else 1)
            assert gemms.least_bytes == (operands + written if times == 1 else 3 * operands + 2 * written)
            plain = found[f"{kind} layer {way}, plain"]
            assert (plain.flops, plain.least_bytes) == (layer.flops, layer.least_bytes)
            # GELU's slope is within 6e-7; gradients are sums of some dozens.
            torch.testing.assert_close(plain.step(), layer.step(), rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(found["ICS fwd+bwd, plain"].step(), found["ICS fwd+bwd"].step())
    assert len(found) == 18


def test_cases_take_turns_and_warm_up(cases, monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(cases.time, "perf_counter", lambda: clock[0])

    def case(name: str, seconds: float):
        def step() -> None:
            log.append(name)
            clock[0] += seconds if len(log) > 6 else 100

        return cases.Case(name, step, 0, 0)

    taken = cases.interleave([case("a", 1), case("b", 2), case("c", 4)], 40, 2, torch.device("cpu"))
    assert taken == [[1.0] * 40, [2.0] * 40, [4.0] * 40]
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(turns) == 42 and len({tuple(turn) for turn in turns}) == 6
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)


def test_warm_steps_follow_themselves(cases):
    log = []
    twins = [cases.Case(name, lambda name=name: log.append(name), 0, 0) for name in "abc"]
    taken = cases.interleave(twins, 20, 1, torch.device("cpu"), warm=True)
    assert [len(seconds) for seconds in taken] == [20] * 3 and len(log) == 2 * 3 * 21
    assert all(first == second for first, second in zip(log[::2], log[1::2], strict=True))


@pytest.mark.slow
def test_json_table_and_picture(bench, tmp_path, capsys):
    png = tmp_path / "p.png"
    specs = ["mlp:hidden=[12,12]", "ssr:num_views=3,view_dim=8", "ssr:num_views=3,view_dim=8,residual=true"]
    more = ["--operators", "--views", "3", "--view-dim", "8", "--iterations", "2"]
    small = [
        "--fields",
        "6",
        "--dim",
        "4",
        "--repetitions",
        "2",
        "--warmup",
        "1",
        "--batch",
        "5",
        "9",
        "--cache",
        "warm",
    ]
    assert bench.main(["--over-archs", *specs, *more, *small, "--plot", str(png)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)

    over_archs = figures["over_archs"]
    assert [(r["name"], r["batch"]) for r in over_archs] == [
        (name, batch) for batch in (5, 9) for name in ("Dense MLP 2x12", *specs[1:])
    ]
    for record, first in zip(over_archs, [over_archs[0]] * 3 + [over_archs[3]] * 3, strict=True):
        median = record["seconds"]["median"]
        assert record["seconds"]["p10"] <= median <= record["seconds"]["p90"] and median > 0
        assert record["flops"] == 3 * record["batch"] * sum(record["flops_per_sample"].values())
        assert record["flops_per_s"] == pytest.approx(record["flops"] / median)
        assert record["samples_per_s"] == pytest.approx(record["batch"] / median)
        assert record["least_bytes_per_s"] == pytest.approx(record["least_bytes"] / median)
        assert record["ratio"]["seconds"] == pytest.approx(median / first["seconds"]["median"])
        assert record["ratio"]["flops_per_s"] == pytest.approx(record["flops_per_s"] / first["flops_per_s"])
        assert record["bytes_moved"] > record["least_bytes"] and record["saved_bytes"] > 0
        assert record["peak_bytes"] is None
    assert over_archs[0]["parameters"] == 24 * 12 + 12 + 12 * 12 + 12

    operators = {(r["name"], r["batch"]): r for r in figures["operators"]}
    assert len(operators) == 36
    for batch in (5, 9):
        times = {name: r["seconds"]["median"] for (name, rows), r in operators.items() if rows == batch}
        for name in ("ICS fwd", "ICS fwd+bwd"):
            others = (f"{name}, plain", "relu fwd", "copy")
            assert operators[name, batch]["ratio"] == pytest.approx({o: times[name] / times[o] for o in others})
        layer = "SSR-D layer fwd+bwd"
        expected = {other: times[layer] / times[other] for other in (f"{layer}: GEMMs", f"{layer}, plain")}
        assert operators[layer, batch]["ratio"] == pytest.approx(expected)
        assert operators["copy", batch]["ratio"] == {}

    settings = figures["settings"]
    assert (settings["batch"], settings["mode"], settings["iterations"]) == ([5, 9], "train", 2)
    assert sum(line.startswith("| ") for line in lines) == (2 + 6) + (2 + 36)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_equal_and_forward_are_stated(bench, capsys):
    more = ["--fields", "6", "--dim", "4", "--repetitions", "1", "--warmup", "1", "--batch", "3", "--mode", "forward"]
    specs = ["mlp:hidden=[9,9]", "ssr:num_views=3,view_dim=8"]
    assert bench.main(["--over-archs", *specs, "--equal", "flops", "2e3", *more]) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    # 2 * 24 n + n + 2 n n + n, and n ReLUs twice: 52 n + 2 n^2.
    assert first == "Dense MLP 2x21: hidden=[21, 21] has 1,974 flops, -1.3%"
    # Two layers of 3 views: 2 n n, and 13 n for the bias, GELU and LayerNorm: 12 n^2 + 78 n.
    assert second == "SSR-S 3x10x2: view_dim=10 has 1,980 flops, -1.0%"
    figures = json.loads(last)
    assert [r["flops"] for r in figures["over_archs"]] == [3 * 1974, 3 * 1980] and not figures["operators"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--over-archs", "mpl"], "over-arch 'mpl': over_arch: "),
        (["--over-archs", "mlp:hiden=[3]"], "did you mean 'hidden'?"),
        (["--over-archs", "mlp:hidden"], "over-arch 'mlp:hidden' is not name:key=value"),
        (["--over-archs", "mlp:hidden=[0]"], "hidden"),
        (["--over-archs", "ssr", "--fields", "2", "--dim", "3"], "view_dim=128"),
        (["--over-archs", "mlp", "--equal", "watts", "3"], "--equal watts: must be flops or parameters"),
        (["--over-archs", "mlp", "--equal", "flops", "nan"], "--equal flops nan: the value must be"),
        (["--operators", "--equal", "flops", "3"], "--equal has no effect without --over-archs"),
        (["--over-archs", "mlp", "--view-dim", "3"], "--view-dim has no effect without --operators"),
        (["--operators", "--batch", "4", "0"], "--batch [4, 0]: must be at least 1"),
        (["--operators", "--plot", "no/such/p.png"], "there is no folder no/such"),
        pytest.param(["--operators", "--device", "cuda"], "torch sees no GPU here", marks=no_gpu),
    ],
)
def test_refusals(bench, capsys, arguments, message):
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and not captured.out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(bench, capsys):
    arguments = ["--over-archs", "mlp:hidden=[64]", "--device", "cuda", "--repetitions", "3", "--batch", "256"]
    assert bench.main(arguments) == 0
    (record,) = json.loads(capsys.readouterr().out.splitlines()[-1])["over_archs"]
    assert record["peak_bytes"] >= 4 * (256 * 64 + 256 * 624 + 624 * 64)


@pytest.mark.slow
def test_compiled(bench, capsys):
    arguments = ["--over-archs", "mlp:hidden=[8]", "ssr:num_views=2,view_dim=8", "--fields", "6", "--dim", "4"]
    small = ["--operators", "--views", "2", "--view-dim", "8", "--compile", "--repetitions", "2", "--batch", "5"]
    assert bench.main([*arguments, *small]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["bytes_moved"], r["saved_bytes"] > 0) for r in figures["over_archs"]] == [(None, True)] * 2
    operators = {r["name"]: r for r in figures["operators"]}
    layer = "SSR-D layer fwd+bwd"
    assert set(operators[layer]["ratio"]) == {layer + form for form in (", plain", ", plain compiled", ": GEMMs")}
    assert operators["ICS fwd, plain"]["bytes_moved"] and not operators["ICS fwd, plain compiled"]["bytes_moved"]
