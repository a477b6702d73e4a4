"""Lanes, futures and the sharing of time, without torch."""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from tinker_cookbook.local.engine.jobs import EngineFuture, FairShare, Job, JobLanes, fail, resolve


def job(lane: str, name: str, **options) -> Job:
    return Job(name, lane, lambda: None, **options)


def test_lanes_keep_their_order_and_take_turns():
    lanes = JobLanes()
    for lane, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2")):
        lanes.add(job(lane, name))
    taken = [lanes.take().name for _ in range(5)]
    assert taken == ["a1", "b1", "a2", "b2", "a3"]
    assert lanes.take() is None
    assert len(lanes) == 0


def test_a_job_waits_for_one_that_opens_its_lane_and_holds_back_its_own_lane_only():
    lanes = JobLanes()
    opener = job("run", "opener", opens="sampler")
    lanes.add(opener)
    for lane, name in (("sampler", "waits"), ("sampler", "behind"), ("other", "free")):
        lanes.add(job(lane, name))
    assert [lanes.take().name, lanes.take().name] == ["opener", "free"]
    assert not lanes.has_ready()
    opener.future.set_exception(ValueError("even a failure opens the lane"))
    assert [lanes.take().name, lanes.take().name] == ["waits", "behind"]
    lanes.add(job("sampler", "later"))
    assert lanes.take().name == "later"


def test_quick_jobs_can_be_taken_alone():
    lanes = JobLanes()
    lanes.add(job("run", "long"))
    lanes.add(job("sampler", "quick", quick=True))
    assert lanes.take(quick=True).name == "quick"
    assert lanes.take(quick=True) is None
    assert lanes.has_ready(quick=False)


def test_time_is_shared_evenly_and_idle_time_earns_nothing():
    share = FairShare()
    share.charge("training", 100.0, other_waits=False)
    assert share.sampling_is_due()
    share.charge("sampling", 1.0, other_waits=True)
    assert not share.sampling_is_due()  # the 100 seconds alone do not count against training
    share.charge("training", 3.0, other_waits=True)
    assert share.sampling_is_due()


def test_a_cancelled_future_is_left_alone():
    future: Future[int] = Future()
    future.cancel()
    resolve(future, 3)
    assert future.cancelled()
    done: Future[int] = Future()
    resolve(done, 3)
    fail(done, ValueError())
    assert done.result() == 3


def test_an_engine_future_is_awaited_and_a_cancelled_task_cancels_it():
    async def main() -> None:
        given: EngineFuture[int] = EngineFuture()
        threading.Thread(target=resolve, args=(given, 3)).start()
        assert await given == 3
        refused: EngineFuture[int] = EngineFuture()
        fail(refused, ValueError("refused"))
        with pytest.raises(ValueError, match="refused"):
            await refused
        waiting: EngineFuture[int] = EngineFuture()

        async def wait() -> int:
            return await waiting

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert waiting.cancelled()

    asyncio.run(main())
