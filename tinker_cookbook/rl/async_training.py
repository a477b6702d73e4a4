"""The asynchronous loop: rollouts continue while the trainer trains.

Groups are trained on in the order in which they were started. With m = `max_steps_off_policy`, at
most `groups_per_batch * (m + 1)` groups are started and not yet trained on. So a new group has at
most m batches before it, and is trained on at most m steps after the weights it was started with.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import AllTrajectoriesFailedError
from tinker_cookbook.rl.loop import Loop, SampledGroup, check_batch
from tinker_cookbook.rl.types import EnvGroupBuilder
from tinker_cookbook.utils import trace

if TYPE_CHECKING:
    import tinker

__all__ = ["do_async_training"]

MAX_LOST_IN_A_ROW = 64


async def do_async_training(loop: Loop, start_step: int) -> tinker.SamplingClient:
    """Do all steps from `start_step` on.

    A resumed run continues with the data after its last checkpoint; groups that were in progress
    are sampled again.

    Returns:
        A sampling client of the final weights.
    """
    config = loop.config.async_config
    assert config is not None, "this loop runs with an async_config"
    sampling_client = await loop.snapshot()
    groups = _GroupsInProgress(loop, start_step, sampling_client)
    try:
        groups.fill()
        for step in range(start_step, loop.total_steps):
            with trace.trace_iteration(step) as window:
                current = loop.begin_step(step, window)
                current.metrics |= await loop.evaluate(step, sampling_client)
                async with trace.scope_span("waiting_for_groups"):
                    current.sampled_P = await groups.take_batch()
                check_batch(current.sampled_P, loop.config)
                current.metrics |= _staleness(current.sampled_P, step)
                data_D, data_metrics = await loop.build_data(current.sampled_P)
                current.metrics |= data_metrics
                await loop.submit_update(current, data_D)
                loop.submit_checkpoint(current)
                sampling_client = await loop.snapshot()
            groups.advance(step + 1, sampling_client)
            await loop.finish_step(current, sampling_client)
    finally:
        await groups.cancel()
    return sampling_client


class _GroupsInProgress:
    """Groups that are being sampled, in the order in which they were started."""

    def __init__(self, loop: Loop, start_step: int, sampling_client: tinker.SamplingClient) -> None:
        config = loop.config.async_config
        assert config is not None, "this loop runs with an async_config"
        self._loop = loop
        self._groups_per_batch = config.groups_per_batch
        self._max_in_progress = config.groups_per_batch * (config.max_steps_off_policy + 1)
        self._builders = _stream(loop, start_step * config.groups_per_batch)
        self._tasks: deque[asyncio.Task[SampledGroup]] = deque()
        self._num_waiting = 0
        """Number of groups taken for an unfinished step; they still occupy their slots."""
        self.advance(start_step, sampling_client, fill=False)

    def advance(
        self, step: int, sampling_client: tinker.SamplingClient, *, fill: bool = True
    ) -> None:
        """Start new groups with the weights of `step`."""
        self._step = step
        self._policy = self._loop.policy(sampling_client, step)
        self._num_waiting = 0
        if fill:
            self.fill()

    def fill(self) -> None:
        """Start groups until all slots are occupied or the data is used up."""
        while len(self._tasks) + self._num_waiting < self._max_in_progress:
            following = next(self._builders, None)
            if following is None:
                return
            index, builder = following
            sampling = self._loop.sample_group(builder, self._policy, index, step=self._step)
            self._tasks.append(asyncio.ensure_future(sampling))

    async def take_batch(self) -> list[SampledGroup]:
        """Return the oldest groups of one batch; a failed group is replaced by the next one."""
        taken: list[SampledGroup] = []
        num_lost = 0
        while len(taken) - num_lost < self._groups_per_batch and self._tasks:
            sampled = await self._tasks[0]
            self._tasks.popleft()
            taken.append(sampled)
            if sampled.has_trajectories:
                self._num_waiting += 1
                continue
            num_lost += 1
            if num_lost >= MAX_LOST_IN_A_ROW and num_lost == len(taken):
                raise AllTrajectoriesFailedError(
                    f"the last {num_lost} groups failed; last error: "
                    f"{sampled.group.rollout_errors[-1].error_message}"
                )
            self.fill()
        return taken

    async def cancel(self) -> None:
        """Cancel the groups in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _stream(loop: Loop, first_group: int) -> Iterator[tuple[int, EnvGroupBuilder]]:
    """Yield the groups of all batches from `first_group` on, with their running numbers."""
    number = 0
    for batch in range(len(loop.dataset)):
        for builder in loop.dataset.get_batch(batch):
            if number >= first_group:
                yield number, builder
            number += 1


def _staleness(sampled_P: list[SampledGroup], step: int) -> dict[str, float]:
    steps = [sampled.sampling_client_step for sampled in sampled_P if sampled.has_trajectories]
    ages = [step - sampled_step for sampled_step in steps]
    if not ages:
        return {}
    return {
        "training_client/step": step,
        "sampling_client/step_max": max(steps),
        "sampling_client/step_min": min(steps),
        "sampling_client/step_mean": sum(steps) / len(steps),
        "async/staleness_max": max(ages),
        "async/staleness_min": min(ages),
        "async/staleness_mean": sum(ages) / len(ages),
    }
