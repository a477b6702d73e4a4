"""docs/evaluation.md: its code runs against the local service."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.conftest import ServiceProcess
from tinker_cookbook.eval import REGISTRY, BenchmarkConfig
from tinker_cookbook.renderers import load_renderer

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run_block(number: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[number], f"docs/evaluation.md, block {number}", "exec"), names)
    return names


def test_the_program_evaluates(local_service: ServiceProcess, tmp_path: Path, capsys) -> None:
    created = local_service.connect().create_sampling_client(base_model=local_service.model)
    client = created.result() if hasattr(created, "result") else created
    renderer = load_renderer("chatml", local_service.model)
    result = run_block(0)["evaluate"](client, renderer, str(tmp_path))
    assert (result.num_examples, result.num_samples) == (20, 4)
    shown = capsys.readouterr().out
    assert "=== arithmetic arithmetic-000, sample 0: reward 0" in shown
    assert "the number is anywhere:" in shown


def test_the_evaluators_name_a_benchmark() -> None:
    (builder,) = run_block(1)["evaluators"]
    assert builder.benchmark_name in REGISTRY


def test_the_new_benchmark_reads_its_file(local_service: ServiceProcess, tmp_path: Path) -> None:
    try:
        run_block(2)
        path = tmp_path / "capitals.jsonl"
        path.write_text(json.dumps({"country": "France", "capital": "Paris"}))
        renderer = load_renderer("chatml", local_service.model)
        config = BenchmarkConfig(data={"capitals": str(path)})
        assert len(REGISTRY["capitals"].make_envs(renderer, config)) == 1
    finally:
        REGISTRY.pop("capitals", None)


def test_every_benchmark_is_in_the_table() -> None:
    assert {name for name in REGISTRY if f"| `{name}` |" not in PAGE} == set()
