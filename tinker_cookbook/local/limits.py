"""Limits that the service and the engine share, so that both accept the same requests.

The service checks them when it reads a request. The engine checks them again, because programs may
use it without a service.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.utils.shared_limits import MAX_LORA_RANK

__all__ = [
    "INT32",
    "INT64",
    "LORA_ALPHA",
    "LORA_DROPOUT",
    "MAX_INT32",
    "RANK",
    "SAMPLING",
    "Range",
    "check_ranges",
]


@dataclass(frozen=True)
class Range:
    """The numbers that a field accepts."""

    lowest: float = -math.inf
    highest: float = math.inf
    excludes_lowest: bool = False
    excludes_highest: bool = False

    def __contains__(self, number: float) -> bool:
        is_above = number > self.lowest if self.excludes_lowest else number >= self.lowest
        is_below = number < self.highest if self.excludes_highest else number <= self.highest
        return is_above and is_below

    def __str__(self) -> str:
        """Say which numbers are inside, to follow the words `a number`."""
        if math.isinf(self.highest):
            return "" if math.isinf(self.lowest) else f" of {_show(self.lowest)} or greater"
        lower = f" {'above' if self.excludes_lowest else 'from'} {_show(self.lowest)}"
        if self.excludes_highest:
            return f"{lower} to less than {_show(self.highest)}"
        return f"{lower} up to {_show(self.highest)}"


def _show(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


MAX_INT32 = 2**31 - 1
INT32 = Range(0, MAX_INT32)
INT64 = Range(-(2**63), 2**63 - 1)

RANK = Range(1, MAX_LORA_RANK)
LORA_ALPHA = Range(0, 1e6, excludes_lowest=True)
LORA_DROPOUT = Range(0, 1, excludes_highest=True)

_TOP_LOGPROBS = Range(0, 1024)
SAMPLING = {
    "num_samples": Range(1, 4096),
    "max_tokens": Range(1, MAX_INT32),
    "temperature": Range(0, 1e6),
    "top_k": Range(-1, MAX_INT32),
    # the smallest set of tokens with a probability of 0 is empty: 0 cannot be sampled from
    "top_p": Range(0, 1, excludes_lowest=True),
    "topk_prompt_logprobs": _TOP_LOGPROBS,
    "topk_sample_logprobs": _TOP_LOGPROBS,
    "prompt_alt_tokens_k": _TOP_LOGPROBS,
}
"""Accepted values of a sampling request's numbers, by the name of the field in `SampleSpec`. A
temperature of 0 is greedy; a top_k of -1 or 0 and a top_p of 1 are off."""


def check_ranges(record: object, ranges: dict[str, Range]) -> None:
    """Check the named attributes of a record; None is accepted.

    Raises:
        UserError: it names the attribute and its value.
    """
    for name, accepted in ranges.items():
        value = getattr(record, name)
        if value is not None and value not in accepted:
            raise UserError(f"{name}={value} is not accepted; expected a number{accepted}")
