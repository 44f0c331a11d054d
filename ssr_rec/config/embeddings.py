"""Defines the ``embeddings`` section of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings
from ssr_rec.config.schedule import ScheduleConfig
from ssr_rec.data.features import Feature


class ManagedTable(Settings):
    """Sets up a table of fixed size whose ids training admits and evicts (``embeddings/evicting_tables.py``)."""

    rows: int = Field(ge=2, le=2**31, description="rows of the table; ids without one share the last")
    eviction: Literal["lfu", "lru", "distance_lfu"] = Field(
        "lfu", description="which ids make room: the rarest, those not seen for longest, or a mixture of both"
    )
    interval: int = Field(10, ge=1, le=65_536, description="steps over which ids are counted before some are admitted")
    admit: int = Field(1, ge=1, description="occurrences within an interval that make an id a candidate")


class EmbeddingsConfig(Settings):
    dim: int = Field(16, ge=1, description="embedding dim D of every table not named in dims; a multiple of 4")
    dims: dict[str, int] = Field(
        {}, description="table (a feature, or the vocabulary it shares) -> its own dim, a multiple of 4"
    )
    managed: dict[str, ManagedTable] = Field({}, description="feature -> its table of fixed size")
    dtype: TableDtype = Field(
        "fp32", description="of the tables' weights; pooled vectors, gradients and optimizer state are fp32 always"
    )
    dtypes: dict[str, TableDtype] = Field({}, description="table -> its own dtype")
    trained_vectors: list[str] = Field(
        [],
        description="features with vectors given by id whose vectors are trained as tables are, from the given ones "
        "on; others stay as given",
    )
    pooling: Literal["mean", "sum"] = Field("mean", description="how the ids of a list feature become one vector")
    init_scale: float = Field(0.05, gt=0, description="tables start uniform in [-init_scale, init_scale]")
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "lazy_adam", "adam"] = Field(
        "rowwise_adagrad",
        description="fused into the backward pass, but for adam, which moves every row in every step and keeps every "
        "table whole on every rank; lazy_adam moves the rows of the batch",
    )
    learning_rate: float = Field(0.01, ge=0)
    weight_decay: float = Field(
        0.0, ge=0, description="adam: L2 of all rows; lazy_adam: decoupled, of the rows of a batch; others have none"
    )
    schedule: ScheduleConfig = Field(
        ScheduleConfig(), description="of the tables' learning rate after optimizer.warmup_steps"
    )
    eps: float = Field(1e-8, gt=0, description="added to the optimizer's denominator; sgd ignores it")

    @model_validator(mode="after")
    def _decays(self) -> EmbeddingsConfig:
        if self.weight_decay > 0 and self.optimizer not in ("adam", "lazy_adam"):
            raise UserError(
                f"weight_decay={self.weight_decay}: FBGEMM's {self.optimizer} has none on every device, so it would do "
                "nothing; set it to 0, or choose embeddings.optimizer=lazy_adam or adam"
            )
        return self

    def rows_of(self, feature: Feature) -> int:
        """Return rows of the feature's tables."""
        return self.managed[feature.name].rows if feature.name in self.managed else feature.num_embeddings

    def dim_of(self, table: str) -> int:
        return self.dims.get(table, self.dim)

    def dtype_of(self, table: str) -> TableDtype:
        return self.dtypes.get(table, self.dtype)

    @property
    def is_fused(self) -> bool:
        """Return whether the optimizer runs in the backward pass, which none that moves every row does."""
        return self.optimizer != "adam"

    def takes_halves(self, device_type: str) -> bool:
        """Return whether tables can be fp16: their moments must be fp32, and on a CPU Adam moves fp32 rows alone."""
        return self.is_fused and not (self.optimizer == "lazy_adam" and device_type == "cpu")


TableDtype = Literal["fp32", "fp16"]
