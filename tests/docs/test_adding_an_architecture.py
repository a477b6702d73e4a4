"""docs/adding_an_architecture.md: its code runs, and it names files that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tinker_cookbook.local.engine.model.architecture import FAMILIES
from tinker_cookbook.local.engine.model.base_model import load_base_model
from tinker_cookbook.local.engine.model.hf_model import HfModel

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_an_architecture.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run_block(number: int, names: dict[str, Any]) -> None:
    source = f"docs/adding_an_architecture.md, block {number}"
    exec(compile(BLOCKS[number], source, "exec"), names)


def test_the_example_runs_through_transformers_and_then_natively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "seed_oss", FAMILIES["llama"])  # restored after the test
    del FAMILIES["seed_oss"]
    names: dict[str, Any] = {"folder": tmp_path}
    run_block(0, names)
    assert isinstance(load_base_model(tmp_path, dtype=torch.float32), HfModel)
    run_block(1, names)
    run_block(2, names)


def test_the_files_that_it_names_exist() -> None:
    engine = ROOT / "tinker_cookbook/local/engine"
    rows = re.findall(r"^\| (`[^|]*?`) \|", PAGE, re.MULTILINE)
    files = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(files) == 8
    assert all((engine / name).is_file() for name in files)
    assert all((ROOT / name).is_file() for name in re.findall(r"`(tests/[^`]+)`", PAGE))
