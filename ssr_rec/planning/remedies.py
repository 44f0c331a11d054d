"""Finds what would make a case fit: each remedy is planned, not guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ssr_rec.config.run import RunConfig
from ssr_rec.config.sharding import TableConstraint
from ssr_rec.embeddings.sharding import CACHING, SUPPORTED
from ssr_rec.embeddings.tables import DIM_MULTIPLE
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.costs import DenseCost, dense_cost
from ssr_rec.planning.estimate import Estimate, estimate_plan
from ssr_rec.planning.explain import overflows
from ssr_rec.planning.search import Found, find_plan

MOST_NODES = 64
"""More nodes are tried by doubling, up to so many."""
SHRINKS = 0.9
"""What is missing must become less than this share of itself by doubling the nodes, or more nodes are no remedy."""
ROW_TYPES = ("row_wise", "table_row_wise")


@dataclass(frozen=True)
class Planned:
    """Holds a case with its plan and estimate."""

    case: Case
    dense: DenseCost
    found: Found
    estimate: Estimate

    @property
    def fits(self) -> bool:
        """Decide by the bytes of every rank, not by how the search ended."""
        return not overflows(self.case, self.found, self.estimate)


@dataclass(frozen=True)
class Remedy:
    """Says what was tried, the settings that do it, and how it came out; ``planned`` is None where it cannot be."""

    name: str
    settings: str
    planned: Planned | None
    problem: str = ""


def plan_case(case: Case, dense: DenseCost | None = None) -> Planned:
    """Plan one case; the dense part is counted unless it is given.

    Raises:
        UserError: see ``find_plan``.
    """
    dense = dense or dense_cost(case)
    found = find_plan(case, dense)
    return Planned(case, dense, found, estimate_plan(case, found, dense))


def try_remedies(planned: Planned) -> Iterator[Remedy]:
    """Re-plan with each single remedy, then, if none of those is enough, with all of them."""
    case = planned.case
    yield _more_nodes(planned)
    changes = list(_changes(case))
    enough, together, settings = False, case.config, []
    for name, setting, change in changes:
        remedy = _tried(name, setting, replace(case, config=change(case.config)))
        enough = enough or (remedy.planned is not None and remedy.planned.fits)
        if remedy.planned is not None:
            together = change(together)
            settings.append(setting)
        yield remedy
    if not enough and len(settings) > 1:
        all_of_these = _tried("all of these", " ".join(settings), replace(case, config=together))
        yield all_of_these
        if all_of_these.planned is not None and not all_of_these.planned.fits:
            remedy = _more_nodes(all_of_these.planned)
            yield replace(remedy, name="and more nodes", settings=f"all of these, {remedy.settings}")


def try_balancing(planned: Planned) -> Iterator[Remedy]:
    """Re-plan with columns that may be cut finer, which is what can spread a table that has few rows, too."""
    case = planned.case
    device = case.world.hardware.device
    for parts in (2, 4):
        per_table = dict(case.config.sharding.per_table)
        for option in planned.found.options:
            columns, own = option.tensor.shape[1] // parts, per_table.get(option.name, TableConstraint())
            types = own.types or case.config.sharding.types or SUPPORTED[device]
            if "column_wise" in types and columns >= DIM_MULTIPLE and columns % DIM_MULTIPLE == 0:
                per_table[option.name] = own.model_copy(update={"min_partition": columns})
        finer = _with(case.config, "sharding", per_table=per_table)
        if finer != case.config:
            setting = f"sharding.per_table: min_partition of dim/{parts} for every table"
            yield _tried(f"columns cut in {parts}", setting, replace(case, config=finer))


def _more_nodes(planned: Planned) -> Remedy:
    """Return the smallest number of nodes, by doubling, that is enough; no further where doubling does not help."""
    case, world = planned.case, planned.case.world
    nodes, last, missing = world.nodes, planned, math.inf
    while not last.fits and nodes * 2 <= MOST_NODES and _missing(last) < SHRINKS * missing:
        missing = _missing(last)
        nodes *= 2
        wider = replace(case, world=make_world(nodes, world.per_node, world.hardware))
        last = plan_case(wider, planned.dense)
    return Remedy("more nodes", f"--nodes {nodes}", last)


def _missing(planned: Planned) -> int:
    """Return bytes that the fullest rank has too little of."""
    return overflows(planned.case, planned.found, planned.estimate)[0].missing_bytes


Change = Callable[[RunConfig], RunConfig]


def _changes(case: Case) -> Iterator[tuple[str, str, Change]]:
    """Yield name, settings and effect of every change of the config that this one does not have yet."""
    config, device = case.config, case.world.hardware.device
    sharding, embeddings = config.sharding, config.embeddings
    allowed = sharding.types or SUPPORTED[device]
    rows_missing = [kind for kind in ROW_TYPES if kind in SUPPORTED[device] and kind not in allowed]
    cut = any(table.types and not set(ROW_TYPES) <= set(table.types) for table in sharding.per_table.values())
    if rows_missing or (cut and device == "cuda"):
        yield "row-wise", "--sharding.types=[] (all that the device has) for every table", _all_types
    if device == "cpu" and case.reading.events and "row_wise" not in allowed:
        more = f"--sharding.types=[{', '.join([*allowed, 'row_wise'])}] (row-wise: of tables read un-pooled)"
        yield "row-wise", more, _rows_too
    if device == "cuda" and CACHING not in sharding.kernels:
        yield "UVM caching", f"--sharding.kernels=[fused,{CACHING}]", _cached
    if embeddings.takes_halves(device) and (embeddings.dtype, *embeddings.dtypes.values()) != ("fp16",):
        yield "fp16 tables", "--embeddings.dtype=fp16", _halves
    dims = [embeddings.dim, *embeddings.dims.values()]
    if any(dim > DIM_MULTIPLE for dim in dims):
        smaller = _half(embeddings.dim)
        yield (
            "smaller dim",
            f"--embeddings.dim={smaller}" + (" and half of every dims" if embeddings.dims else ""),
            _dims,
        )


def _all_types(config: RunConfig) -> RunConfig:
    per_table = {name: table.model_copy(update={"types": []}) for name, table in config.sharding.per_table.items()}
    return _with(config, "sharding", types=[], per_table=per_table)


def _rows_too(config: RunConfig) -> RunConfig:
    return _with(config, "sharding", types=[*(config.sharding.types or SUPPORTED["cpu"]), "row_wise"])


def _cached(config: RunConfig) -> RunConfig:
    return _with(config, "sharding", kernels=["fused", CACHING])


def _halves(config: RunConfig) -> RunConfig:
    return _with(config, "embeddings", dtype="fp16", dtypes={})


def _dims(config: RunConfig) -> RunConfig:
    dims = {name: _half(dim) for name, dim in config.embeddings.dims.items()}
    return _with(config, "embeddings", dim=_half(config.embeddings.dim), dims=dims)


def _half(dim: int) -> int:
    """Return half a dim, rounded up to what FBGEMM can store."""
    return max(DIM_MULTIPLE, -(-dim // 2 // DIM_MULTIPLE) * DIM_MULTIPLE)


def _with(config: RunConfig, section: str, **changes: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _tried(name: str, setting: str, case: Case) -> Remedy:
    try:
        return Remedy(name, setting, plan_case(case))
    except ValueError as error:
        return Remedy(name, setting, None, str(error))
