"""Days one after the other against a plain enumeration of their batches."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssr_rec.data.day_stream import DayStream
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.days_log import DAYS, ROWS, write_days

BATCH = 64


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> Path:
    return write_days(tmp_path_factory.mktemp("days") / "data")


def stream(folder: Path, passes: int, rank: int = 0, world_size: int = 1, opened: list[str] | None = None) -> DayStream:
    schema = Schema.read(folder)

    def open_day(day: str) -> Reader:
        if opened is not None:
            opened.append(day)
        return Reader(folder, schema, day, BATCH, (rank, world_size), num_lanes=4, seed=3)

    return DayStream(open_day, schema, DAYS, passes, BATCH)


def plain_steps(passes: int) -> list[tuple[int, int, int]]:
    """(day, step of the day, rows) of every step of the run."""
    found = []
    for day, rows in enumerate(ROWS.values()):
        sizes = [min(BATCH, rows - first) for first in range(0, rows, BATCH)] * passes
        found += [(day, step, size) for step, size in enumerate(sizes)]
    return found


@pytest.mark.parametrize("passes", [1, 3])
def test_steps_lie_where_a_loop_over_the_days_finds_them(days, passes):
    course, wanted = stream(days, passes), plain_steps(passes)
    assert course.num_steps(passes) == len(wanted)
    assert [(*course.locate(step), course.rows_in_step(step)) for step in range(len(wanted))] == wanted
    assert course.locate(len(wanted)) == (len(DAYS), 0)
    ends = [sum(day <= last for day, _, _ in wanted) for last in range(len(DAYS))]
    assert [course.end_of(day) for day in range(len(DAYS))] == ends
    of_day = Counter(day for day, _, _ in wanted)
    for steps in (0, 1, ends[0], ends[0] + 2, len(wanted) - 1):
        day, step, _ = wanted[steps]
        assert course.epochs_done(steps) == pytest.approx(day + step / of_day[day])
    assert course.epochs_done(len(wanted)) == len(DAYS)


def identities(course: DayStream, day: int, start: int = 0) -> list[list[tuple[int, ...]]]:
    """Of each batch, the rows' user, item and price."""
    return [
        list(zip(*(batch.sparse[name].values().tolist() for name in ("user", "item", "price")), strict=True))
        for batch in course.epoch(day, start)
    ]


def test_every_row_of_a_day_is_read_as_often_as_there_are_passes_and_none_of_another_day(days):
    course = stream(days, passes=2)
    for number, day in enumerate(DAYS):
        table = pq.read_table(days / "days" / day / "00000.parquet").to_pydict()
        stored = list(zip(table["user"], table["item"], table["price"], strict=True))
        batches = identities(course, number)
        half = len(batches) // 2
        for some in (batches[:half], batches[half:]):
            assert Counter(row for batch in some for row in batch) == Counter(stored)
        assert batches[:half] != batches[half:], "each pass is shuffled anew"


@pytest.mark.parametrize("start", [0, 2, 4, 5, 7])
def test_a_day_goes_on_from_any_step(days, start):
    assert identities(stream(days, passes=2), 1, start) == identities(stream(days, passes=2), 1)[start:]


def test_ranks_share_the_batches_of_one(days):
    one = identities(stream(days, 2), 2)
    two = [identities(stream(days, 2, rank, 2), 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]


def test_one_day_is_open_at_a_time(days):
    opened: list[str] = []
    course = stream(days, passes=1, opened=opened)
    for number in range(len(DAYS)):
        identities(course, number)
        course.position()
        assert DAYS[number] in course.describe(number, 1)
    assert opened == DAYS


def test_the_position_says_which_rows_a_step_means(days, tmp_path):
    here = stream(days, passes=2).position()
    assert here == stream(days, passes=2).position()
    assert here != stream(days, passes=3).position()
    fewer = write_days(tmp_path / "fewer", {**ROWS, DAYS[3]: 127})
    assert {key for key, value in stream(fewer, 2).position().items() if value != here[key]} == {"num_rows"}
    assert here["batch_size"] == BATCH and here["shuffle_seed"] == 3 and here["num_lanes"] == 4
    assert list(here["num_rows"].values()) == list(ROWS.values())
