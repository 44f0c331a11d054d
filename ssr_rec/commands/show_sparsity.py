"""Shows how sparse a trained over-arch is: ``python tools/show_sparsity.py RUN [--plot PATH]``; docs/over_archs.md.

Prints a Markdown table of the dense layers (share of weights near zero, share of inputs that hold most of the weights:
the paper's Figure 1) and, of SSR, one of how alike the views are (Figure 6). The last line is JSON. With --plot a PNG:
the views of SSR, the first dense layer of any other over-arch. Bad input ends it with exit code 2 and one line.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

# Before torchrec is imported: with a wrong stack that import itself fails, deep in C++.
require_stack()

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ssr_rec.common.logs import quiet
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.runs.folder import plain
from ssr_rec.serving.trained_model import Restored, restore_model
from ssr_rec.studies.sparsity import dense_layers, sparsity_table, view_figures, weight_figures
from ssr_rec.training.captured import capture
from ssr_rec.training.datasets import open_reader


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show how sparse a trained over-arch is.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder; its best weights are looked at")
    parser.add_argument("--data", type=Path, help="where the prepared dataset is now; default: where the run says")
    parser.add_argument("--split", default="test", help="whose first rows pass through SSR's filters; default: test")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="also draw it as a PNG")
    chosen = parser.parse_args(arguments)
    quiet()
    try:
        restored = restore_model(chosen.run, chosen.data)
        over_arch = restored.model.dense.over_arch
        layers = [
            {"name": name, "inputs": w.shape[1], "outputs": w.shape[0], **weight_figures(w)}
            for name, w in dense_layers(over_arch).items()
        ]
        views = view_figures(over_arch, *first_rows(restored, chosen.split)) if isinstance(over_arch, SSR) else []
        if not layers and not views:
            raise UserError(f"{chosen.run}: {restored.config.over_arch.label} has no dense layer and no views to show")
        print(sparsity_table(layers, views))
        if chosen.plot is not None:
            _draw(restored, views, chosen.plot)
    except (UserError, OSError) as error:
        print(f"show_sparsity: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"run": chosen.run.name, "layers": layers, "views": plain(_as_lists(views))}))
    return 0


def first_rows(restored: Restored, split: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the over-arch is fed with of the first rows of a split, B of them at most 1,024.

    Returns:
        (B, sum of field dims), and the rows' domains (B,) where it has views of theirs.
    """
    reader = open_reader(restored.config, restored.data, restored.schema, split, 0, 1, to_train=False)
    batches = reader.epoch(0)
    with capture(restored.model.dense) as captured, torch.no_grad():
        batch = next(batches)
        restored.model(*batch.inputs)
    batches.close()
    assert captured.inputs is not None
    return captured.inputs, captured.domain


def _draw(restored: Restored, views: list[dict[str, Any]], path: Path) -> None:
    # Imported here: matplotlib takes a second, and the table alone does not need it.
    from ssr_rec.studies.sparsity_figure import draw_dense_layer, draw_views

    title = f"{restored.config.over_arch.label}   ·   {restored.schema.name}"
    if views:
        draw_views(views, title, path)
        return
    name, weight = next(iter(dense_layers(restored.model.dense.over_arch).items()))
    draw_dense_layer(weight, f"{title}   ·   {name}", path)


def _as_lists(views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in views]


def command() -> int:
    """Run the command line of this process."""
    return main()
