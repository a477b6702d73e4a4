"""Results are kept for repeated retrieval and dropped by the rule."""

# pyright: reportPossiblyUnboundVariable=false

import asyncio
import json
import time
import weakref

import pytest

from tinker_cookbook.local.service.state.futures import FutureTable, Payload

pytestmark = pytest.mark.anyio


def make_table(keep_seconds: float = 60, keep_bytes: int = 1000) -> FutureTable:
    return FutureTable(keep_seconds=keep_seconds, keep_bytes=keep_bytes)


async def test_a_result_can_be_read_again_and_again() -> None:
    table = make_table()
    entry = table.create("optim_step", "s")
    assert not await table.wait(entry, 0.01)
    asyncio.get_running_loop().call_later(0.02, table.resolve, entry, Payload.of_json({"a": 1}))
    assert await table.wait(entry, 5)
    assert await table.wait(entry, 0)
    assert entry.payload is not None
    assert json.loads(entry.payload.body) == {"a": 1}


async def test_the_first_result_holds() -> None:
    table = make_table()
    entry = table.create("sample", "s")
    table.fail(entry, "cancelled", "user")
    table.resolve(entry, Payload.of_json({"late": True}))
    assert entry.payload is not None
    assert json.loads(entry.payload.body) == {"error": "cancelled", "category": "user"}
    assert entry.failed


async def test_old_results_go_and_their_ids_are_gone_not_unknown() -> None:
    table = make_table(keep_seconds=60)
    entry = table.create("optim_step", "s")
    running = table.create("optim_step", "s")
    table.resolve(entry, Payload.of_json({}))
    assert table.expire(time.time() + 30) == 0
    assert table.expire(time.time() + 61) == 1
    assert table.get(entry.request_id) is None
    assert table.is_gone(entry.request_id)
    assert not table.is_gone("req-unknown")
    assert not table.is_gone("../../etc")
    assert table.is_gone(make_table().create("sample", "s").request_id), "an earlier life's id"
    assert table.get(running.request_id) is running, "unfinished work is never dropped"
    assert not table.is_gone(running.request_id)


async def test_results_beyond_the_budget_go_oldest_first_and_a_read_keeps_one() -> None:
    table = make_table(keep_bytes=250)
    entries = [table.create("forward", "s") for _ in range(3)]
    for entry in entries:
        table.resolve(entry, Payload(b"x" * 100, "text/plain"))
    await table.wait(entries[0], 0)
    table.expire()
    assert [table.get(entry.request_id) is not None for entry in entries] == [True, False, True]


async def test_a_result_that_was_read_goes_sooner_than_one_that_waits() -> None:
    table = FutureTable(keep_seconds=900, keep_bytes=10**6, read_keep_seconds=300)
    read, unread = table.create("forward", "s"), table.create("forward", "s")
    for one in (unread, read):
        table.resolve(one, Payload.of_json({}))
    assert table.has_unread()
    await table.wait(read, 0)
    assert table.expire(time.time() + 299) == 0
    assert table.expire(time.time() + 301) == 1
    assert table.get(unread.request_id) is unread
    assert table.has_unread()
    await table.wait(unread, 0)
    assert not table.has_unread()
    assert table.expire(time.time() + 301) == 1
    assert table.stats() == {"futures": 0, "futures_unfinished": 0, "futures_result_bytes": 0}


async def test_a_group_is_polled_by_cursor() -> None:
    table = make_table()
    entries = [table.create("sample", "s", group="sampler#0") for _ in range(3)]
    assert await table.wait_group("sampler#0", 0, 0) == ([], 0)
    table.resolve(entries[1], Payload.of_json({}))
    assert await table.wait_group("sampler#0", 0, 1) == ([entries[1]], 1)
    assert await table.wait_group("sampler#0", 0, 1) == ([entries[1]], 1), "until acknowledged"
    asyncio.get_running_loop().call_later(0.02, table.fail, entries[0], "no", "user")
    assert await table.wait_group("sampler#0", 1, 5) == ([entries[0]], 2)
    table.drop([entries[1].request_id])
    assert table.get(entries[1].request_id) is None
    assert await table.wait_group("other#0", 0, 0) == ([], 0)


async def test_a_group_that_nobody_polls_keeps_no_results() -> None:
    table = make_table()
    entries = [table.create("sample", "s", group="sampler#0") for _ in range(3)]
    for entry in entries:
        table.resolve(entry, Payload.of_json({}))
    held = weakref.ref(entries[0])
    table.drop([entries[0].request_id])
    table.expire(time.time() + 1000)
    last = table.create("sample", "s", group="sampler#0")
    table.resolve(last, Payload.of_json({}))
    assert await table.wait_group("sampler#0", 0, 0) == ([last], 4)
    del entries, entry
    assert held() is None


async def test_unfinished_entries_are_listed_by_session() -> None:
    table = make_table()
    first, second = table.create("a", "one"), table.create("b", "two")
    table.resolve(table.create("c", "one"), Payload.of_json({}))
    assert table.unfinished() == [first, second]
    assert table.unfinished("two") == [second]
