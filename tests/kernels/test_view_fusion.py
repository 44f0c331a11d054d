"""The C++ filter-and-fuse against plain loops, the plain torch form and torch's checks of a custom operator."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.kernels import view_fusion
from ssr_rec.kernels.reference import view_fusion_reference
from tests.kernels.plain_loops import fusion_by_loops, needs_compiler

pytestmark = needs_compiler

EPS = 1e-6
SHAPES = {
    # views, dims seen, dims out, width of the input (0: each view has its own)
    "narrow": (3, 8, 8, 20),
    "odd": (2, 5, 7, 11),
    "one view": (1, 16, 16, 40),
    "wide": (2, 128, 128, 200),
    "own input": (2, 16, 16, 0),
    "own odd input": (3, 20, 5, 0),
    "own wide input": (2, 48, 130, 0),
}
NAMES = ("x", "indices", "weight", "bias", "residual", "scale", "shift")


def inputs(
    shape: str,
    rows: int,
    residual: bool = False,
    norm: bool = True,
    dtype: torch.dtype = torch.float64,
    keep: bool = False,
) -> dict[str, Tensor | None]:
    views, seen, dim, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(rows)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "x": draw(rows, width) if width else draw(rows, views, seen),
        "indices": torch.stack([torch.randperm(width, generator=generator)[:seen] for _ in range(views)])
        if width
        else None,
        "weight": draw(views, seen, dim) / seen**0.5,
        "bias": 0.3 * draw(views, dim),
        "residual": draw(rows, views, dim) if residual else None,
        "scale": draw(views, dim) if norm else None,
        "shift": draw(views, dim) if norm else None,
    } | ({"keep": draw(rows, views, dim) > -0.5, "keep_share": 0.7} if keep else {})


def is_real(value: Tensor | float | None) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run(tensors: dict[str, Tensor | None], form: Any = view_fusion) -> list[Tensor]:
    """y and the gradients of all floating inputs."""
    args = {name: t.detach().clone().requires_grad_() if is_real(t) else t for name, t in tensors.items()}
    y = form(**args, eps=EPS)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    leaves = [t for t in args.values() if is_real(t)]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_near(ours: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, plain, strict=True):
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(largest, 1e-30), check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "norm"), [(False, True), (True, True), (True, False), (False, False)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37, 300, 530])
def test_equals_the_plain_form(shape: str, residual: bool, norm: bool, rows: int, keep: bool) -> None:
    tensors = inputs(shape, rows, residual, norm, keep=keep)
    plain = run(tensors, view_fusion_reference)
    assert_near(run(tensors), plain, 1e-11)
    small = {name: t.float() if is_real(t) else t for name, t in tensors.items()}
    ours = run(small)
    assert all(t.dtype == torch.float32 for t in ours)
    assert_near([t.double() for t in ours], plain, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "norm"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("keep", [False, True])
def test_equals_plain_loops(shape: str, residual: bool, norm: bool, keep: bool) -> None:
    tensors = inputs(shape, 9, residual, norm, keep=keep)
    a = {name: t.numpy() if isinstance(t, Tensor) else t for name, t in tensors.items()}
    x, indices = a.pop("x"), a.pop("indices")
    h = x if indices is None else np.stack([row[indices] for row in x])
    plain = fusion_by_loops(h, eps=EPS, **a)
    np.testing.assert_allclose(view_fusion(**tensors, eps=EPS).numpy(), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["odd", "own odd input"])
@pytest.mark.parametrize(("residual", "norm"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("keep", [False, True])
def test_gradcheck(shape: str, residual: bool, norm: bool, keep: bool) -> None:
    tensors = inputs(shape, 3, residual, norm, keep=keep)
    names = [name for name, t in tensors.items() if is_real(t)]
    leaves = [tensors[name].requires_grad_() for name in names]
    # A large eps: with the real one the third derivative is too large for a difference quotient.
    assert torch.autograd.gradcheck(
        lambda *given: view_fusion(**(tensors | dict(zip(names, given, strict=True))), eps=0.1),
        leaves,
        fast_mode=keep or shape != "odd",
    )


def test_gelu_in_float32_is_exact_to_a_few_units() -> None:
    z = torch.cat([torch.linspace(-7, 7, 200_001), torch.tensor([-1e4, -30.0, 30.0, 1e4])])
    one = torch.ones(1, 1, 1)
    leaf = z.reshape(-1, 1, 1).clone().requires_grad_()
    y = view_fusion(leaf, None, one, torch.zeros(1, 1))
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    exact = z.double().requires_grad_()
    value = torch.nn.functional.gelu(exact)
    (exact_slope,) = torch.autograd.grad(value.sum(), exact)
    assert ((y.flatten().double() - value).abs() / z.double().abs().clamp(min=1)).max() < 5e-7
    assert (slope.flatten().double() - exact_slope).abs().max() < 1e-6


def test_a_nan_and_an_infinity_stay_in_their_row() -> None:
    tensors = inputs("wide", 40, dtype=torch.float32)
    assert tensors["x"] is not None and tensors["indices"] is not None
    clean = view_fusion(**tensors, eps=EPS)
    tensors["x"][3, tensors["indices"][0, 0]] = float("nan")
    tensors["x"][5, tensors["indices"][0, 1]] = float("inf")
    spoilt, plain = view_fusion(**tensors, eps=EPS), view_fusion_reference(**tensors, eps=EPS)
    assert torch.equal(spoilt.isnan(), plain.isnan()) and spoilt[3, 0].isnan().all() and spoilt[5, 0].isnan().all()
    others = [i for i in range(40) if i not in (3, 5)]
    assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("shape", ["narrow", "own input", "wide"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_same_bits_in_every_run_and_for_any_number_of_threads(shape: str, keep: bool) -> None:
    tensors = inputs(shape, 700, True, dtype=torch.float32, keep=keep)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("shape", ["wide", "own wide input"])
def test_inputs_with_any_strides(shape: str) -> None:
    tensors = inputs(shape, 40, True, keep=True)
    strided = {
        name: t.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    assert not any(t.is_contiguous() for t in strided.values() if isinstance(t, Tensor))
    plain = run(tensors)
    assert all(map(torch.equal, run(strided), plain))
    x = tensors["x"]
    assert x is not None
    padded = torch.cat([x, x], -1)[..., : x.shape[-1]]
    assert all(map(torch.equal, run(tensors | {"x": padded}), plain))


def test_one_input_for_all_views_by_expansion() -> None:
    tensors = inputs("own input", 40)
    shared = torch.randn(40, 16, dtype=torch.float64).requires_grad_()
    results = []
    for form in (view_fusion, view_fusion_reference):
        y = form(**(tensors | {"x": shared.unsqueeze(1).expand(-1, 2, -1)}), eps=EPS)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), shared)])
    assert_near(*results, 1e-11)


@pytest.mark.parametrize(("shape", "norm"), [("wide", True), ("own input", True), ("wide", False)])
def test_little_is_saved_and_nothing_without_a_gradient(shape: str, norm: bool) -> None:
    tensors, rows = inputs(shape, 40, norm=norm), 40
    views, _, dim, _ = SHAPES[shape]
    given = {t.data_ptr() for t in tensors.values() if t is not None}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert tensors["weight"] is not None
        view_fusion(**(tensors | {"weight": tensors["weight"].requires_grad_()}), eps=EPS)
    new = sorted(t.numel() for t in saved if t.data_ptr() not in given and t.numel())
    assert new == sorted([rows * views * dim] + [2 * rows * views] * norm)
    plain = run(tensors)[0]
    with torch.no_grad():
        assert torch.equal(view_fusion(**tensors, eps=EPS), plain)


def test_an_input_without_gradient_costs_no_product() -> None:
    tensors = inputs("wide", 40, dtype=torch.float32)
    views, seen, dim, _ = SHAPES["wide"]
    product = 2 * 40 * views * seen * dim
    for asks, products in ((True, 3), (False, 2)):
        args = {name: t if t is None else t.clone() for name, t in tensors.items()}
        args["x"].requires_grad_(asks)
        args["weight"].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            view_fusion(**args, eps=EPS).sum().backward()
        assert counter.get_total_flops() == products * product
        assert (args["x"].grad is not None) == asks
        assert torch.equal(args["weight"].grad, _weight_grad(tensors))


COUNTED_IN_A_FRESH_PROCESS = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from ssr_rec.kernels import view_fusion

def count(counter):
    x, indices = torch.randn(6, 10), torch.randint(0, 10, (2, 4))
    weight = torch.randn(2, 4, 8, requires_grad=True)
    with counter:
        view_fusion(x, indices, weight, torch.zeros(2, 8)).sum().backward()
    return counter.get_total_flops()

early = FlopCounterMode(display=False)
print(count(FlopCounterMode(display=False)), count(early), count(FlopCounterMode(display=False)))
"""


@pytest.mark.slow
def test_a_counter_made_before_the_operators_are_there_counts_them() -> None:
    command = [sys.executable, "-c", COUNTED_IN_A_FRESH_PROCESS]
    counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert counts == [str(2 * 2 * 6 * 2 * 4 * 8)] * 3


def _weight_grad(tensors: dict[str, Tensor | None]) -> Tensor:
    assert tensors["weight"] is not None
    weight = tensors["weight"].clone().requires_grad_()
    view_fusion(**(tensors | {"weight": weight}), eps=EPS).sum().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize(
    ("shape", "residual", "norm", "keep"),
    [
        ("narrow", False, True, False),
        ("own odd input", True, False, True),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("narrow", False, True, True),
                ("narrow", True, False, False),
                ("narrow", True, False, True),
                ("own odd input", False, True, False),
                ("own odd input", False, True, True),
                ("own odd input", True, False, False),
            ]
        ],
    ],
)
def test_torchs_checks_of_an_operator(shape: str, residual: bool, norm: bool, keep: bool) -> None:
    tensors = inputs(shape, 4, residual, norm, keep=keep)
    kept = (tensors["keep"], tensors["keep_share"]) if keep else ()
    plain = tuple(tensors[name] for name in NAMES)
    leaves = tuple(t.clone().requires_grad_() if is_real(t) else t for t in plain)
    torch.library.opcheck(torch.ops.ssr_rec.view_fusion.default, (*leaves, EPS, *kept))
    for save in (True, False):
        torch.library.opcheck(torch.ops.ssr_rec.view_fusion_forward.default, (*plain, EPS, save, *kept))
    y, pre, stats = torch.ops.ssr_rec.view_fusion_forward(*plain, EPS, True, *kept)
    for need_x in (True, False):
        arguments = (y, *plain[:6], pre, stats, need_x, *kept)
        torch.library.opcheck(torch.ops.ssr_rec.view_fusion_backward.default, arguments)


def test_the_results_of_a_single_view_share_no_memory() -> None:
    *given, shift = (inputs("one view", 4)[name] for name in NAMES)
    y, pre, stats = torch.ops.ssr_rec.view_fusion_forward(*given, shift, EPS, True)
    arguments = (y, *given, pre, stats, True)
    torch.library.opcheck(torch.ops.ssr_rec.view_fusion_backward.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dim_that_a_view_sees_more_than_once(rows: int, dtype: torch.dtype) -> None:
    tensors = inputs("wide", rows, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tensors["indices"] = torch.randint(9, (2, 128), generator=generator)
    exact = {name: t.double() if is_real(t) else t for name, t in tensors.items()}
    assert_near([t.double() for t in run(tensors)], run(exact, view_fusion_reference), 1e-5)


@pytest.mark.parametrize("changed", ["x", "indices", "weight", "bias", "residual", "scale", "keep"])
def test_an_input_changed_before_the_backward_is_noticed(changed: str) -> None:
    tensors = inputs("narrow", 4, True, keep=True)
    y = view_fusion(**{n: t.requires_grad_() if n in ("x", "weight") else t for n, t in tensors.items()}, eps=EPS)
    with torch.no_grad():
        tensors[changed].mul_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_leaves_it_in_float32() -> None:
    tensors = inputs("own input", 40, True, dtype=torch.float32)
    assert tensors["x"] is not None and tensors["residual"] is not None
    rough = tensors | {"x": tensors["x"].bfloat16(), "residual": tensors["residual"].bfloat16()}
    exact = {name: t.float() if t is not None else t for name, t in rough.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = view_fusion(**rough, eps=EPS)
    assert y.dtype == torch.float32 and torch.equal(y, view_fusion(**exact, eps=EPS))


def test_bfloat16_tensors_take_the_plain_form() -> None:
    tensors = {name: t.bfloat16() if is_real(t) else t for name, t in inputs("wide", 40).items()}
    y = view_fusion(**tensors, eps=EPS)
    assert y.dtype == torch.bfloat16 and torch.equal(y, view_fusion_reference(**tensors, eps=EPS))


def test_a_second_derivative_is_refused() -> None:
    tensors = inputs("narrow", 4)
    assert tensors["x"] is not None
    y = view_fusion(**(tensors | {"x": tensors["x"].requires_grad_()}), eps=EPS)
    with pytest.raises(RuntimeError, match="view_fusion_reference"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_outside_the_input_is_refused(index: int) -> None:
    tensors = inputs("narrow", 4)
    assert tensors["indices"] is not None
    tensors["indices"][1, 2] = index
    with pytest.raises(ValueError, match=f"index {index} of an input of 20 dims"):
        view_fusion(**tensors, eps=EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 3, 9), "indices": None}, r"x \(4, 3, 9\) must be \(B, V, N\)"),
        ({"x": torch.zeros(4, 3, 20)}, r"x \(4, 3, 20\) must be \(B, width\)"),
        ({"indices": torch.zeros(3, 9, dtype=torch.int64)}, r"indices \(3, 9\)"),
        ({"bias": torch.zeros(3, 9)}, r"bias \(3, 9\) must be .*\(3, 8\)"),
        ({"scale": torch.zeros(1, 8)}, r"scale \(1, 8\)"),
        ({"shift": None}, "scale and shift come together"),
        ({"residual": torch.zeros(4, 2, 8)}, r"residual \(4, 2, 8\)"),
        ({"keep": torch.ones(4, 8, 3, dtype=torch.bool)}, r"keep \(4, 8, 3\) must be .*\(4, 3, 8\)"),
        ({"keep": torch.ones(4, 3, 8)}, r"keep is torch\.float32: it must be bool"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_fusion(**(inputs("narrow", 4) | changes), eps=EPS)
