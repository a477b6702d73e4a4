"""How the data of a request are grouped into packs."""

from __future__ import annotations

from tinker_cookbook.local.engine.model.pack import plan_packs


def test_packs_hold_neighbours_of_equal_width() -> None:
    assert plan_packs([3, 3, 3, 3], [1, 1, 2, 2], 6) == [[0, 1], [2, 3]]
    assert plan_packs([5, 5, 5, 5], [1, 1, 1, 1], 10) == [[0, 1], [2, 3]]


def test_a_sequence_beyond_the_limit_is_alone() -> None:
    assert plan_packs([50, 3, 4], [1, 1, 1], 10) == [[0], [1, 2]]


def test_other_data_share_a_pack_where_neighbours_need_more_packs() -> None:
    lengths = [64, 128, 192, 256, 288, 320, 512, 224]
    packs = plan_packs(lengths, [1] * 8, 1024)
    assert sorted(index for pack in packs for index in pack) == list(range(8))
    assert [sum(lengths[index] for index in pack) for pack in packs] == [1024, 960]


def test_lengths_that_fill_no_pack_stay_in_order() -> None:
    assert plan_packs([600] * 3, [1] * 3, 1024) == [[0], [1], [2]]
