"""Tables of rotary positions: the same bits in every process."""

from __future__ import annotations

import math

import torch

from tinker_cookbook.local.engine.model.architecture import RopeConfig
from tinker_cookbook.local.engine.model.ops import RopeTable


def test_numbers_are_those_of_double_precision() -> None:
    # torch's float32 functions round some of them otherwise, and not alike in every process.
    dim, rows = 16, 700
    rope = RopeConfig()
    tables = RopeTable(rope, dim, "cpu").up_to(rows)
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, dim, 2).float() / dim))
    angles = torch.outer(torch.arange(rows).float(), frequencies).flatten().tolist()
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        expected = torch.tensor([function(angle) for angle in angles]).view(rows, dim // 2)
        assert torch.equal(table[:rows], torch.cat([expected, expected], dim=1))


def test_tables_grow_without_other_numbers() -> None:
    table = RopeTable(RopeConfig(), 16, "cpu")
    before = [part[:200].clone() for part in table.up_to(200)]
    after = [part[:200] for part in table.up_to(3000)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
