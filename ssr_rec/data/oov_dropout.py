"""Send a share of training's lookups to the out-of-vocabulary row, so that it has learned what unseen values bring.

A vocabulary is fitted on training's rows, so that training meets few values without an id, and a later day many: the
row of such values is then looked up often and was hardly trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.data.blocks import Block
from ssr_rec.data.features import LISTED, Feature
from ssr_rec.data.schema import Schema


def oov_shares(wanted: float | Mapping[str, float], schema: Schema, domain: str | None = None) -> dict[str, float]:
    """Return feature -> share of its lookups to drop, of ``data.oov_dropout``.

    A share for all features leaves given vectors alone: a value that is new to a vocabulary has its vector. Named,
    they become the zeros of a value without one.

    Args:
        domain: the feature whose ids choose parts of the model; None: there are no such parts.

    Raises:
        UserError: a feature that the dataset lacks, or that has no out-of-vocabulary id; or a share for all features
            where a domain would lose rows by it.
    """
    having = [feature.name for feature in schema.features if isinstance(feature.encoding, LISTED)]
    if not isinstance(wanted, Mapping):
        learned = [feature.name for feature in schema.embedded if feature.name in having]
        if wanted and not learned:
            raise UserError(f"data.oov_dropout={wanted}: no feature of dataset {schema.name!r} has a vocabulary")
        if wanted and domain in learned:
            named = ", ".join(f"{name}: {wanted:g}" for name in learned if name != domain)
            raise UserError(
                f"data.oov_dropout={wanted:g} of all features would train the parts of unknown values on that share of "
                f"the rows of every domain {domain!r}; name the features, as in {{{named}}}, and {domain!r} only if it "
                "should"
            )
        return dict.fromkeys(learned, wanted) if wanted else {}
    for name in wanted:
        if name not in having:
            known = "has no out-of-vocabulary id" if name in schema.feature_names else "is not a feature that is used"
            raise UserError(f"data.oov_dropout names {name!r}, which {known}; those that have one: {', '.join(having)}")
    return {name: share for name, share in wanted.items() if share}


class OovDropout:
    """Makes ids of decoded blocks out of vocabulary, the same ones whatever the number of ranks and after a resume.

    Which ones depends on the seed, the epoch, the feature, and the row's place in its row group alone.

    Args:
        shares: feature -> share of lookups; missing values stay missing.
    """

    def __init__(self, shares: Mapping[str, float], schema: Schema, split: str, seed: int) -> None:
        self.shares, self.features, self.seed = shares, schema.features, (seed, zlib.crc32(split.encode()))

    def apply(self, block: Block, rows: np.ndarray, group: int, epoch: int) -> None:
        """Change a block in place.

        Args:
            rows: (n,) places in the row group ``group`` of the block's rows.
        """
        single = listed = 0
        for number, feature in enumerate(self.features):
            share = self.shares.get(feature.name)
            if feature.kind == "list":
                lists, listed = block.lists[listed], listed + 1
                if share is not None:
                    places = np.arange(len(lists.ids)) - np.repeat(lists.offsets[:-1] - lists.offsets[0], lists.lengths)
                    key = np.repeat(rows, lists.lengths) * (feature.max_length or 1) + places
                    self._drop(lists.ids, key, feature, number, share, group, epoch)
            else:
                ids, single = block.scalars[single], single + 1
                if share is not None:
                    self._drop(ids, rows, feature, number, share, group, epoch)

    def _drop(
        self, ids: np.ndarray, key: np.ndarray, feature: Feature, number: int, share: float, group: int, epoch: int
    ) -> None:
        assert isinstance(feature.encoding, LISTED)
        start = np.random.default_rng((*self.seed, epoch, group, number)).integers(2**63, dtype=np.uint64)
        z = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        # The finaliser of SplitMix64.
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        uniform = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        ids[(uniform < share) & (ids != feature.encoding.missing_id)] = feature.encoding.oov_id
