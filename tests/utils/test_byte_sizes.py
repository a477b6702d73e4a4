"""Numbers of bytes as text."""

from __future__ import annotations

import pytest

from tinker_cookbook.utils.byte_sizes import format_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1,024.0 KiB"),
        (2**20, "1.0 MiB"),
        (300 * 2**20, "300.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (5000 * 2**30, "5,000.0 GiB"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
