"""Run an RL recipe for two steps against the shared service, as its command line does."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from tinker_cookbook import recipe

SMALL = {"groups_per_batch": 2, "group_size": 2, "max_steps": 2, "lora_rank": 2}


def run_two_steps(
    module: ModuleType, local_service, log_path: Path, capsys, **settings: Any
) -> list[dict[str, Any]]:
    """Run, run again (which finds it complete), and return the rows of metrics."""
    config = module.Config(
        model_name=local_service.model,
        base_url=local_service.base_url,
        log_path=str(log_path),
        **SMALL | settings,
    )
    recipe.run(config, module.build, getattr(module, "warm_start", None))
    assert "weights  tinker://" in capsys.readouterr().out
    recipe.run(config, module.build, getattr(module, "warm_start", None))
    assert "already complete" in capsys.readouterr().out
    text = (log_path / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert "test/env/all/reward/total" in rows[-1]
    return rows


def read_replies(log_path: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step."""
    path = log_path / f"iteration_{step:06d}" / "train_rollout_summaries.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
