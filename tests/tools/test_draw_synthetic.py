"""The command line that draws a log."""

import sys
from pathlib import Path

import pytest

from ssr_rec.data.schema import Schema
from ssr_rec.data.synthetic.config import SyntheticConfig
from ssr_rec.data.synthetic.write import ensure_synthetic

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import draw_synthetic

SMALL = ["--train_rows=300", "--validation_rows=20", "--test_rows=20", "--users=30", "--items=30"]


def test_draws_the_log_that_a_run_of_the_same_config_draws(tmp_path, capsys) -> None:
    assert draw_synthetic.main(["--output", str(tmp_path / "new" / "log"), *SMALL]) == 0
    config = SyntheticConfig(train_rows=300, validation_rows=20, test_rows=20, users=30, items=30)
    expected = Schema.read(ensure_synthetic(config, tmp_path))
    assert Schema.read(tmp_path / "new" / "log").dataset_id == expected.dataset_id
    assert "340 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--train_row=3"], "train_row"), (["--train_rows=0"], "train_rows"), (["train_rows=3"], "not understood")],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, arguments: list[str], message: str) -> None:
    assert draw_synthetic.main(["--output", str(tmp_path / "log"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "precious").touch()
    assert draw_synthetic.main(["--output", str(tmp_path / "log"), *SMALL]) == 2
    assert (tmp_path / "log" / "precious").exists() and "log" in capsys.readouterr().err
