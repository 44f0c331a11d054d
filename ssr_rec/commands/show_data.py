"""Shows a prepared dataset's use of its tables: ``python tools/show_data.py DATA [--plot PATH]``; see docs/ids.md.

Prints the dataset in one line (the paper's Table 1) and a table of its features, counted over the training split (or
all days): rows of a feature's table, ids seen, shares of lookups, and for hashed features the collisions measured when
it was prepared beside those expected. A third table has the missing and out-of-vocabulary shares of every split. The
last line is JSON. Bad input ends it with exit code 2 and one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import Schema
from ssr_rec.data.table_usage import split_lookups, table_use


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report how a prepared dataset uses its tables.")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder made by tools/prepare_data.py")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="also draw it as a PNG")
    parser.add_argument("--memory-limit", default="1GB", help="of the engine, which spills beyond it (default 1GB)")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    chosen = parser.parse_args(arguments)
    try:
        schema = Schema.read(chosen.data)
        uses = table_use(chosen.data, schema, chosen.memory_limit, chosen.threads)
        # Imported here: matplotlib takes a second, which a wrong path need not wait for.
        from ssr_rec.runs.table_usage import dataset_table, draw_use, split_table, unknown, use_table

        print(f"{dataset_table(schema)}\n\n{use_table(uses)}")
        shares = split_lookups(chosen.data, schema, chosen.memory_limit)
        if any(shares.values()):
            print(f"\n{split_table(shares)}")
        if (missing := unknown(uses)) is not None:
            print(f"\n{missing}")
        if chosen.plot is not None:
            draw_use(uses, chosen.plot)
    except (UserError, OSError) as error:
        print(f"show_data: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    figures = [{k: None if v != v else v for k, v in use.figures().items()} for use in uses]
    splits = {split: {n: found.model_dump() for n, found in of.items()} for split, of in shares.items()}
    about = {"dataset": schema.name, "dataset_id": schema.dataset_id}
    print(json.dumps({**about, "features": figures, "splits": splits}))
    return 0


def command() -> int:
    """Run the command line of this process."""
    return main()
