"""Defines ``CTRClassifier``: from a DataFrame to a trained model in a notebook, as scikit-learn's estimators do it.

Underneath are the same preparation, reader, trainer and encoder of raw rows as behind the commands: a fitted estimator
is a run folder with its dataset.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place
from ssr_rec.common.versions import check_stack
from ssr_rec.config.run import RunConfig, load_config
from ssr_rec.data.preparation.frame_columns import spec_of_frame, write_frame
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.row_spec import number_labels
from ssr_rec.data.preparation.spec import TableSpec, make_spec
from ssr_rec.estimator.labels import Labels, labels_of, refuse_numbers
from ssr_rec.estimator.rows import frame_of, frames_held_out, names_of, new_name, split_of, weights_of
from ssr_rec.estimator.settings import parameters_of, run_config
from ssr_rec.metrics.exact import auc
from ssr_rec.runs.curves import curves_figure
from ssr_rec.runs.folder import CONFIG_FILE, METRICS_FILE, read_metrics
from ssr_rec.runs.portable import PortableRun
from ssr_rec.runs.report import read_report

ESTIMATOR_FILE = "estimator.json"


class CTRClassifier(ClassifierMixin, BaseEstimator):
    """Predicts clicks, and any other label of two classes, from a DataFrame of ids, texts, numbers and lists.

    Example:
        >>> model = CTRClassifier(over_arch="dcn_v2", epochs=3)
        >>> model.fit(log, labels="click", group_id="user_id")
        >>> model.predict_proba(new_rows)[:, 1]

    Args:
        over_arch: a name such as ``ssr``, ``mlp`` or ``dcn_v2``, or a mapping of it and its settings; None: SSR-D.
        encoders: sequence -> name of an encoder such as ``din``, or a mapping of it, its settings and the features
            that it sees the events from, ``{"name": "din", "target": ["item"]}``; without one its events are pooled.
        embedding_dim: D of every table, a multiple of 4.
        epochs: at most this many passes over the training rows.
        batch_size: rows of a step.
        learning_rate: of the over-arch; that of the tables is ``config={"embeddings": {"learning_rate": ...}}``.
        seed: of split, weights and shuffle.
        verbose: print the columns' kinds, progress and the result.
        config: every other key of a config, in its sections: ``{"train": {"patience": 2}}``.

    Attributes:
        classes_: (2,) the two values of the label, the second is the one predicted; of several labels a list of them.
        labels_: names of the labels.
        columns_: what each column is: the ``TableSpec``.
        report_: the run's report, with the measures of its validation and test rows.
        history_: DataFrame of the run's progress and evaluations, a row each.
        n_features_in_, feature_names_in_: as scikit-learn has them.
    """

    def __init__(
        self,
        over_arch: str | Mapping[str, Any] | None = None,
        *,
        encoders: Mapping[str, Any] | None = None,
        embedding_dim: int = 16,
        epochs: int = 1,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        seed: int = 0,
        verbose: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.over_arch = over_arch
        self.encoders = encoders
        self.embedding_dim = embedding_dim
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed
        self.verbose = verbose
        self.config = config

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        labels: str | Sequence[str] | None = None,
        categorical: Sequence[str] | None = None,
        numeric: Sequence[str] | None = None,
        validation: Any = None,
        sample_weight: Any = None,
        **spec: Any,
    ) -> CTRClassifier:
        """Prepare the rows and train.

        Args:
            X: a DataFrame (B, columns), anything with ``to_pandas``, or an array (B, F).
            y: (B,) or (B, T), of two classes each; None: the ``labels`` are columns of X.
            labels: names of label columns of X.
            categorical: columns of ids, texts or booleans. The kinds of columns named nowhere are guessed.
            numeric: columns of numbers.
            validation: rows that are not trained on: their share, of which one half chooses the best evaluation and
                the other is the test of ``report_``; or a frame like X for both halves; or two frames. None: .2 of the
                rows, drawn as ``tools/prepare_data.py`` draws them, or what ``split`` says.
            sample_weight: (B,) by which the rows of X count in loss and measures, 0 or more; rows of ``validation``
                count 1 each. A column of X that holds weights is named by ``weight``, of the spec.
            **spec: every other key of a table's spec (docs/data.md): ``sequences`` (docs/sequences.md), ``dense`` (raw
                floats), ``vectors``, ``lists``, ``ignore``, ``group_id``, ``split``, ``weight``, ``tasks``, ...

        Raises:
            UserError: rows, columns or settings that do not go together; the message names them and the fix.
        """
        check_stack()
        home = PortableRun()
        config = run_config(self.get_params(deep=False), home.run, home.data)
        targets = labels_of(X, y, labels)
        frame = frame_of(self, X, True, targets.names if y is None else [])
        split = split_of(targets, validation, spec, config.seed)
        with _speaking(self.verbose):
            entries = {"categorical": categorical, "numeric": numeric, **spec}
            weights = weights_of(sample_weight, targets, entries)
            if weights is not None:
                entries["weight"] = new_name("weight_of_row", frame)
            kinds = spec_of_frame(frame, {**entries, "labels": targets.names})
            refuse_numbers(number_labels(kinds.spec))
            print(kinds.summary(), flush=True)
            parts = self._parts(frame, targets, split, validation)
            if weights is not None:
                each = [weights, *(np.ones(len(rows)) for rows, _, _ in parts[1:])]
                parts = [
                    (rows, {**own, kinds.spec.weighted[0]: w}, of)
                    for (rows, own, of), w in zip(parts, each, strict=True)
                ]
            rule = _prepare(home, kinds.spec, parts, config.seed)
            _train(config)
        self._of_run(home, targets.names, targets.classes)
        self.columns_ = rule
        return self

    def predict_proba(self, X: Any) -> np.ndarray | list[np.ndarray]:
        """Return probabilities (B, 2) of ``classes_``; of several labels a list of them, as scikit-learn's forests.

        Args:
            X: rows with the columns that ``fit`` had, in any order, and perhaps more.
        """
        check_is_fitted(self)
        found = [np.stack([1 - p, p], axis=1) for p in self._probabilities(X)]
        return found[0] if self._is_single else found

    def predict(self, X: Any) -> np.ndarray:
        """Return the more probable class of every row, (B,); of several labels (B, T)."""
        check_is_fitted(self)
        classes = [self.classes_] if self._is_single else self.classes_
        found = [of[(p > 0.5).astype(int)] for p, of in zip(self._probabilities(X), classes, strict=True)]
        return found[0] if self._is_single else np.stack(found, axis=1)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the AUC, the mean over the labels. (Where few rows are clicks, accuracy says nothing.)

        Args:
            y: as for ``fit``; None: the labels are columns of X.
            sample_weight: (B,) of the rows; None: all count the same.
        """
        check_is_fitted(self)
        targets = labels_of(X, y, self.labels_ if y is None else None, self.classes_)
        pairs = zip(self._probabilities(X), targets.encoded().values(), strict=True)
        weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        return float(np.mean([auc(p, encoded, weights) for p, encoded in pairs]))

    def curves(self) -> Figure:
        """Return a figure of the training: loss, validation AUC and speed against samples."""
        check_is_fitted(self)
        return curves_figure(read_metrics(self._home.run / METRICS_FILE), self.report_)

    def save(self, path: str | Path) -> None:
        """Write what ``load`` reads: a run folder with what scoring needs, without the rows it was trained on."""
        self._copy(path, with_rows=False)

    def to_run(self, path: str | Path) -> None:
        """Write the run folder with its dataset, for the tools: export, comparisons, further training."""
        self._copy(path, with_rows=True)

    @classmethod
    def load(cls, path: str | Path) -> CTRClassifier:
        """Return the estimator that ``save`` or ``to_run`` wrote, or the one of any run folder of ``ssr_rec/train.py``.

        Raises:
            UserError: not a run folder, or not a whole one.
        """
        path = Path(path)
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"{path}: not a run folder, it has no {CONFIG_FILE}")
        home = PortableRun(path)
        config = load_config(path / CONFIG_FILE)
        if not home.data.is_dir() and config.data.path is not None:
            home.data = place(config.data.path)
        saved: dict[str, Any] = {"params": parameters_of(config)}
        if (path / ESTIMATOR_FILE).is_file():
            saved = json.loads((path / ESTIMATOR_FILE).read_text())
        model = cls(**saved["params"])
        scorer = _scorer(home)
        refuse_numbers(scorer.restored.schema.number_names)
        classes = saved.get("classes", [[0, 1]] * len(scorer.labels))
        model._of_run(home, scorer.labels, [np.array(values) for values in classes])
        names = saved.get("feature_names", scorer.encoder.columns)
        model.n_features_in_ = len(names)
        if saved.get("is_named", True):
            model.feature_names_in_ = np.array(names, dtype=object)
        preparation = scorer.restored.schema.preparation
        known = {key: value for key, value in preparation.items() if key in TableSpec.model_fields}
        if known:
            model.columns_ = make_spec({"name": scorer.restored.schema.name, **known}, str(path))
        return model

    def _of_run(self, home: PortableRun, labels: Sequence[str], classes: list[np.ndarray]) -> None:
        self._home, self.labels_ = home, list(labels)
        self._is_single = len(classes) == 1
        self.classes_ = classes[0] if self._is_single else classes
        self.report_, self.history_ = read_report(home.run), _history(home.run)

    def _parts(self, frame: pd.DataFrame, targets: Labels, split: np.ndarray | None, validation: Any) -> list[_Part]:
        """Return the rows of ``fit`` and those of the frames of ``validation``, with their labels and splits."""
        parts: list[_Part] = [(frame, targets.encoded(), split)]
        if validation is None or isinstance(validation, float):
            return parts
        for rows, split_of_rows in frames_held_out(validation):
            labels = labels_of(rows, None, targets.names, targets.classes).encoded()
            parts.append((frame_of(self, rows, False, targets.names), labels, split_of_rows))
        return parts

    def _probabilities(self, X: Any) -> list[np.ndarray]:
        """Return label by label the probabilities (B,) float64 of its second class."""
        found = _scorer(self._home).predict(frame_of(self, X, False, []))
        return [found[name].astype(np.float64) for name in self.labels_]

    def _copy(self, path: str | Path, with_rows: bool) -> None:
        check_is_fitted(self)
        classes = [self.classes_] if self._is_single else self.classes_
        saved = {"params": self.get_params(deep=False), "classes": [np.asarray(of).tolist() for of in classes]}
        saved |= {"feature_names": names_of(self, self.n_features_in_), "is_named": hasattr(self, "feature_names_in_")}
        try:
            text = json.dumps(saved, indent=1)
        except TypeError as error:
            raise UserError(f"a parameter or class cannot be written: {error}; give plain values") from None
        self._home.copy_to(Path(path), with_rows)
        (Path(path) / ESTIMATOR_FILE).write_text(text + "\n")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_home")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        return tags


_Part = tuple[pd.DataFrame, dict[str, np.ndarray], np.ndarray | None]
"""Rows, their labels and weights, and the split of each."""


def _prepare(home: PortableRun, spec: TableSpec, parts: list[_Part], seed: int) -> TableSpec:
    """Prepare the dataset of an estimator, and return the spec that it was prepared with."""
    column = new_name("split_of_rows", parts[0][0])
    if parts[0][2] is not None:
        rule = {"type": "time", "column": column, "boundaries": [1, 2]}
        spec = make_spec({**spec.model_dump(), "split": rule}, "fit")
    files = []
    for number, (frame, labels, split) in enumerate(parts):
        files.append(home.data.parent / f"rows-{number}.parquet")
        write_frame(frame, files[-1], labels if split is None else {**labels, column: split})
    prepare([str(file) for file in files], home.data, spec, seed=seed)
    for file in files:
        file.unlink()
    return spec


def _train(config: RunConfig) -> None:
    """Train in this process, which is as it was afterwards.

    Raises:
        UserError: this is one of several processes.
        KeyboardInterrupt: asked to stop.
    """
    # Imported here, and not before the stack was checked: with a wrong one these imports fail.
    import torch
    import torch.distributed as dist

    from ssr_rec.common.logs import quiet
    from ssr_rec.train import train
    from ssr_rec.training.stall_watch import Preempted

    if "RANK" in os.environ or (dist.is_initialized() and dist.get_world_size() > 1):
        raise UserError("CTRClassifier trains in one process; for several, launch ssr_rec/train.py")
    threads, was_joined = torch.get_num_threads(), dist.is_initialized()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            quiet()
            train(config)
    except Preempted:
        raise KeyboardInterrupt from None
    finally:
        if dist.is_initialized() and not was_joined:
            dist.destroy_process_group()
        torch.set_num_threads(threads)


def _scorer(home: PortableRun) -> Any:
    """Return the scorer of a run, restored once."""
    if "scorer" not in home.cache:
        from ssr_rec.serving.run_scorer import RunScorer

        home.cache["scorer"] = RunScorer(home.run, home.data)
    return home.cache["scorer"]


def _history(run: Path) -> pd.DataFrame:
    """Return the rows of metrics.jsonl, a column for every measure of every label: ``click_auc``."""
    rows = []
    for row in read_metrics(run / METRICS_FILE):
        measures = {f"{task}_{name}": value for task, of in row["tasks"].items() for name, value in of.items()}
        rows.append({**{key: value for key, value in row.items() if key != "tasks"}, **measures})
    return pd.DataFrame(rows)


@contextmanager
def _speaking(aloud: bool) -> Iterator[None]:
    """Let preparation and training print, or keep what they say to themselves."""
    if aloud:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
