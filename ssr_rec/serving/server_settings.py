"""Says how a server runs: where, in how many processes, how requests are batched, and what it refuses."""

from __future__ import annotations

from pydantic import Field

from ssr_rec.common.settings import Settings


class ServerSettings(Settings):
    artifact: str = Field(description="folder made by tools/export.py")
    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback wants a proxy in front")
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=256, description="processes, each with the model; its tables are mapped once")
    threads: int = Field(1, ge=1, le=1024, description="of torch in each process")
    batch_rows: int = Field(1024, ge=1, description="waiting requests are scored together up to so many rows")
    batch_wait_ms: float = Field(
        0.0, ge=0, le=1000, description="how long a request waits for others while the scorer is free"
    )
    queue_rows: int = Field(8192, ge=1, description="rows that may wait in a process; beyond it requests get 429")
    timeout_s: float = Field(1.0, gt=0, le=600, description="a request that has waited so long is answered 503")
    reload_s: float = Field(0.0, ge=0, description="so often it is looked whether the artifact was replaced; 0: never")
    trial_rows: int = Field(
        0,
        ge=0,
        description="a replaced artifact first scores so many rows beside the old one, in each process; 0: none",
    )
    trial_share: float = Field(0.1, gt=0, le=1, description="of the requests that it scores meanwhile")
    trial_difference: float = Field(
        0.05, ge=0, le=1, description="mean difference of a task's probabilities up to which it then takes over"
    )
    max_bytes: int = Field(2**24, ge=1, description="of a request's body")
    max_rows: int = Field(8192, ge=1, description="of a request")
    drain_s: float = Field(30.0, gt=0, description="after SIGTERM, for the requests that were accepted")
