"""What the name of a metric says about it."""

from __future__ import annotations

import re

__all__ = ["lower_is_better"]

LOWER_IS_BETTER = re.compile(r"(^|[/_])(nll|bpb|loss|kl|perplexity|error|errors)($|[/_:])")


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value of a metric is better, judged by its name."""
    return LOWER_IS_BETTER.search(metric) is not None
