"""The synchronous loop: sample a batch, train on it, sample the next with the new weights.

Everything depends only on the seed and the step, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tinker_cookbook.rl.loop import Loop
from tinker_cookbook.utils import trace

if TYPE_CHECKING:
    import tinker

__all__ = ["do_sync_training"]


async def do_sync_training(loop: Loop, start_step: int) -> tinker.SamplingClient:
    """Do all steps from `start_step` on.

    Returns:
        A sampling client of the final weights.
    """
    sampling_client = await loop.snapshot()
    for step in range(start_step, loop.total_steps):
        with trace.trace_iteration(step) as window:
            evaluated = await loop.evaluate(step, sampling_client)
            if loop.stop_if_exhausted(step):
                break
            builders_P = await asyncio.to_thread(loop.dataset.get_batch, step)
            policy = loop.policy(sampling_client, step)
            current = loop.begin_step(step, window)
            current.sampled_P = await loop.sample_batch(builders_P, policy, step)
            data_D, data_metrics = await loop.build_data(current.sampled_P)
            current.metrics |= evaluated | data_metrics
            await loop.submit_update(current, data_D)
            # Directly after the optimizer step, so that it contains exactly the steps up to here.
            loop.submit_checkpoint(current)
            sampling_client = await loop.snapshot()
        await loop.finish_step(current, sampling_client)
    return sampling_client
