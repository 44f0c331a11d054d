"""Says which list features of a dataset are columns of one sequence, and which features share a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings
from ssr_rec.data.features import Feature


class EventSequence(Settings):
    """Names the features of a row's events, the oldest first: the k-th item of each belongs to the k-th event."""

    name: str
    features: list[str] = Field(min_length=1, description="list features, of equal lengths in every row")
    age: str | None = Field(None, description="which of them has the events' ages, in log buckets")

    def select(self, kept: Sequence[str]) -> EventSequence | None:
        """Return the sequence with those of its features that are ``kept``; None where none is."""
        features = [name for name in self.features if name in kept]
        age = self.age if self.age in features else None
        return self.model_copy(update={"features": features, "age": age}) if features else None


def check_sequences(sequences: Sequence[EventSequence], features: Sequence[Feature]) -> None:
    """Check that sequences are made of aligned list features, each of one sequence.

    Raises:
        UserError: they are not.
    """
    by_name = {feature.name: feature for feature in features}
    seen: dict[str, str] = {}
    for sequence in sequences:
        for name in sequence.features:
            if name not in by_name or by_name[name].kind != "list":
                raise UserError(f"sequence {sequence.name!r}: {name!r} is no list feature")
            if name in seen:
                raise UserError(f"sequences {seen[name]!r} and {sequence.name!r} both have feature {name!r}")
            seen[name] = sequence.name
        if len({by_name[name].max_length for name in sequence.features}) > 1:
            raise UserError(f"sequence {sequence.name!r}: its features must have one max_length")
        if sequence.age is not None:
            if sequence.age not in sequence.features:
                raise UserError(f"sequence {sequence.name!r}: age {sequence.age!r} is not among its features")
            if by_name[sequence.age].encoding.type != "log_buckets":
                raise UserError(f"sequence {sequence.name!r}: age {sequence.age!r} is not in log buckets")
    if len({sequence.name for sequence in sequences}) < len(sequences):
        raise UserError("sequences: a name is used more than once")


def check_vocabularies(features: Sequence[Feature]) -> None:
    """Check that features of one vocabulary have the same ids, and that its name is nobody else's.

    Raises:
        UserError: they have not, or it is.
    """
    firsts: dict[str, Feature] = {}
    names = {feature.name: feature for feature in features}
    for feature in features:
        if feature.vocabulary is None:
            continue
        other = names.get(feature.vocabulary)
        if other is not None and other.vocabulary != feature.vocabulary:
            raise UserError(f"vocabulary {feature.vocabulary!r} has the name of a feature that is not of it")
        first = firsts.setdefault(feature.vocabulary, feature)
        if _ids(first) != _ids(feature):
            raise UserError(
                f"features {first.name!r} and {feature.name!r} are of vocabulary {feature.vocabulary!r}, but their "
                "ids are not the same"
            )


def _ids(feature: Feature) -> tuple[int, dict[str, object]]:
    return feature.num_embeddings, feature.encoding.model_dump(exclude={"column"})
