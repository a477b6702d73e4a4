"""Requests of a run start in the order of their numbers."""

import asyncio

import pytest

from tinker_cookbook.local.service.state.runs import SequenceGate

pytestmark = pytest.mark.anyio


def submit(gate: SequenceGate, started: list[int], *seq_ids: int) -> None:
    for seq_id in seq_ids:
        gate.submit(seq_id, f"request-{seq_id}", lambda seq_id=seq_id: started.append(seq_id))


async def test_late_numbers_start_first() -> None:
    gate, started = SequenceGate(grace_seconds=60), []
    submit(gate, started, 3, 2)
    assert started == []
    assert gate.num_held == 2
    submit(gate, started, 1)
    assert started == [1, 2, 3]
    submit(gate, started, 4)
    assert started == [1, 2, 3, 4]
    gate.close()


async def test_a_number_is_remembered_with_its_request() -> None:
    gate, started = SequenceGate(grace_seconds=60), []
    submit(gate, started, 1, 3)
    assert gate.request_id_of(1) == "request-1"
    assert gate.request_id_of(3) == "request-3", "a held request is known too"
    assert gate.request_id_of(2) is None
    gate.close()


async def test_a_gap_that_stays_is_given_up_after_the_grace_period() -> None:
    gate, started = SequenceGate(grace_seconds=0.05), []
    submit(gate, started, 1, 3, 5)
    assert started == [1]
    await asyncio.sleep(0.08)
    assert started == [1, 3]
    await asyncio.sleep(0.08)
    assert started == [1, 3, 5]
    submit(gate, started, 2)
    assert started == [1, 3, 5, 2], "one that arrives after all is not lost"


async def test_new_arrivals_do_not_put_off_the_end_of_the_grace_period() -> None:
    gate, started = SequenceGate(grace_seconds=0.1), []
    submit(gate, started, 2)
    for seq_id in range(3, 8):
        await asyncio.sleep(0.04)
        submit(gate, started, seq_id)
    assert started[:2] == [2, 3]


async def test_closing_starts_what_is_held_in_order() -> None:
    gate, started = SequenceGate(grace_seconds=60), []
    submit(gate, started, 9, 4, 6)
    gate.close()
    assert started == [4, 6, 9]
    assert gate.num_held == 0


async def test_a_pause_holds_everything_that_comes_after() -> None:
    gate, started = SequenceGate(grace_seconds=0.02), []
    submit(gate, started, 1, 3)
    await asyncio.sleep(0.04)
    assert started == [1, 3], "2 was given up"
    gate.pause()
    submit(gate, started, 4, 2, 6)
    await asyncio.sleep(0.04)
    assert started == [1, 3]
    gate.resume()
    assert started == [1, 3, 2, 4]
    await asyncio.sleep(0.04)
    assert started == [1, 3, 2, 4, 6]


async def test_a_gate_that_is_closed_while_paused_keeps_the_order() -> None:
    gate, started = SequenceGate(grace_seconds=60), []
    gate.submit(1, "request-1", gate.pause)
    submit(gate, started, 2, 5)
    gate.close()
    submit(gate, started, 3)
    assert started == []
    gate.resume()
    assert started == [2, 3, 5]


async def test_numbers_whose_results_are_gone_are_neither_kept_nor_run_again() -> None:
    gate, started = SequenceGate(grace_seconds=9), []
    for seq_id in (1, 2, 3):
        gate.submit(seq_id, f"req-{seq_id}", lambda seq_id=seq_id: started.append(seq_id))
    gate.submit(5, "req-5", lambda: started.append(5))  # waits for 4
    gate.forget_answered(lambda request_id: request_id == "req-3")
    assert started == [1, 2, 3]
    assert [gate.request_id_of(seq_id) for seq_id in (1, 2, 3)] == [None, None, "req-3"]
    assert [gate.has_forgotten(seq_id) for seq_id in (1, 2, 3, 4, 5)] == [True, True] + [False] * 3
    gate.forget_answered(lambda request_id: False)
    assert gate.request_id_of(5) == "req-5"
    gate.submit(4, "req-4", lambda: started.append(4))
    assert started == [1, 2, 3, 4, 5]
    gate.close()
