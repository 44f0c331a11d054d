"""What every encoder keeps to, whatever it computes."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.sequences import attention
from ssr_rec.sequences.choice import EncoderConfig
from ssr_rec.sequences.jagged import Shared, unpad
from ssr_rec.sequences.registry import ENCODERS
from tests.sequences.cases import SETTINGS, D, E, batch, build, gradients

every_case = pytest.mark.parametrize("case", SETTINGS)
BLIND = {"pool mean", "pool sum", "pool last"}
"""Cases that see no target."""
EMPTY_IS_ZERO = {case for case in SETTINGS if SETTINGS[case]["name"] in ("pool", "din", "target_attention")}


def test_every_encoder_has_a_case_and_a_config() -> None:
    configs = get_args(get_args(EncoderConfig)[0])
    names = {get_args(config.model_fields["name"].annotation)[0] for config in configs}
    assert {settings["name"] for settings in SETTINGS.values()} == set(ENCODERS) == names - {"custom"}


@every_case
def test_shape(case: str) -> None:
    encoder = build(case)
    for lengths in ((3, 0, 6), (6,), (0, 0)):
        y = encoder(*batch(case, lengths))
        assert y.shape == (len(lengths), encoder.out_fields * D)
        assert y.isfinite().all()


@every_case
def test_an_empty_history_has_a_defined_output(case: str) -> None:
    """Zeros, or what the target gives alone."""
    encoder = build(case)
    inputs = batch(case, (0, 2, 0))
    y = encoder(*inputs)
    if case in EMPTY_IS_ZERO:
        assert not y[[0, 2]].any()
    else:
        torch.testing.assert_close(y[[0, 2]], encoder(*inputs.rows([0, 2])))
        assert not torch.equal(y[0], y[2])


SHARED_FLOPS = {"din": 0.66, "hstu": 0.37, "hstu wide": 0.37, "target_attention": 0.34, "transformer": 0.67}
"""Cases whose matrix products are at most this share of what they are with a copy of the history for each row."""


@every_case
def test_rows_that_share_histories_have_the_fields_of_rows_with_copies(case: str) -> None:
    """Three histories, one of them empty, of a dozen rows in any order."""
    encoder, inputs = build(case), batch(case, (3, 0, 6))
    owners = [2, 0, 1, 2, 2, 0, 2, 1, 0, 2, 2, 2]
    copies = inputs.rows(owners)._replace(target=torch.randn(12, inputs.target.shape[1], dtype=torch.float64))
    places = inputs._replace(ages=torch.arange(9)).rows(owners).ages
    shared = Shared(torch.tensor(owners), places)
    with FlopCounterMode(display=False) as once:
        found = encoder.forward_shared(inputs.events, inputs.lengths, shared, copies.target, inputs.ages)
    with FlopCounterMode(display=False) as each:
        torch.testing.assert_close(found, encoder(*copies), atol=1e-12, rtol=1e-9)
    assert once.get_total_flops() <= SHARED_FLOPS.get(case, 1.0) * each.get_total_flops()


@every_case
@pytest.mark.parametrize(("dtype", "block_rows"), [(torch.float32, 64), (torch.float64, 2)])
def test_batch_mates_and_their_order_change_no_row(
    case: str, dtype: torch.dtype, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", block_rows)
    encoder, inputs = build(case, dtype), batch(case, dtype=dtype)
    y = encoder(*inputs)
    # Products of other shapes round differently, and weights this large make more of it.
    unit = (1e-5 if dtype == torch.float32 else 1e-13) * max(1.0, float(y.detach().abs().max()))
    for order in ([5, 2, 0, 4, 1, 3], [2, 2, 1], *[[row] for row in range(6)]):
        torch.testing.assert_close(encoder(*inputs.rows(order)), y[order], rtol=0, atol=unit)


@every_case
def test_padding_changes_no_row(case: str) -> None:
    """A padded history without its padding is the history, whatever stood there."""
    encoder, inputs = build(case), batch(case)
    offsets = [0, *inputs.lengths.cumsum(0).tolist()]
    for width, filler in ((6, 0.0), (9, float("nan"))):
        padded = torch.full((6, width, E), filler).double()
        for row in range(6):
            padded[row, : inputs.lengths[row]] = inputs.events[offsets[row] : offsets[row + 1]]
        events = unpad(padded, inputs.lengths)
        assert torch.equal(encoder(events, *inputs[1:]), encoder(*inputs))


@every_case
def test_broken_numbers_stay_in_their_row(case: str) -> None:
    encoder, inputs = build(case), batch(case)
    y = encoder(*inputs)
    inputs.events[:3] = float("nan")
    broken = encoder(*inputs)
    assert broken[0].isnan().any()
    torch.testing.assert_close(broken[1:], y[1:])


@every_case
def test_the_order_of_events_matters_where_it_should(case: str) -> None:
    encoder, inputs = build(case), batch(case, (4,))
    turned = inputs._replace(events=inputs.events.flip(0))
    blind = SETTINGS[case]["name"] in ("din", "target_attention") or case in ("pool mean", "pool sum", "hstu one layer")
    same = torch.allclose(encoder(*turned), encoder(*inputs))
    assert same == blind


@every_case
def test_no_rows_and_no_events_give_gradients_of_zero(case: str) -> None:
    encoder = build(case).train()
    for lengths in ((), (0, 0)):
        inputs = batch(case, lengths).copy()
        y = encoder(*inputs)
        y.sum().backward()
        assert y.shape == (len(lengths), encoder.out_fields * D)
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert lengths or not parameter.grad.any(), name


@every_case
def test_every_parameter_and_input_gets_a_gradient(case: str) -> None:
    encoder = build(case).train()
    # Pairs of every age and place, so that every entry of a small table of positions is met.
    inputs = batch(case, (6, 5, 4, 3, 2, 1, 0)).copy()
    for name, grad in gradients(encoder, encoder(*inputs), inputs).items():
        assert grad.isfinite().all() and (grad.any() or (case in BLIND and name == "target")), name


def test_gradients_have_gradients() -> None:
    encoder, inputs = build("target_attention"), batch("target_attention", (2, 0, 1))

    def run(events: Tensor, target: Tensor) -> Tensor:
        return encoder(events, inputs.lengths, target)

    leaves = (inputs.events.requires_grad_(), inputs.target.requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@every_case
def test_the_seed_decides_and_the_state_dict_holds_all(case: str) -> None:
    inputs = batch(case)
    source, again, other = build(case), build(case), build(case, seed=1)
    assert torch.equal(source(*inputs), again(*inputs))
    other.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs), other(*inputs))
    assert source.num_parameters == sum(p.numel() for p in source.parameters())


@every_case
@pytest.mark.parametrize("length", [1, 4])
def test_flops(case: str, length: int) -> None:
    encoder, inputs = build(case, torch.float32), batch(case, (length,) * 3, torch.float32)
    # The counter knows no fused attention on CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(*inputs)
    assert encoder.flops(length).matmul * 3 == counter.get_total_flops()
    assert encoder.flops(length).total >= 0 and encoder.flops(length).total <= encoder.flops(length + 1).total


def usually(*few: str) -> pytest.MarkDecorator:
    """These cases; all others among the slow tests."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "case", [name if name in few else pytest.param(name, marks=slow) for name in SETTINGS]
    )


@usually("pool last", "din")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_with_any_number_of_rows_and_events(case: str, strict: bool) -> None:
    encoder, inputs = build(case), batch(case)
    rows, events = {0: torch.export.Dim("rows")}, {0: torch.export.Dim("events")}
    program = torch.export.export(encoder, tuple(inputs), dynamic_shapes=(events, rows, rows, events), strict=strict)
    for lengths in ((3, 0, 6, 1, 0, 4), (2, 0, 5), (0, 0)):
        other = batch(case, lengths)
        torch.testing.assert_close(program.module()(*other), encoder(*other))
    wild = batch(case, (2, 3, 0))
    wild.events[:2] = float("nan")
    torch.testing.assert_close(program.module()(*wild)[1:], encoder(*wild.rows([1, 2])))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pool last", "target_attention", "transformer mean"])
def test_compiled_ahead_of_time(case: str, tmp_path: Path) -> None:
    """As a whole model is when it is exported; tests/model/test_sequence_models.py does it with DIN and HSTU."""
    encoder, inputs = build(case, torch.float32), batch(case, dtype=torch.float32)
    rows, events = {0: torch.export.Dim("rows")}, {0: torch.export.Dim("events")}
    with torch.no_grad():
        program = torch.export.export(encoder, tuple(inputs), dynamic_shapes=(events, rows, rows, events))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "encoder.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for lengths in ((3, 0, 6, 1, 0, 4), (2, 0, 5), (6,) * 70):
        other = batch(case, lengths, torch.float32)
        torch.testing.assert_close(compiled(*other), encoder(*other), rtol=1e-4, atol=1e-5)
        order = list(reversed(range(len(lengths))))
        torch.testing.assert_close(compiled(*other.rows(order)), compiled(*other)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param("hstu", "aot_eager", marks=pytest.mark.slow),
        *(
            pytest.param(case, "inductor", marks=pytest.mark.slow)
            for case in ("din dice", "target_attention", "transformer mean", "hstu")
        ),
    ],
)
def test_compiles_forward_and_backward_in_one_graph(case: str, backend: str) -> None:
    torch.compiler.reset()
    encoder, inputs = build(case), batch(case).copy()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    results = [(y, gradients(encoder, y, inputs)) for y in (compiled(*inputs), encoder(*inputs))]
    torch.testing.assert_close(*results)


@every_case
def test_bfloat16_autocast(case: str) -> None:
    encoder, inputs = build(case, torch.float32), batch(case, dtype=torch.float32).copy()
    exact = encoder(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(*inputs)
        grads = gradients(encoder, rough, inputs)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    assert (rough.float() - exact).abs().mean() < 0.02 + 0.05 * exact.abs().mean()


@every_case
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    encoder, (events, lengths, target, ages) = build(case), batch(case)
    too_long = torch.tensor([7, 0, 2, 1, 0, 4])
    bad = {
        "lengths from 0 to 7: must be within 0 and max_length=6": (events, too_long, target, ages),
        r"events of shape \(14, 7\): \w+ wants \(any, 8\)": (events[:, :7], lengths, target, ages),
        r"lengths of shape \(6, 1\)": (events, lengths[:, None], target, ages),
        r"target of shape \(5, \d\): \w+ wants \(6, \d\)": (events, lengths, target[:5], ages),
        r"ages of shape \(3,\)": (events, lengths, target, ages[:3]),
        "lengths add up to 14, but there are 13 events": (events[:-1], lengths, target, ages[:-1]),
        "lengths from -1 to 6": (events, lengths - (lengths == 0).long(), target, ages),
    }
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=message):
            encoder(*inputs)
    if encoder.needs_ages:
        with pytest.raises(ValueError, match="needs the ages of the events"):
            encoder(events, lengths, target)
    if encoder.needs_target:
        with pytest.raises(ValueError, match="needs a target"):
            encoder(events, lengths)
    else:
        torch.testing.assert_close(encoder(events, lengths), encoder(events, lengths, target, ages))


def test_dropout_acts_in_training_only() -> None:
    for name in ("din", "target_attention", "transformer", "hstu"):
        settings = {**SETTINGS[name], "dropout": 0.5}
        case = f"{name} dropout"
        SETTINGS[case] = settings
        try:
            encoder, inputs = build(case), batch(case)
        finally:
            del SETTINGS[case]
        plain = build(name)
        assert torch.equal(encoder(*inputs), plain(*inputs))
        encoder.train()
        assert not torch.equal(encoder(*inputs), encoder(*inputs))


@pytest.mark.slow
def test_importing_an_encoder_does_not_import_torchrec_nor_its_settings_torch() -> None:
    for statement, absent in (
        ("from ssr_rec.sequences import DIN, DINConfig", "torchrec"),
        ("from ssr_rec.sequences.choice import EncoderConfig; from ssr_rec.sequences import DINConfig", "torch"),
    ):
        code = f"import sys; {statement}; sys.exit({absent!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sequences.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
