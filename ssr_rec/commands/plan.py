"""Plan a job's tables without a GPU: does it fit, how fast is a step, how long will it take; see docs/planner.md.

python tools/plan_sharding.py --config configs/kuairand_ssr_d.yaml --nodes 2 --gpus-per-node 8 --hardware a100_80g
python tools/plan_sharding.py --config configs/plan/criteo_1tb.yaml --tables configs/plan/criteo_1tb_tables.yaml \\
    --what-if 1x8,2x8,4x8,16x8,128x8

Exit code: 0 it fits; 2 bad input; 3 it does not fit; 4 it fits, but ranks wait for a slow one.
"""

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

# Before torchrec is imported: with a wrong stack that import itself fails, deep in C++.
require_stack()

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssr_rec.common.logs import quiet
from ssr_rec.common.paths import place
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.data.synthetic.write import ensure_synthetic
from ssr_rec.embeddings.plan_file import plan_of, write_plan
from ssr_rec.planning.cases import (
    Case,
    RowLookups,
    make_world,
    mean_lengths,
    override_rows,
    parse_rows,
    parse_world,
    read_tables,
    table_lookups,
)
from ssr_rec.planning.comparison_text import remedies_text, remedy_values, what_if_text, what_if_values
from ssr_rec.planning.costs import dense_cost
from ssr_rec.planning.explain import overflows, table_plans
from ssr_rec.planning.hardware import load_hardware, preset_names
from ssr_rec.planning.remedies import plan_case, try_balancing, try_remedies
from ssr_rec.planning.report_text import headline, overflow_text, report

FITS, BAD_INPUT, DOES_NOT_FIT, UNBALANCED = 0, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = _parser().parse_known_args(arguments)
    quiet()
    try:
        case = _case(options, overrides)
        if options.what_if:
            return _what_if(case, options)
        return _plan(case, options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _case(options: argparse.Namespace, overrides: Sequence[str]) -> Case:
    """Return what the command line asks to plan.

    Raises:
        ValueError: bad input; the message names the flag, key or file and the fix.
    """
    config = load_config(options.config, overrides)
    if config.sharding.plan is not None:
        raise UserError(f"sharding.plan={config.sharding.plan} names a plan, and this makes one; remove it")
    hardware = load_hardware(options.hardware)
    world = make_world(options.nodes, options.gpus_per_node or hardware.max_ranks_per_node, hardware)
    lookups: dict[str, RowLookups] = {}
    if options.tables:
        if options.data:
            raise UserError("--tables and --data are two answers to one question; give one")
        config, schema, lengths = read_tables(options.tables, config)
    else:
        path = options.data or config.data.path
        folder = place(path) if path else ensure_synthetic(config.data.synthetic, Path(config.data.synthetic_root))
        schema = Schema.read(folder)
        lengths, lookups = mean_lengths(folder, schema), table_lookups(folder, schema)
    schema = schema.select(config.data.features, config.data.labels)
    if options.scale_rows <= 0:
        raise UserError(f"--scale-rows {options.scale_rows:g}: must be more than 0")
    schema = override_rows(schema, parse_rows(options.rows), options.scale_rows)
    return Case(config, schema, lengths, world, lookups)


def _plan(case: Case, options: argparse.Namespace) -> int:
    planned = plan_case(case)
    tables = table_plans(case, planned.found)
    values: dict[str, Any] = {
        "format_version": 1,
        "dataset": case.schema.name,
        "world": {"nodes": case.world.nodes, "per_node": case.world.per_node},
        "hardware": case.world.hardware.model_dump(mode="json"),
        "fits": planned.fits,
        "planned_in_s": planned.found.seconds,
        "dense": vars(planned.dense),
        "tables": [table.as_json() for table in tables],
        "estimate": planned.estimate.as_json(),
        "total_rows": options.total_rows,
        "days": planned.estimate.days(options.total_rows),
    }
    if planned.fits:
        text = report(planned, tables, options.total_rows, options.all_tables)
        if planned.estimate.is_unbalanced and not options.no_remedies:
            remedies = list(try_balancing(planned))
            values["remedies"] = [remedy_values(remedy) for remedy in remedies]
            if remedies:
                text += "\n\n" + remedies_text(remedies, "balance")
    else:
        over = overflows(case, planned.found, planned.estimate)
        remedies = [] if options.no_remedies else list(try_remedies(planned))
        values |= {"overflows": [vars(o) for o in over], "remedies": [remedy_values(r) for r in remedies]}
        parts = [headline(planned), overflow_text(case, over, planned.estimate)]
        text = "\n\n".join([*parts, *([remedies_text(remedies)] if remedies else [])])
    _show(text, values, options)
    if options.picture:
        # Imported here: matplotlib takes a second.
        from ssr_rec.planning.figure import draw_plan

        draw_plan(case, planned.estimate, options.picture)
    if options.save and planned.fits:
        world = case.world
        plan = plan_of(planned.found.options, world.hardware.device, world.size, world.per_node)
        write_plan(plan, options.save)
    if not planned.fits:
        return DOES_NOT_FIT
    return UNBALANCED if planned.estimate.is_unbalanced else FITS


def _what_if(case: Case, options: argparse.Namespace) -> int:
    """Compare worlds; with --scale-batch every rank keeps the rows it has in the case's own world."""
    for flag, given in {"--save": options.save, "--picture": options.picture}.items():
        if given:
            raise UserError(f"{flag} is for one plan; leave out --what-if")
    dense, planned = dense_cost(case), []
    for text in options.what_if.split(","):
        world = parse_world(text, case.world.hardware)
        config = case.config
        if options.scale_batch:
            batch = case.rows_per_rank * world.size
            config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})
        planned.append(plan_case(replace(case, world=world, config=config), dense))
    worlds = what_if_values(planned, options.total_rows)
    values = {"format_version": 1, "dataset": case.schema.name, "total_rows": options.total_rows, "worlds": worlds}
    _show(what_if_text(planned, options.total_rows), values, options)
    return FITS if any(one.fits for one in planned) else DOES_NOT_FIT


def _show(text: str, values: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json == "-":
        print(json.dumps(values, indent=1))
        return
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(values, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Plan a job's tables without a GPU; see docs/planner.md.",
        epilog="Any config key: --embeddings.dim=32. Exit code 3: does not fit; 4: fits, but unbalanced.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of a run, such as configs/kuairand_ssr_d.yaml")
    parser.add_argument("--data", help="prepared dataset; default: the config's data.path")
    parser.add_argument("--tables", help="instead of a dataset: a file such as configs/plan/criteo_1tb_tables.yaml")
    parser.add_argument("--rows", action="append", default=[], metavar="FEATURE=N", help="another number of rows")
    parser.add_argument("--scale-rows", type=float, default=1.0, metavar="X", help="times as many rows in every table")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of a host; default: as many as it has")
    hardware = f"{', '.join(preset_names())}, or a YAML file"
    parser.add_argument("--hardware", default="a100_80g", help=f"{hardware} (default: a100_80g)")
    parser.add_argument("--total-rows", type=float, default=1e9, metavar="N", help="rows of the whole training")
    parser.add_argument("--what-if", metavar="WORLDS", help="compare worlds on one page: 1x8,2x8,4x8,16x8,128x8")
    parser.add_argument(
        "--scale-batch", action="store_true", help="what-if: the batch grows with the ranks; default: it stays"
    )
    parser.add_argument("--all-tables", action="store_true", help="every table in the report, not the largest only")
    parser.add_argument(
        "--no-remedies", action="store_true", help="when it does not fit or is unbalanced, do not try what would help"
    )
    parser.add_argument("--json", metavar="PATH", help="also write everything as JSON; -: to the terminal instead")
    parser.add_argument("--picture", metavar="PATH", help="draw memory and time of every rank as a PNG")
    parser.add_argument(
        "--save", metavar="PATH", help="write the plan, if it fits, for sharding.plan of the training job"
    )
    return parser


def command() -> int:
    """Run the command line of this process."""
    return main()
