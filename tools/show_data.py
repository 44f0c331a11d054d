"""What a prepared dataset's tables are used for: ``python tools/show_data.py DATA [--plot PATH]``; see docs/ids.md.

Prints a Markdown table, one line per feature, counted over the training split (or all days): rows of its table, ids
seen, shares of lookups, and for hashed features the collisions measured when it was prepared beside those expected. The
last line is JSON. Bad input ends it with exit code 2 and one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_rec.data.use import table_use
from ssr_rec.schema import Schema


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
        from ssr_rec.use_figures import draw_use, unknown, use_table

        print(use_table(uses))
        if (missing := unknown(uses)) is not None:
            print(f"\n{missing}")
        if chosen.plot is not None:
            draw_use(uses, chosen.plot)
    except (ValueError, OSError) as error:
        print(f"show_data: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    figures = [{k: None if v != v else v for k, v in use.figures().items()} for use in uses]
    print(json.dumps({"dataset": schema.name, "dataset_id": schema.dataset_id, "features": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
