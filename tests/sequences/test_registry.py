"""Settings, and encoders made from them, of this package and from outside it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.sequences.contract import check_encoder
from ssr_rec.sequences.registry import ENCODERS, build_encoder
from ssr_rec.sequences.settings import EncoderSettings
from tests.sequences.cases import CONFIGS, batch

OWN = '''
"""An encoder of somebody else's."""

from typing import Literal

import torch
from pydantic import Field

from ssr_rec.over_archs.base import Flops
from ssr_rec.sequences import EncoderSettings, SequenceEncoder


class LargestConfig(EncoderSettings):
    name: Literal["largest"] = "largest"
    sign: int = Field(default=1, ge=-1, le=1)


class Largest(SequenceEncoder):
    settings_class = LargestConfig

    def __init__(self, event_dim, target_dim, field_dim, max_length, settings):
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        self.set_output(event_dim)

    def encode(self, events, target, ages, jagged):
        rows = jagged.rows.unsqueeze(1).expand_as(events)
        empty = events.new_zeros(len(jagged.lengths), self.event_dim)
        return self.settings.sign * empty.scatter_reduce(0, rows, events, "amax", include_self=False)

    def flops(self, length):
        return Flops(elementwise=length * self.event_dim)


class RowsTogether(Largest):
    def encode(self, events, target, ages, jagged):
        return super().encode(events - events.mean(), target, ages, jagged)


class NotDefined(Largest):
    def encode(self, events, target, ages, jagged):
        sums = super().encode(events, target, ages, jagged)
        return sums / jagged.lengths.unsqueeze(1)


class Unused(Largest):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unused = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, events, target, ages, jagged):
        return self.scale * super().encode(events, target, ages, jagged)


class WithoutOutput(Largest):
    def set_output(self, width):
        pass


class WithoutSettings(SequenceEncoder):
    def encode(self, events, target, ages, jagged):
        return events

    def flops(self, length):
        return Flops()


a_function = len
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of that text, somewhere on the path."""
    (tmp_path / "own_encoders.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_encoders"


def custom(path: str, **settings: Any) -> EncoderSettings:
    return CONFIGS.validate_python({"name": "custom", "path": path, **settings})


def test_an_encoder_from_outside_is_named_by_its_import_path(own: str) -> None:
    encoder = build_encoder(8, 8, 4, 6, custom(f"{own}:Largest", settings={"sign": -1}))
    inputs = batch("pool mean", (3, 0))
    y = encoder(*inputs)
    torch.testing.assert_close(y[0], -inputs.events.max(0).values)
    assert not y[1].any() and encoder.out_fields == 2
    assert custom(f"{own}:Largest").label == "Largest"
    assert build_encoder(8, 8, 4, 6, custom(f"{own}:Largest", fields=3)).out_fields == 3


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("no_such_module:Largest", {}, "cannot import no_such_module .*PYTHONPATH"),
        ("own_encoders:Smallest", {}, "own_encoders has no Smallest"),
        ("own_encoders:a_function", {}, "must be a subclass of"),
        ("own_encoders:WithoutSettings", {}, "must have a settings_class"),
        ("own_encoders:WithoutOutput", {}, "no out_fields: call set_output"),
        ("own_encoders:Largest", {"sing": 1}, r"settings.sing: Extra inputs are not permitted"),
        ("own_encoders:Largest", {"sign": 2}, r"settings.sign: Input should be less than or equal to 1"),
    ],
)
def test_an_encoder_from_outside_that_does_not_fit_is_refused(
    own: str, path: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build_encoder(8, 8, 4, 6, custom(path, settings=settings))
    assert "\n" not in str(refused.value) and path in str(refused.value)


@pytest.mark.parametrize(
    ("name", "breach"),
    [
        ("Largest", None),
        ("RowsTogether", "depends on the other rows"),
        ("NotDefined", "a history may be empty"),
        ("Unused", r"unused\.weight gets no gradient"),
    ],
)
def test_the_contract_of_an_encoder_from_outside_is_checked(own: str, name: str, breach: str | None) -> None:
    with pytest.raises(AssertionError, match=breach) if breach else nullcontext():
        check_encoder(f"{own}:{name}")


def test_an_error_inside_that_module_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_encoders.py").write_text("import module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot import broken_encoders .*module_that_is_not_there"):
        build_encoder(8, 8, 4, 6, custom("broken_encoders:Encoder"))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "nope"},
        {"num_heads": 2},
        {"name": "pool", "mode": "max"},
        {"name": "pool", "num_heads": 2},
        {"name": "pool", "fields": 0},
        {"name": "din", "hidden": []},
        {"name": "din", "activation": "tanh"},
        {"name": "target_attention", "num_heads": 0},
        {"name": "target_attention", "dropout": 1.0},
        {"name": "transformer", "positions": "none", "position_dim": 4},
        {"name": "transformer", "positions": "index", "age_buckets": 32},
        {"name": "hstu", "bias": "position", "age_buckets": 32},
        {"name": "custom"},
        {"name": "custom", "path": "no_class"},
        {"name": "custom", "path": "module:Class:more"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CONFIGS.validate_python(settings)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 8, 4, 6), "event_dim=0"), ((8, 8, 0, 6), "field_dim=0"), ((8, 8, 4, 0), "max_length=0")],
)
def test_impossible_sizes_are_refused(name: str, sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(*sizes, CONFIGS.validate_python({"name": name}))


def test_who_needs_a_target_says_so() -> None:
    assert build_encoder(8, 0, 4, 6, CONFIGS.validate_python({"name": "pool"})).out_fields == 2
    with pytest.raises(UserError, match="target_dim=0: DIN needs at least 1"):
        build_encoder(8, 0, 4, 6, CONFIGS.validate_python({"name": "din"}))


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"name": "pool", "mode": "last"}, "last pooling"),
        ({"name": "din", "hidden": [80, 40]}, "DIN 80-40"),
        ({"name": "target_attention", "attention_dim": 32}, "target attention 2x32"),
        ({"name": "target_attention", "layer_norm": True}, "target attention 2xE LN"),
        ({"name": "transformer"}, "transformer 1x8 heads"),
        ({"name": "hstu"}, "HSTU 2x2 heads"),
    ],
)
def test_label(settings: dict[str, Any], label: str) -> None:
    assert CONFIGS.validate_python(settings).label == label
