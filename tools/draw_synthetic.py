"""Draw a synthetic click log of any size.

python tools/draw_synthetic.py --output data/synthetic-5m --train_rows=5000000

Every key of SyntheticConfig (docs/synthetic.md) is an option; the same keys always give the same log.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import first_problem
from ssr_rec.config.run import apply_override
from ssr_rec.data.synthetic.config import SyntheticConfig
from ssr_rec.data.synthetic.write import write_synthetic


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the prepared dataset")
    options, overrides = parser.parse_known_args(arguments)
    values: dict[str, object] = {}
    started = time.perf_counter()
    try:
        for override in overrides:
            apply_override(values, override)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        schema = write_synthetic(SyntheticConfig.model_validate(values), options.output)
    except ValidationError as error:
        print(f"error: {first_problem(error)}; keys: {', '.join(SyntheticConfig.model_fields)}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = sum(split.num_rows for split in schema.splits.values())
    print(f"{options.output}: {rows:,} rows in {time.perf_counter() - started:.1f} s, {schema.dataset_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
