"""Says what a synthetic log is made of: its features and the config of its size and difficulty."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings

USER, ITEM, CATEGORY, HISTORY = "user_id", "item_id", "item_category", "history"


class Planted(NamedTuple):
    """Describes a single-valued feature of the truth; ``most_ids`` None: as many as there are users or items."""

    name: str
    group: Literal["user", "item", "context"]
    kind: Literal["categorical", "numeric"]
    most_ids: int | None


PLANTED = (
    Planted(USER, "user", "categorical", None),
    Planted("user_segment", "user", "categorical", 1_000),
    Planted("user_city", "user", "categorical", 400),
    Planted("user_age", "user", "categorical", 12),
    Planted("user_tenure", "user", "numeric", 64),
    Planted(ITEM, "item", "categorical", None),
    Planted(CATEGORY, "item", "categorical", 400),
    Planted("item_brand", "item", "categorical", 2_000),
    Planted("item_shop", "item", "categorical", 5_000),
    Planted("item_price", "item", "numeric", 50),
    Planted("hour", "context", "categorical", 24),
    Planted("position", "context", "categorical", 30),
    Planted("device", "context", "categorical", 100),
    Planted("page", "context", "categorical", 200),
)
NUM_PLANTED = len(PLANTED) + 1
"""Features in the truth: the single-valued ones and the history."""


def products(order: int) -> list[tuple[str, ...]]:
    """Return all sets of ``order`` planted features that come from different groups.

    Within a group one feature nearly determines another, so a product there would be a main effect in disguise.
    """
    sets = combinations(PLANTED, order)
    return [tuple(f.name for f in one) for one in sets if len({f.group for f in one}) == order]


class SyntheticConfig(Settings):
    """Configures a synthetic click log: its size, its fields and how hard it is."""

    seed: int = Field(0, ge=0, description="of the truth and of the rows")
    train_rows: int = Field(2_000_000, ge=1, description="rows of the training split")
    validation_rows: int = Field(100_000, ge=1, description="rows of the validation split")
    test_rows: int = Field(200_000, ge=1, description="rows of the test split")
    num_fields: int = Field(40, description=f"features in all: {NUM_PLANTED} are in the truth, the rest are noise")
    users: int = Field(20_000, ge=2, description="user ids")
    items: int = Field(20_000, ge=2, description="item ids")
    zipf: float = Field(1.1, ge=0, description="exponent of the id frequencies, users apart")
    user_zipf: float = Field(0.5, ge=0, description="exponent of the user frequencies: flat enough for a GAUC")
    fidelity: float = Field(0.9, ge=0, lt=1, description="share of rows whose attribute is what the user or item has")
    loyalty: float = Field(0.5, ge=0, lt=1, description="share of history entries that are the user's favourite")
    history_length: int = Field(20, ge=1, description="most ids of a history")
    latent_dim: int = Field(4, ge=1, description="width of the latents behind pairs, triples and history")
    num_pairs: int = Field(14, ge=1, description="pairs in the click logit; half as many in the conversion logit")
    num_triples: int = Field(6, ge=1, description="triples in the click logit; half as many in the conversion logit")
    main_share: float = Field(0.30, gt=0, description="variance share of the main effects; shares are normalised")
    pair_share: float = Field(0.40, gt=0, description="variance share of the pairs")
    triple_share: float = Field(0.15, gt=0, description="variance share of the triples")
    history_share: float = Field(0.15, gt=0, description="variance share of the affinities to the history")
    signal: float = Field(1.35, gt=0, description="standard deviation of both logits: sets the ceiling")
    carry: float = Field(0.25, ge=0, lt=1, description="variance share of the conversion logit that is the click's")
    click_rate: float = Field(0.25, gt=0, lt=1, description="expected share of rows with a click")
    pay_rate: float = Field(0.04, gt=0, lt=1, description="expected share of rows with a pay")

    @model_validator(mode="after")
    def _possible(self) -> SyntheticConfig:
        if self.num_fields < NUM_PLANTED:
            raise UserError(f"num_fields={self.num_fields}: the truth has {NUM_PLANTED}; ask for at least that many")
        if self.pay_rate >= self.click_rate:
            raise UserError(f"pay_rate={self.pay_rate}: every pay is a click; set it below {self.click_rate}")
        for key, order in (("num_pairs", 2), ("num_triples", 3)):
            if getattr(self, key) > len(products(order)):
                raise UserError(f"{key}={getattr(self, key)}: there are {len(products(order))}; ask for at most those")
        return self
