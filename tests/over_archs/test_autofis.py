"""AutoFIS against loops over samples, fields and pairs, and a search that must find a planted pair."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.autofis import AutoFIS, PairProducts
from ssr_rec.over_archs.autofis_settings import AutoFISConfig
from ssr_rec.over_archs.grda import GRDA

NUM_FIELDS, DIM, ROWS, EPS = 6, 3, 9, 1e-3
FEW, MANY = [(1, 4), (0, 5)], [(2, 3), (0, 1), (4, 5), (0, 4), (1, 2)]


def build(num_tasks: int = 2, seed: int = 0, **settings: Any) -> AutoFIS:
    """In float64, with every parameter and running statistic drawn, so that no 0 or 1 hides a mistake."""
    torch.manual_seed(seed)
    model = AutoFIS(NUM_FIELDS, DIM, num_tasks, AutoFISConfig(**({"hidden": [7, 5]} | settings))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


def batch(num_tasks: int = 2, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, NUM_FIELDS * width, generator=generator, dtype=torch.float64) for width in (DIM, num_tasks)
    )


def products_by_loop(x: Tensor, pairs: list[tuple[int, int]]) -> list[list[float]]:
    rows = [[row[f * DIM : (f + 1) * DIM] for f in range(NUM_FIELDS)] for row in x.tolist()]
    return [[sum(a * b for a, b in zip(e[i], e[j], strict=True)) for i, j in pairs] for e in rows]


def logits_by_loop(model: AutoFIS, x: Tensor, first: Tensor, moments: list[tuple[float, float]]) -> Tensor:
    """First order + scale_t * sum of alpha_ij (product - mean) / sqrt(variance + eps), for every row and task."""
    tasks = model.num_tasks
    pairs = model.config.pairs
    if pairs is None:
        pairs = [(i, j) for i in range(NUM_FIELDS) for j in range(i + 1, NUM_FIELDS)]
    alpha = model.state_dict()["alpha"].tolist()
    scale = model.state_dict()["task_scale"].tolist() if tasks > 1 else [1.0]
    logits = []
    for products, weights in zip(products_by_loop(x, pairs), first.tolist(), strict=True):
        total = 0.0
        for product, a, (mean, variance) in zip(products, alpha, moments, strict=True):
            total += a * (product - mean) / math.sqrt(variance + EPS)
        logits.append([sum(weights[f * tasks + t] for f in range(NUM_FIELDS)) + scale[t] * total for t in range(tasks)])
    return torch.tensor(logits, dtype=torch.float64)


def batch_moments(x: Tensor, pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
    moments = []
    for column in zip(*products_by_loop(x, pairs), strict=True):
        mean = sum(column) / len(column)
        moments.append((mean, sum((value - mean) ** 2 for value in column) / len(column)))
    return moments


every_selection = pytest.mark.parametrize("pairs", [None, MANY, FEW], ids=["all", "many", "few"])


@every_selection
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_loop_over_rows_and_pairs(pairs: Any, num_tasks: int, training: bool) -> None:
    model, (x, first) = build(num_tasks, pairs=pairs).train(training), batch(num_tasks)
    assert model.products.gram is (pairs is not FEW)
    norm = model.pair_norm
    moments = list(zip(norm.running_mean.tolist(), norm.running_var.tolist(), strict=True))
    if training:
        moments = batch_moments(x, pairs or list(itertools.combinations(range(NUM_FIELDS), 2)))
    features, logits = model(x, first)
    torch.testing.assert_close(logits, logits_by_loop(model, x, first, moments), rtol=1e-10, atol=1e-10)

    w = model.state_dict()
    deep = (x @ w["deep.0.weight"].T + w["deep.0.bias"]).clamp(min=0)
    deep = (deep @ w["deep.2.weight"].T + w["deep.2.bias"]).clamp(min=0)
    torch.testing.assert_close(features, deep, rtol=1e-10, atol=1e-10)


def test_the_running_statistics_move_by_a_hundredth() -> None:
    model, (x, first) = build(pairs=MANY), batch()
    old = list(zip(model.pair_norm.running_mean.tolist(), model.pair_norm.running_var.tolist(), strict=True))
    model(x, first)
    expected = [
        (0.99 * old_mean + 0.01 * mean, 0.99 * old_var + 0.01 * var * ROWS / (ROWS - 1))
        for (old_mean, old_var), (mean, var) in zip(old, batch_moments(x, MANY), strict=True)
    ]
    means, variances = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected, strict=True))
    torch.testing.assert_close(model.pair_norm.running_mean, means, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.pair_norm.running_var, variances, rtol=1e-12, atol=0)


def test_a_training_batch_of_one_row_uses_and_keeps_the_running_statistics() -> None:
    model, (x, first) = build(), batch(rows=1)
    before = model.pair_norm.running_var.clone()
    _, logits = model(x, first)
    assert torch.equal(model.pair_norm.running_var, before)
    torch.testing.assert_close(logits, model.eval()(x, first)[1])


def test_input_norm_and_layer_norm_belong_to_the_deep_part() -> None:
    plain, normed, (x, first) = build(), build(input_norm="per_dim", layer_norm=True), batch()
    with torch.no_grad():
        normed.alpha.copy_(plain.alpha)
        normed.task_scale.copy_(plain.task_scale)
    torch.testing.assert_close(normed(x, first)[1], plain(x, first)[1])
    torch.testing.assert_close(normed(x, first)[0], normed.deep(normed.input_norm(x)))
    assert any(isinstance(layer, nn.LayerNorm) for layer in normed.deep)


def test_dropout_acts_on_the_deep_part_in_training_only() -> None:
    model, inputs = build(dropout=0.5), batch()
    (first, first_logits), (second, second_logits) = model(*inputs), model(*inputs)
    assert not torch.equal(first, second) and torch.equal(first_logits, second_logits)
    assert torch.equal(model.eval()(*inputs)[0], build().eval()(*inputs)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pairs", [MANY, FEW])
def test_the_pairs_alone_equal_a_search_whose_other_gates_are_closed(pairs: Any, training: bool) -> None:
    search, retrain, inputs = build().train(training), build(seed=1, pairs=pairs).train(training), batch()
    kept = [search.pairs.index(pair) for pair in pairs]
    with torch.no_grad():
        search.alpha[[i for i in range(len(search.pairs)) if i not in kept]] = 0
        state = search.state_dict()
        for key in ("alpha", "pair_norm.running_mean", "pair_norm.running_var"):
            state[key] = state[key][kept]
        retrain.load_state_dict(state)
    for found, expected in zip(retrain(*inputs), search(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_fields", [1, NUM_FIELDS])
def test_without_pairs_first_order_and_deep_remain(num_fields: int) -> None:
    model = AutoFIS(num_fields, DIM, 2, AutoFISConfig(hidden=[7, 5], pairs=[] if num_fields > 1 else None))
    x, first = torch.randn(4, num_fields * DIM), torch.randn(4, num_fields * 2)
    features, logits = model(x, first)
    torch.testing.assert_close(logits, first.view(4, num_fields, 2).sum(1))
    assert torch.equal(features, model.deep(x))
    assert model.optimizers == {} and model.interaction_summary()["alphas"] == []
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"deep"}


def test_alphas_start_around_alpha_init_and_every_task_at_scale_one() -> None:
    torch.manual_seed(0)
    for pairs in (None, MANY):
        model = AutoFIS(NUM_FIELDS, DIM, 2, AutoFISConfig(pairs=pairs, alpha_init=0.4))
        assert model.alpha is not None and len(model.alpha.unique()) == len(model.alpha)
        assert 0.399 <= model.alpha.min() < model.alpha.max() <= 0.401
        assert model.task_scale is not None and model.task_scale.tolist() == [1, 1]
    assert AutoFIS(NUM_FIELDS, DIM, 1, AutoFISConfig()).task_scale is None


def test_the_initializer_is_that_of_the_deep_part() -> None:
    for initializer, zero in (("glorot", True), ("torch", False)):
        deep = AutoFIS(NUM_FIELDS, DIM, 1, AutoFISConfig(initializer=initializer)).deep
        assert all(deep.get_parameter(f"{layer}.bias").any().item() is not zero for layer in (0, 2, 4))


def test_the_search_alone_brings_grda_for_the_alphas() -> None:
    search = build(grda_lr=0.5, grda_c=0.02, grda_mu=0.7)
    assert list(search.optimizers) == ["alpha"]
    optimizer = search.optimizers["alpha"]([search.get_parameter("alpha")])
    assert isinstance(optimizer, GRDA)
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "c", "mu")} == {"lr": 0.5, "c": 0.02, "mu": 0.7}
    assert build(pairs=MANY).optimizers == {}


def test_the_defaults_are_those_of_the_released_run() -> None:
    config = AutoFISConfig()
    assert (config.grda_lr, config.grda_c, config.grda_mu, config.alpha_init) == (1.0, 5e-4, 0.8, 0.6)


def test_following_config_keeps_the_open_pairs_and_all_settings_but_those_of_the_search() -> None:
    settings = {"alpha_init": 0.3, "dropout": 0.1, "layer_norm": True, "initializer": "torch"}
    search = build(grda_lr=0.5, grda_c=0.02, grda_mu=0.7, **settings)
    with torch.no_grad():
        search.alpha.zero_()
        search.alpha[search.pairs.index((1, 3))] = -1e-9
        search.alpha[search.pairs.index((0, 5))] = 2.0
    following = search.following_config()
    assert following == AutoFISConfig(pairs=[(0, 5), (1, 3)], hidden=[7, 5], **settings)
    assert AutoFIS(NUM_FIELDS, DIM, 2, following).following_config() is None


def test_the_summary_names_what_survived() -> None:
    search = build()
    with torch.no_grad():
        search.alpha[1:] = 0
    summary = search.interaction_summary()
    assert summary == json.loads(json.dumps(summary))
    assert (summary["stage"], summary["pairs"], summary["survivors"]) == ("search", 15, 1)
    assert summary["alphas"][:2] == [[0, 1, search.alpha[0].item()], [0, 2, 0.0]]
    named = search.statistics(batch()[0], list("abcdef"))["interactions"]
    assert named == {**summary, "alphas": [["abcdef"[i], "abcdef"[j], a] for i, j, a in summary["alphas"]]}
    assert build(pairs=FEW).interaction_summary()["stage"] == "retrain"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": [[1, 1]]}, r"pairs has \[1, 1\]: a pair is two field indices i < j"),
        ({"pairs": [[2, 1]]}, r"pairs has \[2, 1\]: a pair"),
        ({"pairs": [[-1, 1]]}, r"pairs has \[-1, 1\]: a pair"),
        ({"pairs": [[0, 1], [0, 2], [0, 1]]}, r"pairs has \[0, 1\] twice"),
        ({"pairs": [[0, 1.0]]}, "valid integer"),
        ({"pairs": [[0, 1, 2]]}, "at most 2 items"),
        ({"pairs": [], "grda_c": 0.1}, "grda_c=0.1 has no effect with pairs"),
        ({"pairs": [], "grda_lr": 0.1}, "grda_lr=0.1 has no effect with pairs"),
        ({"grda_mu": 1.0}, "grda_mu"),
        ({"hidden": []}, "hidden"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AutoFISConfig(**settings)


def test_impossible_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs has \[2, 6\], but the last of the 6 fields is 5"):
        build(pairs=[(0, 5), (2, 6)])
    with pytest.raises(ValueError, match="AutoFIS needs fields of equal dims"):
        AutoFIS(2, [3, 4], 1)


def test_pairs_survive_a_config_file() -> None:
    config = AutoFISConfig(pairs=[[0, 1], [2, 4]])
    assert config.pairs == [(0, 1), (2, 4)]
    assert AutoFISConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert config.label == "AutoFIS 2 pairs 3x320" and AutoFISConfig(hidden=[8, 4]).label == "AutoFIS search 8-4"


@pytest.mark.parametrize(("num_pairs", "gram"), [(115, False), (116, True), (903, True)])
def test_many_pairs_come_from_the_gram_matrix(num_pairs: int, gram: bool) -> None:
    pairs = list(itertools.combinations(range(43), 2))[:num_pairs]
    assert PairProducts(43, 2, pairs).gram is gram


@every_selection
def test_cost(pairs: Any) -> None:
    model, inputs = build(num_tasks=2, pairs=pairs, input_norm="per_dim").eval(), batch(2, rows=4)
    count = 15 if pairs is None else len(pairs)
    deep = (NUM_FIELDS * DIM * 7 + 7) + (7 * 5 + 5)
    assert model.num_parameters == count + 2 + deep + 2 * NUM_FIELDS * DIM
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert model.flops().matmul * 4 == counter.get_total_flops()
    elementwise = 2 * (7 + 5) + 2 * NUM_FIELDS * DIM + NUM_FIELDS * 2 + 2 * count + 2 * 2
    assert model.flops().elementwise == elementwise + (2 * count * DIM if pairs is FEW else 0)


@every_selection
def test_bfloat16_autocast_leaves_the_interactions_in_float32(pairs: Any) -> None:
    model, inputs = build(pairs=pairs).float(), [t.float() for t in batch()]
    _, expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = model(*inputs)
        _, of_bfloat16 = model(*(t.bfloat16() for t in inputs))
    assert features.dtype == torch.bfloat16 and torch.equal(logits, expected)
    assert of_bfloat16.isfinite().all()


@pytest.mark.slow
def test_the_search_finds_the_planted_pair() -> None:
    """Labels follow the product of fields 1 and 3; the threshold ends above where every gate starts."""
    torch.manual_seed(0)
    fields, ids, dim = 5, 8, 4
    model = AutoFIS(fields, dim, 1, AutoFISConfig(hidden=[4], grda_c=0.006))
    tables, first_order = (nn.Parameter(torch.randn(fields, ids, width) * 0.3) for width in (dim, 1))
    head = nn.Linear(4, 1)
    gates = model.optimizers["alpha"]([model.get_parameter("alpha")])
    others = [p for name, p in model.named_parameters() if name != "alpha"]
    adam = torch.optim.Adam([tables, first_order, *others, *head.parameters()], lr=0.01)
    hidden = torch.randn(2, ids, 2)
    for _ in range(600):
        sample = torch.randint(ids, (256, fields))
        signal = 3 * (hidden[0][sample[:, 1]] * hidden[1][sample[:, 3]]).sum(1)
        labels = torch.bernoulli(torch.sigmoid(signal))
        looked_up = (table[torch.arange(fields), sample].flatten(1) for table in (tables, first_order))
        features, logits = model(*looked_up)
        loss = binary_cross_entropy_with_logits((logits + head(features)).squeeze(1), labels)
        for optimizer in (gates, adam):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (gates, adam):
            optimizer.step()
    survivors = model.following_config().pairs
    assert (1, 3) in survivors and len(survivors) <= 3, model.interaction_summary()
