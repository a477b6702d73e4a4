"""Run tasks of inspect-ai on a checkpoint: `python -m tinker_cookbook.eval.run_inspect_evals`.

Options are `tasks=NAME`, `model_path=tinker://RUN/sampler_weights/NAME`, and the fields of
`InspectEvaluatorBuilder`.
"""

from __future__ import annotations

import asyncio
import logging

import chz

from tinker_cookbook.eval.inspect_evaluators import InspectEvaluator, InspectEvaluatorBuilder

__all__ = ["Config", "main"]

logger = logging.getLogger(__name__)


@chz.chz
class Config(InspectEvaluatorBuilder):
    """What to evaluate, and how."""

    model_path: str | None = chz.field(
        default=None, doc="A checkpoint to sample from; None: the base model."
    )
    base_url: str | None = chz.field(
        default=None, doc="Address of a Tinker service; None: the one that recipes choose."
    )


async def main(config: Config) -> dict[str, float]:
    """Run the tasks, log their metrics, and return them."""
    from tinker_cookbook import service
    from tinker_cookbook.utils.sdk_compat import create_client

    with service.connect(
        config.base_url, config.model_name, checkpoint=config.model_path
    ) as connection:
        logger.info("%s", connection.describe())
        base_model = None if config.model_path else connection.model_name
        client = await create_client(
            connection.service_client().create_sampling_client,
            model_path=config.model_path,
            base_model=base_model,
        )
        metrics = await InspectEvaluator(config)(client)
    for name, value in sorted(metrics.items()):
        logger.info("%s = %.4f", name, value)
    return metrics


def _run(config: Config) -> None:
    asyncio.run(main(config))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chz.nested_entrypoint(_run)
