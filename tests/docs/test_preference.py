"""docs/preference.md: its example runs, and its table lists every loss with its settings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np

from tinker_cookbook.preference.losses import PAIR_LOSSES, PairBatch

PAGE = (Path(__file__).parent.parent.parent / "docs" / "preference.md").read_text("utf-8")


def test_the_table_lists_every_loss_with_its_settings() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ?(.*?) \| arXiv", PAGE, re.M))
    assert rows.keys() == PAIR_LOSSES.keys()
    for name, cell in rows.items():
        settings = [key for key in inspect.signature(PAIR_LOSSES[name]).parameters if key != "beta"]
        assert re.findall(r"`(\w+)`", cell) == settings, name


def test_the_loss_of_the_page_has_the_derivatives_that_it_states() -> None:
    program, _ = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(program, "preference.md", "exec"), names)
    sums, step = np.array([-3.0, -5.0]), 1e-3

    def losses(chosen: float, rejected: float) -> np.ndarray:
        ones = np.ones(2)
        batch = PairBatch(sums + chosen, sums - 1 + rejected, sums, sums, ones, ones)
        return names["difference"](batch).loss_P

    ones = np.ones(2)
    result = names["difference"](PairBatch(sums, sums - 1, sums, sums, ones, ones))
    by_chosen = (losses(step, 0) - losses(-step, 0)) / (2 * step)
    by_rejected = (losses(0, step) - losses(0, -step)) / (2 * step)
    np.testing.assert_allclose(result.by_chosen_P, by_chosen, atol=1e-9)
    np.testing.assert_allclose(result.by_rejected_P, by_rejected, atol=1e-9)


def test_the_settings_of_kto_on_the_page_are_accepted() -> None:
    _, program = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(program, "preference.md", "exec"), names)
    assert names["config"].bad_weight == 1.5
