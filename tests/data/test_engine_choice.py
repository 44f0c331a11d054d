"""Asking for an engine that is not there, or for settings that it does not have."""

import sys

import pytest

from tests.prepare_log import make_rows, write_csv
from tools.prepare_data import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "spark"], "pyspark, which is not installed; in the checkout run: pip install -e '.[spark]'"),
        (["--engine", "spark", "--threads", "2"], "--threads is for DuckDB"),
        (["--engine", "spark", "--spark-conf", "spark.executor.memory"], "not key=value"),
        (["--spark-master", "local[2]"], "are for --engine spark"),
        (["--spark-conf", "a=b"], "are for --engine spark"),
    ],
)
def test_what_an_engine_lacks_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    # As where pyspark is not installed.
    for name in ["pyspark", *(name for name in sys.modules if name.startswith("pyspark."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ssr_rec.data.preparation.spark_engine", raising=False)
    monkeypatch.delattr("ssr_rec.data.preparation.spark_engine", raising=False)
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: toy, labels: [click], categorical: [user], ignore: [city, price, day, tags, uid]}")
    log = write_csv(make_rows(50), tmp_path / "log.csv")
    command = ["table", "--spec", str(spec), "--input", str(log), "--output", str(tmp_path / "out"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
