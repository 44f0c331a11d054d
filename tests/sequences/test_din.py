"""DIN's activations, and its first layer, which is never given the vector that the paper writes."""

import pytest
import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.sequences.din import DIN, Dice, PReLU
from ssr_rec.sequences.settings import DINConfig
from tests.sequences.cases import batch, build


def test_prelu_equals_torchs() -> None:
    ours, theirs = PReLU(3).double(), nn.PReLU(3).double()
    with torch.no_grad():
        ours.alpha.copy_(torch.tensor([0.25, -1.0, 2.0]))
        theirs.weight.copy_(ours.alpha)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    results = []
    for module, weight in ((ours, ours.alpha), (theirs, theirs.weight)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, torch.autograd.grad((y * torch.arange(3.0)).sum(), (leaf, weight))))
    torch.testing.assert_close(*results)


def test_dice_takes_the_statistics_of_the_batchs_events() -> None:
    dice = Dice(2).double()
    dice.alpha.data = torch.tensor([0.3, -0.2]).double()
    x = torch.tensor([[1.0, 4.0], [3.0, 0.0], [5.0, -1.0]]).double()
    p = 1 / (1 + (-(x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-8).sqrt()).exp())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)
    torch.testing.assert_close(dice.running_mean, 0.01 * x.mean(0))
    before = dice.running_mean.clone()
    p = 1 / (1 + (-(x - dice.running_mean) / (dice.running_var + 1e-8).sqrt()).exp())
    torch.testing.assert_close(dice(x[:1]), (p * x + (1 - p) * dice.alpha * x)[:1])
    assert torch.equal(dice.running_mean, before), "one event has no variance"
    torch.testing.assert_close(dice.eval()(x), p * x + (1 - p) * dice.alpha * x)


def test_dice_sees_no_empty_positions_in_training() -> None:
    """Rows without events change no statistics, hence no output."""
    encoder, inputs = build("din dice").train(), batch("din dice")
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    y = encoder(*inputs)
    encoder.load_state_dict(state)
    torch.testing.assert_close(encoder(*inputs.rows([0, 2, 3, 5])), y[[0, 2, 3, 5]])


@pytest.mark.parametrize("softmax", [False, True])
def test_doubled_events_count_twice_unless_softmax_weighs_them(softmax: bool) -> None:
    encoder, inputs = DIN(8, 8, 4, 6, DINConfig(softmax=softmax)).double(), batch("din", (3,))

    def run(events: Tensor) -> Tensor:
        return encoder(events, torch.tensor([len(events)]), inputs.target)

    once, twice = run(inputs.events), run(torch.cat([inputs.events, inputs.events]))
    torch.testing.assert_close(twice, once if softmax else 2 * once)


def test_the_first_layer_starts_with_the_variance_of_its_whole_input() -> None:
    torch.manual_seed(0)
    encoder = DIN(60, 60, 4, 6, DINConfig(hidden=[200]))
    assert encoder.weight.shape == (200, 240)
    assert encoder.weight.std().item() == pytest.approx((2 / 440) ** 0.5, rel=0.02)
    assert not encoder.bias.any()


def test_a_target_of_more_dims_than_an_event_is_refused() -> None:
    with pytest.raises(UserError, match="target_dim=12 is more than event_dim=8"):
        DIN(8, 12, 4, 6)
