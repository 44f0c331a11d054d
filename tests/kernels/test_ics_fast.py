"""The C++ ICS against plain loops, the reference and torch's checks of a custom operator."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.kernels import ics
from ssr_rec.kernels.reference import ics_reference
from tests.kernels.plain_loops import ics_by_loops, needs_compiler

pytestmark = needs_compiler

B, V, D, T = 37, 5, 24, 5


def inputs(
    sign: str = "positive",
    rows: int = B,
    views: int = V,
    dim: int = D,
    steps: int = T,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, alpha and gamma of both signs, in float64 first, so that every type gets the same numbers."""
    generator = torch.Generator().manual_seed(rows + 10 * views + 100 * dim + steps)
    z = torch.randn(rows, views, dim, dtype=torch.float64, generator=generator)
    alpha = 0.05 + 0.4 * torch.rand(views, steps, dtype=torch.float64, generator=generator)
    gamma = torch.randn(views, dim, dtype=torch.float64, generator=generator)
    if sign == "negative":
        alpha = -alpha
    elif sign == "mixed":
        alpha[::2, ::2] *= -1
    elif sign == "zero":
        alpha[:, 1::2] = 0
    return z.to(dtype), alpha.to(dtype), gamma.to(dtype)


def run(z: Tensor, alpha: Tensor, gamma: Tensor | None, grad: Tensor, form=ics) -> list[Tensor]:
    """y and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (z, alpha, gamma) if t is not None]
    y = form(leaves[0], leaves[1], leaves[2] if gamma is not None else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def gradient(z: Tensor) -> Tensor:
    return torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(z.dtype)


@pytest.mark.parametrize("sign", ["positive", "negative", "mixed", "zero"])
@pytest.mark.parametrize(
    ("views", "dim", "steps"),
    [(1, 1, 5), (2, 3, 2), (5, 8, 5), (4, 16, 1), (7, 17, 3), (9, 128, 5), (3, 131, 4), (2, 300, 12)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_equals_plain_loops(sign: str, views: int, dim: int, steps: int, dtype: torch.dtype, tolerance: float) -> None:
    z, alpha, gamma = inputs(sign, 70, views, dim, steps, dtype)
    grad = gradient(z)
    y, grads = ics_by_loops(*(t.double().numpy() for t in (z, alpha, gamma, grad)))
    for ours, plain in zip(run(z, alpha, gamma, grad), (y, *grads), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.double().numpy(), plain, rtol=tolerance, atol=tolerance * np.abs(plain).max())


@pytest.mark.parametrize("sign", ["positive", "mixed"])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_gradcheck(sign: str, with_gamma: bool) -> None:
    z, alpha, gamma = inputs(sign, rows=3, dim=7, steps=3)
    leaves = [t.requires_grad_() for t in ((z, alpha, gamma) if with_gamma else (z, alpha))]
    assert torch.autograd.gradcheck(lambda *t: ics(t[0], t[1], t[2] if with_gamma else None), leaves, fast_mode=False)


@pytest.mark.parametrize("sign", ["positive", "mixed"])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_without_steps_it_is_relu(sign: str, with_gamma: bool) -> None:
    z, alpha, gamma = inputs(sign, steps=0)
    gain, grad = gamma if with_gamma else None, gradient(z)
    leaf = z.clone().requires_grad_()
    y = ics(leaf, alpha.requires_grad_(), gain)
    (grad_z, grad_alpha) = torch.autograd.grad(y, [leaf, alpha], grad)
    gain = torch.ones_like(gamma) if gain is None else gain
    assert torch.equal(y, z.clamp(min=0) * gain) and torch.equal(grad_z, grad * gain * (z > 0))
    assert grad_alpha.shape == (V, 0)


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_bfloat16_is_the_float32_result_rounded(sign: str) -> None:
    z, alpha, gamma = inputs(sign, dtype=torch.float32)
    z, grad = z.bfloat16(), gradient(z).bfloat16()
    rough, exact = run(z, alpha, gamma, grad), run(z.float(), alpha, gamma, grad.float())
    assert [t.dtype for t in rough] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(rough[0], exact[0].bfloat16()) and torch.equal(rough[1], exact[1].bfloat16())
    assert torch.equal(rough[2], exact[2]) and torch.equal(rough[3], exact[3])


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_the_same_bits_in_every_run_and_for_any_number_of_threads(sign: str) -> None:
    z, alpha, gamma = inputs(sign, rows=300, dim=40, dtype=torch.float32)
    grad, before = gradient(z), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(z, alpha, gamma, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_only_z_and_a_mean_per_step_are_saved(sign: str) -> None:
    z, alpha, gamma = inputs(sign)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ics(z.requires_grad_(), alpha.requires_grad_(), gamma.requires_grad_())
    assert sorted(t.numel() for t in saved) == sorted([z.numel(), alpha.numel(), gamma.numel(), B * V * T])
    assert z.data_ptr() in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("sign", ["positive", "negative", "zero"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_what_is_not_finite_spreads_as_in_algorithm_1(
    bad: float, steps: int, sign: str, dtype: torch.dtype, tolerance: float
) -> None:
    z, alpha, gamma = inputs(sign, steps=steps, dim=19, dtype=dtype)
    z[1, 2, 3] = bad
    z[4, 0] = bad
    ours, plain = ics(z, alpha, gamma), ics_reference(z, alpha, gamma)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True)
    z.requires_grad_()
    ours, plain = (torch.autograd.grad(form(z, alpha, gamma), z, gradient(z))[0] for form in (ics, ics_reference))
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_sum_that_overflows_only_with_the_threshold_added() -> None:
    z, _, gamma = inputs(dim=128, dtype=torch.float32)
    z[5, 1] = 0.0
    z[5, 1, 7] = 3e38
    alpha = torch.ones(V, 2)
    y = ics(z, alpha, gamma)
    assert y.isfinite().all()
    torch.testing.assert_close(y, ics_reference(z, alpha, gamma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [8, 19, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_the_same_bits_wherever_it_stands(dim: int, dtype: torch.dtype) -> None:
    z, alpha, gamma = inputs(dim=dim, dtype=dtype)
    together = ics(z, alpha, gamma)
    assert torch.equal(together, torch.cat([ics(row, alpha, gamma) for row in z.split(1)]))


@pytest.mark.parametrize("alpha", [1.0, 0.3, 30.0])
def test_few_survivors_far_above_many_dead(alpha: float) -> None:
    """Here sum(max(z, theta)) - d theta cancels most: its error must stay one of theta's last digits."""
    z, _, gamma = inputs(rows=64, dim=128, dtype=torch.float32)
    z, rates = z.abs() * 1e3, torch.full((V, T), alpha)
    exact = ics_reference(z.double(), rates.double(), gamma.double())
    torch.testing.assert_close(ics(z, rates, gamma).double(), exact, rtol=1e-5, atol=1e-5 * 1e3)


@pytest.mark.parametrize(("dim", "rate"), [(4099, 3.0), (65_536, -1.0)])
def test_the_roundings_of_a_wide_row_do_not_add_up(dim: int, rate: float) -> None:
    z, _, gamma = inputs(rows=8, views=1, dim=dim, dtype=torch.float32)
    alpha, grad = torch.full((1, T), rate), gradient(z)
    exact = run(z.double(), alpha.double(), gamma.double(), grad.double(), ics_reference)
    # All but the gradient of alpha, whose few terms of both signs may cancel.
    for i in (0, 1, 3):
        found = run(z, alpha, gamma, grad)[i].double()
        assert (found - exact[i]).norm() <= 1e-5 * exact[i].norm()


def test_a_nan_alpha_spoils_its_view_alone() -> None:
    z, alpha, gamma = inputs()
    alpha[1, 2] = float("nan")
    y = ics(z, alpha, gamma)
    assert y[:, 1].isnan().all() and y[:, [0, 2, 3, 4]].isfinite().all()


def test_no_views() -> None:
    assert ics(torch.empty(3, 0, 4), torch.empty(0, 2), None).shape == (3, 0, 4)


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_an_empty_batch(sign: str) -> None:
    z, alpha, gamma = inputs(sign, rows=0)
    y, grad_z, grad_alpha, grad_gamma = run(z, alpha, gamma, z)
    assert y.shape == grad_z.shape == z.shape
    assert torch.equal(grad_alpha, torch.zeros_like(alpha)) and torch.equal(grad_gamma, torch.zeros_like(gamma))


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_strided_inputs_and_gradients(sign: str) -> None:
    z, alpha, gamma = inputs(sign)
    grad = gradient(z)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (z, alpha, gamma, grad)]
    assert not any(t.is_contiguous() for t in strided)
    assert all(map(torch.equal, run(*strided), run(z, alpha, gamma, grad)))
    leaf = z.clone().requires_grad_()
    ics(leaf, alpha, gamma).sum().backward()  # the gradient that arrives has strides of 0
    torch.testing.assert_close(leaf.grad, run(z, alpha, gamma, torch.ones_like(z))[1])


def test_ties_at_the_threshold_are_dead() -> None:
    z = torch.full((1, 1, 20), 3.0, requires_grad=True)
    y = ics(z, torch.tensor([[1.0, 0.5]]), None)
    y.sum().backward()
    assert not y.any() and z.grad is not None and not z.grad.any()


@pytest.mark.parametrize("rates", product((1.0, 0.5, 0.0, -0.5, -1.0), repeat=2))
@pytest.mark.parametrize("gain", [1.0, -2.0, 0.0])
def test_values_exactly_at_zero_or_a_threshold(rates: tuple[float, float], gain: float) -> None:
    """Sums of a few powers of two, which nothing rounds: both forms must take the same side of every kink."""
    rows = [[4, 2, 0, -5], [1, 1, 1, 1], [0, 0, 0, 0], [-1, -2, -0.0, -3], [2, 2, 0, 0], [8, 4, 4, 0]]
    z, grad = torch.tensor(rows).unsqueeze(1), torch.tensor([1.0, -2.0, 4.0, 8.0]).expand(6, 1, 4)
    given = (z, torch.tensor([rates]), torch.full((1, 4), gain), grad)
    assert all(map(torch.equal, run(*given), run(*given, ics_reference)))


@pytest.mark.parametrize("sign", ["positive", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("steps", "with_gamma"), [(0, True), (3, True), (3, False)])
def test_torchs_checks_of_an_operator(sign: str, steps: int, with_gamma: bool) -> None:
    z, alpha, gamma = (t.requires_grad_() for t in inputs(sign, rows=4, dim=6, steps=steps))
    gain = gamma if with_gamma else None
    torch.library.opcheck(torch.ops.ssr_rec.ics.default, (z, alpha, gain))
    z, alpha, gain = z.detach(), alpha.detach(), None if gain is None else gain.detach()
    torch.library.opcheck(torch.ops.ssr_rec.ics_forward.default, (z, alpha, gain))
    y, means = torch.ops.ssr_rec.ics_forward(z, alpha, gain)
    torch.library.opcheck(torch.ops.ssr_rec.ics_backward.default, (y, z, means, alpha, gain))


def test_the_results_of_a_single_view_share_no_memory() -> None:
    z, alpha, gamma = inputs(rows=4, views=1)
    y, means = torch.ops.ssr_rec.ics_forward(z, alpha, gamma)
    arguments = (y, z, means, alpha, gamma)
    torch.library.opcheck(torch.ops.ssr_rec.ics_backward.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_input_changed_before_the_backward_is_noticed(changed: int) -> None:
    given = [t.requires_grad_() for t in inputs()]
    y = ics(*given)
    with torch.no_grad():
        given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_alone(asked: tuple[int, ...]) -> None:
    given = inputs("mixed")
    everything = run(*given, gradient(given[0]))[1:]
    leaves = [t.clone().requires_grad_(i in asked) for i, t in enumerate(given)]
    ics(*leaves).backward(gradient(given[0]))
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, everything[i]) if i in asked else leaf.grad is None


def test_compiles_once_for_any_batch_and_exports() -> None:
    class Ics(torch.nn.Module):
        def forward(self, z: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
            return 2 * ics(z + 1, alpha, gamma)

    z, alpha, gamma = inputs("mixed")
    torch._dynamo.reset()
    compiled = torch.compile(Ics(), fullgraph=True, dynamic=True, backend="aot_eager")
    rows = {"z": {0: torch.export.Dim("rows", min=1)}, "alpha": None, "gamma": None}
    exported = torch.export.export(Ics(), (z, alpha, gamma), dynamic_shapes=rows, strict=True).module()
    with torch.compiler.set_stance("default"):
        for n in (B, 3, 11):
            expected = run(z[:n], alpha, gamma, gradient(z[:n]), Ics())
            for ours, plain in zip(run(z[:n], alpha, gamma, gradient(z[:n]), compiled), expected, strict=True):
                assert torch.equal(ours, plain)
            assert torch.equal(exported(z[:n], alpha, gamma), expected[0])


def test_a_second_derivative_is_refused() -> None:
    z, alpha, gamma = inputs()
    y = ics(z.requires_grad_(), alpha, gamma)
    with pytest.raises(RuntimeError, match="ics_reference"):
        torch.autograd.grad(y.sum(), z, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (4, 2), None), r"z \(3, 4\)"),
        (((2, 3, 4), (4, 2), None), r"alpha \(4, 2\)"),
        (((2, 3, 4), (3, 2), (3, 5)), r"gamma \(3, 5\) must be .*\(3, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ics(*(None if shape is None else torch.zeros(shape) for shape in shapes))
