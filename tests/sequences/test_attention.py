"""Attention against torch's own modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.sequences.hstu import HSTU, HSTULayer
from ssr_rec.sequences.settings import HSTUConfig, TargetAttentionConfig, TransformerConfig
from ssr_rec.sequences.target_attention import TargetAttention
from ssr_rec.sequences.transformer import Transformer
from tests.sequences.cases import Batch, batch

LENGTHS = (3, 6, 1, 4)


def padded(inputs: Batch) -> tuple[Tensor, Tensor]:
    """Events (B, L, E), the most recent last, and where there are none (B, L)."""
    rows, empty = torch.zeros(len(LENGTHS), 6, 8).double(), torch.ones(len(LENGTHS), 6, dtype=torch.bool)
    for row, events in enumerate(inputs.events.split(inputs.lengths.tolist())):
        rows[row, 6 - len(events) :] = events
        empty[row, 6 - len(events) :] = False
    return rows, empty


def same_gradients(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Compare outputs, and the gradients that each gives to its leaf."""
    results = []
    for y, leaf in (ours, theirs):
        weights = torch.arange(1.0, y.numel() + 1).view(y.shape).sin()
        results.append((y, torch.autograd.grad((y * weights).sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_weights_of_normalised_events_do_not_depend_on_how_small_embeddings_are() -> None:
    events, target, lengths = torch.randn(6, 8), torch.randn(2, 8), torch.tensor([4, 2])
    for layer_norm in (True, False):
        encoder = TargetAttention(8, 8, 4, 6, TargetAttentionConfig(layer_norm=layer_norm))
        large, small = (encoder.weights(events * scale, lengths, target * scale) for scale in (1.0, 0.01))
        assert torch.allclose(large, small, atol=0.05) == layer_norm


def test_target_attention_equals_multihead_attention() -> None:
    encoder = TargetAttention(8, 8, 4, 6, TargetAttentionConfig(num_heads=4)).double()
    module = nn.MultiheadAttention(8, 4, bias=False, batch_first=True).double()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([encoder.query.weight, encoder.key_value.weight]))
        module.out_proj.weight.copy_(encoder.out.weight)
    inputs = batch("target_attention", LENGTHS).copy()
    events, empty = padded(inputs)
    query = inputs.target.unsqueeze(1)
    theirs = module(query, events, events, key_padding_mask=empty)[0].squeeze(1)
    same_gradients((encoder(*inputs), inputs.events), (theirs, inputs.events))


@pytest.mark.parametrize("output", ["target", "mean", "concat"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_transformer_equals_torchs_encoder(output: Any, num_layers: int) -> None:
    settings = TransformerConfig(num_heads=2, num_layers=num_layers, positions="none", output=output, ffn_ratio=2)
    encoder = Transformer(8, 8, 4, 6, settings).double()
    layers = []
    for ours in encoder.layers:
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, lambda x: F.leaky_relu(x, 0.01), layer_norm_eps=1e-6, batch_first=True
        ).double()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_(0.1, 0.4)
            layer.self_attn.in_proj_weight.copy_(ours.query_key_value.weight)
            layer.self_attn.out_proj.weight.copy_(ours.mix.weight)
            layer.self_attn.in_proj_bias.zero_()
            layer.self_attn.out_proj.bias.zero_()
            layer.linear1.load_state_dict(ours.feed_forward[0].state_dict())
            layer.linear2.load_state_dict(ours.feed_forward[2].state_dict())
            layer.norm1.load_state_dict(ours.attention_norm.state_dict())
            layer.norm2.load_state_dict(ours.output_norm.state_dict())
        layers.append(layer)
    inputs = batch("transformer", LENGTHS).copy()
    events, empty = padded(inputs)
    y, empty = torch.cat([events, inputs.target.unsqueeze(1)], 1), F.pad(empty, (0, 1), value=False)
    for layer in layers:
        y = layer(y, src_key_padding_mask=empty)
    kept = y * ~empty.unsqueeze(2)
    theirs = {"target": y[:, -1], "mean": kept.sum(1) / (~empty).sum(1, keepdim=True), "concat": kept.flatten(1)}
    same_gradients((encoder(*inputs), inputs.events), (theirs[output], inputs.events))


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_scores_of_any_size_have_weights(size: float) -> None:
    """The largest of each row is subtracted before exp, far below 0 and far above."""
    torch.manual_seed(0)
    encoder = TargetAttention(8, 8, 4, 6).double()
    inputs = batch("target_attention", (3, 0, 5))
    for sign in (1, -1):
        weights = encoder.weights(inputs.events, inputs.lengths, sign * size * inputs.target)
        assert weights.isfinite().all()
        torch.testing.assert_close(weights[:3].sum(0), torch.ones(2).double())


def test_events_of_hstu_do_not_see_the_target_nor_later_events() -> None:
    torch.manual_seed(0)
    layer = HSTULayer(8, 6, HSTUConfig(bias="position")).double()
    encoder = HSTU(8, 8, 4, 6, HSTUConfig(num_layers=2, bias="position")).double()
    encoder.layers[0] = layer
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    inputs = batch("hstu", (4,))
    changed = inputs.events.clone()
    changed[3] += 1
    for events, target in (
        (inputs.events, inputs.target),
        (inputs.events, inputs.target + 1),
        (changed, inputs.target),
    ):
        encoder(events, inputs.lengths, target)
    torch.testing.assert_close(seen[0][:4], seen[1][:4])
    torch.testing.assert_close(seen[0][:3], seen[2][:3])
    assert not torch.allclose(seen[0][3:], seen[2][3:])


def test_old_events_keep_differences_of_a_second() -> None:
    """A float of 2**30 has steps of 64: differences are taken before ages become floats."""
    torch.manual_seed(0)
    encoder = HSTU(8, 8, 4, 6, HSTUConfig(bias="age")).double()
    inputs = batch("hstu", (2,))
    y = [encoder(inputs.events, inputs.lengths, inputs.target, torch.tensor([2**30 + d, 2**30])) for d in (0, 1, 6)]
    assert not torch.equal(y[0], y[1]) and not torch.equal(y[1], y[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetAttention(8, 8, 4, 6, TargetAttentionConfig(num_heads=3)), "num_heads=3 does not divide"),
        (lambda: TargetAttention(8, 8, 4, 6, TargetAttentionConfig(attention_dim=5)), "attention_dim=5"),
        (lambda: TargetAttention(6, 8, 4, 6), "gives 6 dims, no multiple of field_dim=4: set fields"),
        (lambda: Transformer(8, 4, 4, 6), "target_dim=4 is not event_dim=8.*set dim"),
        (lambda: Transformer(8, 8, 4, 6), "num_heads=8 does not divide the width 12"),
        (lambda: Transformer(8, 8, 4, 6, TransformerConfig(num_heads=2, position_dim=2)), "gives 10 dims"),
        (lambda: HSTU(8, 4, 4, 6), "set dim"),
        (lambda: HSTU(8, 8, 4, 6, HSTUConfig(num_heads=3)), "num_heads=3 does not divide the width 8: set attention"),
        (lambda: HSTU(8, 8, 4, 6, HSTUConfig(num_heads=3, attention_dim=2)), "set value_dim"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
