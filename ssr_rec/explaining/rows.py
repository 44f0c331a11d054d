"""Holds rows of a split in memory, to score them as they are and with columns exchanged between rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ssr_rec.data.batch import Batch, hide_new_ids, row_keys
from ssr_rec.data.batch_order import Piece
from ssr_rec.data.blocks import Block, Lists
from ssr_rec.data.reader import assemble
from ssr_rec.data.row_groups import SplitFiles
from ssr_rec.data.schema import Schema
from ssr_rec.metrics.exact import with_equal_rows_tied
from ssr_rec.model.ctr_model import CTRModel

BATCH_ROWS = 8192


@dataclass(frozen=True)
class SplitRows:
    """Holds the first rows of a split in their stored order, which preparation has shuffled.

    Attributes:
        schema: features and labels, in the order of ``block``.
        split: its name; of a day, ids that its own rows gave to values are out of vocabulary, as in its evaluation.
        block: ids, lists and labels of all rows.
    """

    schema: Schema
    split: str
    block: Block

    @classmethod
    def read(cls, folder: Path, schema: Schema, split: str, most: int | None = None) -> SplitRows:
        """Return the first ``most`` rows of a split (None: all).

        Raises:
            UserError: what ``SplitFiles`` refuses.
        """
        files = SplitFiles(folder, schema, split)
        left = most if most is not None else int(files.group_rows.sum())
        blocks: list[Block] = []
        for group, rows in enumerate(files.group_rows.tolist()):
            if left <= 0:
                break
            blocks.append(files.read(Piece(group, 0, min(rows, left)), None))
            left -= blocks[-1].num_rows
        return cls(schema, split, _joined(blocks))

    def exchanged(self, features: Sequence[str], order: np.ndarray) -> SplitRows:
        """Return rows of which each has the named features of another: row i those of row ``order[i]``."""
        scalars, lists, single = self.block.scalars.copy(), [], 0
        old_lists = iter(self.block.lists)
        for feature in self.schema.features:
            if feature.kind == "list":
                old = next(old_lists)
                lists.append(old.taken(order) if feature.name in features else old)
                continue
            if feature.name in features:
                scalars[single] = self.block.scalars[single][order]
            single += 1
        dense = self.block.dense
        if dense is not None:
            moved = np.repeat(np.isin(self.schema.dense_names, features), self.schema.dense_widths)
            dense = np.where(moved, dense[order], dense)
        return replace(self, block=replace(self.block, scalars=scalars, lists=lists, dense=dense))

    def batches(self, rows: int = BATCH_ROWS) -> Iterator[Batch]:
        """Yield all rows in order."""
        new_from = self.schema.new_from(self.split)
        for start in range(0, self.block.num_rows, rows):
            stop = min(start + rows, self.block.num_rows)
            batch = assemble(self.schema, [(self.block, start, stop)], stop - start)
            yield hide_new_ids(batch, self.schema, new_from) if new_from else batch

    def logits(self, model: CTRModel, tied: bool = False) -> np.ndarray:
        """Return what the model makes of the rows, ``(N, T)`` float32.

        Args:
            tied: give rows of equal inputs one value, as evaluations do.
        """
        logits, keys = [], []
        with torch.inference_mode():
            for batch in self.batches():
                logits.append(model(*batch.inputs))
                if tied:
                    keys.append(row_keys(*batch.inputs))
        found = torch.cat(logits).float().numpy()
        return with_equal_rows_tied(found, torch.cat(keys).numpy()) if tied else found


def _joined(blocks: Sequence[Block]) -> Block:
    lists = []
    for parts in zip(*(block.lists for block in blocks), strict=True):
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # A part's ids may begin before its first row's, as those of a slice do.
        ids = np.concatenate([part.ids[part.offsets[0] : part.offsets[-1]] for part in parts])
        own = [part.weights[part.offsets[0] : part.offsets[-1]] for part in parts if part.weights is not None]
        lists.append(Lists(ids, offsets, lengths, np.concatenate(own) if own else None))
    groups = [block.group_ids for block in blocks if block.group_ids is not None]
    weights = [block.weights for block in blocks if block.weights is not None]
    dense = [block.dense for block in blocks if block.dense is not None]
    together = [block.together for block in blocks if block.together is not None]
    return Block(
        np.concatenate([block.scalars for block in blocks], axis=1),
        lists,
        np.concatenate([block.labels for block in blocks]),
        np.concatenate(groups) if groups else None,
        np.concatenate(weights) if weights else None,
        np.concatenate(dense) if dense else None,
        np.concatenate(together) if together else None,
    )
