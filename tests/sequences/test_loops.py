"""Every encoder equals plain loops over rows, events, heads and pairs, in values and in gradients."""

import pytest
import torch

from ssr_rec.sequences import attention
from ssr_rec.sequences.jagged import age_bucket
from tests.sequences import loops
from tests.sequences.cases import SETTINGS, batch, build, gradients

self_attention = pytest.mark.parametrize("case", [case for case in SETTINGS if "transformer" in case or "hstu" in case])


@pytest.mark.parametrize("case", SETTINGS)
def test_equals_loops(case: str) -> None:
    encoder, inputs = build(case), batch(case).copy()
    ours, theirs = encoder(*inputs), loops.encode(encoder, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(encoder, ours, inputs), gradients(encoder, theirs, inputs), rtol=1e-9, atol=1e-9
    )


@self_attention
def test_equals_loops_when_rows_are_padded_in_several_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", 2)
    encoder, inputs = build(case), batch(case, (2, 6, 0, 0, 5, 1, 6)).copy()
    ours, theirs = encoder(*inputs), loops.encode(encoder, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(encoder, ours, inputs), gradients(encoder, theirs, inputs), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("softmax", [False, True])
def test_weights_of_din(softmax: bool) -> None:
    case = "din sigmoid softmax" if softmax else "din"
    encoder, inputs = build(case), batch(case, (3,))
    parameters = dict(encoder.named_parameters())
    expected = loops.din_scores(parameters, list(inputs.events), inputs.target[0], encoder.settings)
    torch.testing.assert_close(encoder.weights(*inputs)[:, 0], torch.stack(expected))


@self_attention
def test_weights_of_self_attention(case: str) -> None:
    """They are the last layer's, of the target's query."""
    encoder, inputs = build(case), batch(case, (4,))
    heads = encoder.settings.num_heads
    loops.weights_seen.clear()
    loops.encode(encoder, inputs)
    expected = torch.tensor(loops.weights_seen[-heads:], dtype=torch.float64)[:, :-1]
    torch.testing.assert_close(encoder.weights(*inputs).T, expected)


@pytest.mark.parametrize("case", ["target_attention", "target_attention wide", "target_attention norm"])
def test_weights_of_target_attention_sum_to_one(case: str) -> None:
    encoder, inputs = build(case), batch(case)
    weights = encoder.weights(*inputs)
    assert weights.shape == (len(inputs.events), encoder.settings.num_heads)
    begin = 0
    for length in inputs.lengths.tolist():
        if length:
            torch.testing.assert_close(weights[begin : begin + length].sum(0), torch.ones_like(weights[0]))
        begin += length


@pytest.mark.parametrize(("mode", "expected"), [("mean", [0.5, 0.5, 1.0]), ("sum", [1, 1, 1]), ("last", [0, 1, 1])])
def test_weights_of_pooling(mode: str, expected: list[float]) -> None:
    encoder, inputs = build(f"pool {mode}"), batch("pool mean", (2, 0, 1))
    assert encoder.weights(*inputs)[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_buckets_of_ages(dtype: torch.dtype) -> None:
    ages = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 59, 60, 3600, 86_400, 2**24 - 1, 2**31 - 1]
    expected = [loops.bucket(age, 64) for age in ages]
    assert expected[:11] == [0, 2, 3, 4, 4, 5, 5, 6, 6, 7, 11]
    assert age_bucket(torch.tensor(ages, dtype=dtype), 64).tolist() == expected
    assert age_bucket(torch.tensor(ages[1:4], dtype=dtype), 3).tolist() == [2, 2, 2]
    assert age_bucket(torch.tensor([-5], dtype=dtype), 3).tolist() == [0]
