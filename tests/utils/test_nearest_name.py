"""The nearest valid name."""

from __future__ import annotations

import pytest

from tinker_cookbook.utils.nearest_name import did_you_mean, nearest_name

NAMES = ("qwen3", "qwen3_5", "llama3_1", "Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("qwen-3", "qwen3"),
        ("QWEN3_5", "qwen3_5"),
        ("llama3.1", "llama3_1"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("gemma", None),
        ("", None),
    ],
)
def test_nearest_name(given: str, nearest: str | None) -> None:
    assert nearest_name(given, NAMES) == nearest
    assert did_you_mean(given, NAMES) == (f" Did you mean {nearest!r}?" if nearest else "")


def test_nothing_is_known() -> None:
    assert did_you_mean("qwen3", []) == ""
