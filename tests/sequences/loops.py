"""Every encoder once more, in plain loops over one row after another, written from the papers' equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssr_rec.sequences.base import SequenceEncoder
from tests.sequences.cases import Batch

Parameters = dict[str, Tensor]
weights_seen: list[list[float]] = []
"""The weights that the last token of a self-attention gave to all of its row, one list a layer, row and head."""


def encode(encoder: SequenceEncoder, inputs: Batch) -> Tensor:
    """Encode a batch in evaluation: (B, m * D)."""
    w: Parameters = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    settings, rows, begin = encoder.settings, [], 0
    for row, length in enumerate(inputs.lengths.tolist()):
        events = [inputs.events[begin + i] for i in range(length)]
        ages = [int(inputs.ages[begin + i]) for i in range(length)]
        y = ENCODE[settings.name](w, events, inputs.target[row], ages, settings, encoder.max_length)
        if settings.name == "target_attention" or settings.fields:
            y = w["out.weight"] @ y
        rows.append(y)
        begin += length
    return torch.stack(rows)


def bucket(age: int, count: int) -> int:
    """Count the half octaves that have begun."""
    begun = -1
    for k in range(64):
        begun += (2**k - 1 <= age) + (1.5 * 2**k - 1 <= age)
    return min(begun, count - 1)


def softmax(scores: list[Tensor]) -> list[Tensor]:
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    mean = x.sum() / len(x)
    return (x - mean) / (((x - mean) ** 2).sum() / len(x) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def pool(w: Parameters, events: list[Tensor], target: Tensor, ages: list[int], settings, max_length: int) -> Tensor:
    if not events:
        return torch.zeros(8, dtype=torch.float64)
    if settings.mode == "last":
        return events[-1]
    total = sum(events)
    return total / len(events) if settings.mode == "mean" else total


def activate(w: Parameters, x: Tensor, layer: int, kind: str) -> Tensor:
    values = []
    for i, value in enumerate(x):
        if kind == "relu":
            values.append(value if value > 0 else 0 * value)
        elif kind == "sigmoid":
            values.append(1 / (1 + (-value).exp()))
        elif kind == "prelu":
            values.append(value if value > 0 else w[f"layers.{layer}.alpha"][i] * value)
        else:
            mean, var = w[f"layers.{layer}.running_mean"][i], w[f"layers.{layer}.running_var"][i]
            p = 1 / (1 + (-(value - mean) / (var + 1e-8).sqrt()).exp())
            values.append(p * value + (1 - p) * w[f"layers.{layer}.alpha"][i] * value)
    return torch.stack(values)


def din_scores(w: Parameters, events: list[Tensor], target: Tensor, settings) -> list[Tensor]:
    scores = []
    for e in events:
        like = e[: len(target)]
        x = w["weight"] @ torch.cat([e, target, like - target, like * target]) + w["bias"]
        x = activate(w, x, 0, settings.activation)
        for i in range(1, len(settings.hidden)):
            x = w[f"layers.{2 * i - 1}.weight"] @ x + w[f"layers.{2 * i - 1}.bias"]
            x = activate(w, x, 2 * i, settings.activation)
        last = 2 * len(settings.hidden) - 1
        scores.append((w[f"layers.{last}.weight"] @ x + w[f"layers.{last}.bias"])[0])
    return softmax(scores) if settings.softmax else scores


def din(w: Parameters, events: list[Tensor], target: Tensor, ages: list[int], settings, max_length: int) -> Tensor:
    total = torch.zeros(8, dtype=torch.float64)
    for score, e in zip(din_scores(w, events, target, settings), events, strict=True):
        total = total + score * e
    return total


def target_attention(
    w: Parameters, events: list[Tensor], target: Tensor, ages: list[int], settings, max_length: int
) -> Tensor:
    width = len(w["query.weight"])
    dims = width // settings.num_heads
    w_key, w_value = w["key_value.weight"][:width], w["key_value.weight"][width:]
    heads = []
    compared = [layer_norm(x) if settings.layer_norm else x for x in (target, *events)]
    for h in range(settings.num_heads):
        part = slice(h * dims, (h + 1) * dims)
        query = w["query.weight"][part] @ compared[0]
        weights = softmax([query.dot(w_key[part] @ e) / math.sqrt(dims) for e in compared[1:]])
        head = torch.zeros(dims, dtype=torch.float64)
        for weight, e in zip(weights, events, strict=True):
            head = head + weight * (w_value[part] @ e)
        heads.append(head)
    return torch.cat(heads)


def tokens_of(w: Parameters, events: list[Tensor], target: Tensor) -> list[Tensor]:
    if "tokens.event.weight" not in w:
        return [*events, target]
    return [*(w["tokens.event.weight"] @ e for e in events), w["tokens.target.weight"] @ target]


def transformer_layer(w: Parameters, at: str, tokens: list[Tensor], num_heads: int) -> list[Tensor]:
    width = len(tokens[0])
    dims = width // num_heads
    w_query, w_key, w_value = w[f"{at}.query_key_value.weight"].split(width)
    outputs = []
    for x in tokens:
        heads = []
        for h in range(num_heads):
            part = slice(h * dims, (h + 1) * dims)
            scores = [(w_query[part] @ x).dot(w_key[part] @ other) / math.sqrt(dims) for other in tokens]
            weights = softmax(scores)
            heads.append(sum(a * (w_value[part] @ other) for a, other in zip(weights, tokens, strict=True)))
            if x is tokens[-1]:
                weights_seen.append([a.item() for a in weights])
        y = x + w[f"{at}.mix.weight"] @ torch.cat(heads)
        y = layer_norm(y) * w[f"{at}.attention_norm.weight"] + w[f"{at}.attention_norm.bias"]
        hidden = w[f"{at}.feed_forward.0.weight"] @ y + w[f"{at}.feed_forward.0.bias"]
        hidden = torch.stack([v if v > 0 else 0.01 * v for v in hidden])
        y = y + w[f"{at}.feed_forward.2.weight"] @ hidden + w[f"{at}.feed_forward.2.bias"]
        outputs.append(layer_norm(y) * w[f"{at}.output_norm.weight"] + w[f"{at}.output_norm.bias"])
    return outputs


def transformer(
    w: Parameters, events: list[Tensor], target: Tensor, ages: list[int], settings, max_length: int
) -> Tensor:
    tokens = tokens_of(w, events, target)
    if settings.positions == "age":
        places = [1 + bucket(age, settings.age_buckets) for age in ages] + [0]
    else:
        places = [len(events) - i for i in range(len(events) + 1)]
    if settings.positions != "none":
        tokens = [torch.cat([x, w["positions"][place]]) for x, place in zip(tokens, places, strict=True)]
    for layer in range(settings.num_layers):
        tokens = transformer_layer(w, f"layers.{layer}", tokens, settings.num_heads)
    if settings.output == "target":
        return tokens[-1]
    if settings.output == "mean":
        return sum(tokens) / len(tokens)
    nothing = [torch.zeros(len(tokens[0]), dtype=torch.float64)] * (max_length - len(events))
    return torch.cat([*nothing, *tokens])


def hstu_layer(w: Parameters, at: str, tokens: list[Tensor], ages: list[int], settings, n: int) -> list[Tensor]:
    heads, width = settings.num_heads, len(tokens[0])
    values = heads * (settings.value_dim or width // heads)
    keys = heads * (settings.attention_dim or width // heads)
    projected = [silu(w[f"{at}.project.weight"] @ layer_norm(x)).split([values, values, keys, keys]) for x in tokens]
    outputs = []
    for i, x in enumerate(tokens):
        gate, attended = projected[i][0], []
        for h in range(heads):
            v_part = slice(h * values // heads, (h + 1) * values // heads)
            k_part = slice(h * keys // heads, (h + 1) * keys // heads)
            head, weights = torch.zeros(values // heads, dtype=torch.float64), []
            for j in range(i + 1):
                score = projected[i][2][k_part].dot(projected[j][3][k_part])
                if "position" in settings.bias:
                    score = score + w[f"{at}.bias.position"][i - j]
                if "age" in settings.bias:
                    score = score + w[f"{at}.bias.age"][bucket(ages[j] - ages[i], settings.age_buckets)]
                weights.append(silu(score) / n)
                head = head + weights[-1] * projected[j][1][v_part]
            attended.append(head)
            if x is tokens[-1]:
                weights_seen.append([a.item() for a in weights])
        mixed = layer_norm(torch.cat(attended)) * gate
        outputs.append(x + w[f"{at}.mix.weight"] @ mixed + w[f"{at}.mix.bias"])
    return outputs


def hstu(w: Parameters, events: list[Tensor], target: Tensor, ages: list[int], settings, max_length: int) -> Tensor:
    tokens = tokens_of(w, events, target)
    for layer in range(settings.num_layers):
        tokens = hstu_layer(w, f"layers.{layer}", tokens, [*ages, 0], settings, max_length + 1)
    return tokens[-1]


ENCODE = {
    "pool": pool,
    "din": din,
    "target_attention": target_attention,
    "transformer": transformer,
    "hstu": hstu,
}
