"""The streaming loop: gradients of groups are computed while other groups are still sampled.

It is on-policy like the synchronous loop. The groups that finish first share a gradient request,
so a resumed run equals an uninterrupted one only up to the order of summation. With several
substeps, the groups of each optimizer step may differ too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.completers import TokenCompleter
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.config import StreamMinibatchConfig
from tinker_cookbook.rl.loop import Loop, TrainingStep, check_batch
from tinker_cookbook.rl.types import EnvGroupBuilder
from tinker_cookbook.utils import trace

if TYPE_CHECKING:
    import tinker

__all__ = ["do_sync_training_with_stream_minibatch"]


async def do_sync_training_with_stream_minibatch(
    loop: Loop, start_step: int
) -> tinker.SamplingClient:
    """Do all steps from `start_step` on.

    Returns:
        A sampling client of the final weights.

    Raises:
        ConfigurationError: if a batch of the data does not have the configured number of groups.
    """
    stream = loop.config.stream_minibatch_config
    assert stream is not None, "this loop runs with a stream_minibatch_config"
    sampling_client = await loop.snapshot()
    for step in range(start_step, loop.total_steps):
        with trace.trace_iteration(step) as window:
            evaluated = await loop.evaluate(step, sampling_client)
            builders_P = await asyncio.to_thread(loop.dataset.get_batch, step)
            _check_size(builders_P, stream)
            current = loop.begin_step(step, window)
            current.metrics |= evaluated
            await _sample_and_submit(loop, current, builders_P, loop.policy(sampling_client, step))
            loop.submit_checkpoint(current)
            sampling_client = await loop.snapshot()
        await loop.finish_step(current, sampling_client)
    return sampling_client


async def _sample_and_submit(
    loop: Loop,
    current: TrainingStep,
    builders_P: Sequence[EnvGroupBuilder],
    policy: TokenCompleter,
) -> None:
    """Submit the gradient request of each minibatch as soon as its groups are sampled."""
    stream = loop.config.stream_minibatch_config
    assert stream is not None, "this loop runs with a stream_minibatch_config"
    per_minibatch = len(builders_P) // (loop.config.num_substeps * stream.num_minibatches)
    per_substep = per_minibatch * stream.num_minibatches
    tasks = [
        asyncio.ensure_future(loop.sample_group(builder, policy, index, step=current.step))
        for index, builder in enumerate(builders_P)
    ]
    try:
        for finished in asyncio.as_completed(tasks):
            current.sampled_P.append(await finished)
            done = len(current.sampled_P)
            if done % per_minibatch == 0:
                data_D, metrics = await loop.build_data(current.sampled_P[-per_minibatch:])
                current.metrics |= metrics
                current.update.add_gradients(data_D)
            if done % per_substep == 0:
                current.update.step()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    check_batch(current.sampled_P, loop.config)


def _check_size(builders_P: Sequence[EnvGroupBuilder], stream: StreamMinibatchConfig) -> None:
    if len(builders_P) != stream.groups_per_batch:
        raise ConfigurationError(
            f"stream_minibatch_config.groups_per_batch={stream.groups_per_batch}, but the data has "
            f"{len(builders_P)} groups per batch; set it to that."
        )
