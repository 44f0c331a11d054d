"""Which rows make up a batch: exact cover, equal steps, independence of the world size."""

import numpy as np
import pytest

from ssr_rec.data.batch_order import Lanes, lanes_of_rank

CASES = [
    ([64] * 15 + [43], 128, 16),
    ([1, 1, 1], 4, 4),
    ([5, 0, 7, 300, 2], 10, 3),
    ([1000], 64, 16),
    ([17] * 40, 17, 5),
    ([3], 16, 16),
    ([128, 128], 16, 16),
]


def line(group_rows: list[int], order: np.ndarray) -> list[tuple[int, int]]:
    return [(int(group), row) for group in order for row in range(group_rows[group])]


def lane_rows(lanes: Lanes, lane: int, start_step: int) -> list[tuple[int, int]]:
    return [(piece.group, row) for piece in lanes.pieces(lane, start_step) for row in range(piece.start, piece.stop)]


@pytest.mark.parametrize(("group_rows", "batch_size", "num_lanes"), CASES)
def test_lanes_cut_the_line_of_rows_into_consecutive_parts(group_rows, batch_size, num_lanes):
    order = np.random.default_rng(1).permutation(len(group_rows))
    lanes = Lanes(np.array(group_rows), order, batch_size, num_lanes)
    assert [row for lane in range(num_lanes) for row in lane_rows(lanes, lane, 0)] == line(group_rows, order)


@pytest.mark.parametrize(("group_rows", "batch_size", "num_lanes"), CASES)
def test_steps_and_rows_of_a_step(group_rows, batch_size, num_lanes):
    lanes = Lanes(np.array(group_rows), np.arange(len(group_rows)), batch_size, num_lanes)
    per_step = [sum(lanes.lane_rows(step, lane) for lane in range(num_lanes)) for step in range(lanes.num_steps)]
    assert sum(per_step) == sum(group_rows)
    assert per_step == [lanes.rows_in_step(step) for step in range(lanes.num_steps)]
    assert all(rows == batch_size for rows in per_step[:-1]) and 0 < per_step[-1] <= batch_size
    for lane in range(num_lanes):
        assert sum(lanes.lane_rows(step, lane) for step in range(lanes.num_steps)) == len(lane_rows(lanes, lane, 0))


@pytest.mark.parametrize(("group_rows", "batch_size", "num_lanes"), CASES)
def test_a_lane_started_late_goes_on_where_it_would_have_been(group_rows, batch_size, num_lanes):
    lanes = Lanes(np.array(group_rows), np.arange(len(group_rows)), batch_size, num_lanes)
    for lane in range(num_lanes):
        whole = lane_rows(lanes, lane, 0)
        for step in range(lanes.num_steps + 1):
            before = sum(lanes.lane_rows(earlier, lane) for earlier in range(step))
            assert lane_rows(lanes, lane, step) == whole[before:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_ranks_own_every_lane_once(world_size):
    assert [lane for rank in range(world_size) for lane in lanes_of_rank(16, rank, world_size)] == list(range(16))
