"""Rollouts as JSON lines: one object per trajectory, and one per lost rollout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.rl.data_processing import flatten_chunks
from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup, Transition

if TYPE_CHECKING:
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "SCHEMA_VERSION",
    "RolloutSummaryExportConfig",
    "RolloutSummaryGroup",
    "rollout_summaries_jsonl_path",
    "serialize_rollout_summaries",
    "serialize_rollout_summaries_from_groups",
    "write_rollout_summaries_jsonl_from_groups",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RolloutSummaryExportConfig:
    """What the transcripts of one batch are about, and where they are written."""

    split: str
    """`train`, or the name of an evaluator."""
    iteration: int
    base_name: str
    """Start of the file names."""
    sampling_client_step: int | None = None
    """Number of optimizer steps behind the sampling weights."""
    folder: Path | None = None
    """The folder of the step; None: nothing is written."""
    tokenizer: Tokenizer | None = None
    """Decodes prompts and replies; None: the records have no texts."""


@dataclass(frozen=True)
class RolloutSummaryGroup:
    """A group, its tags, and the age of the weights that sampled it."""

    trajectory_group: TrajectoryGroup
    tags: list[str]
    sampling_client_step: int | None = None


def serialize_rollout_summaries(
    *,
    split: str,
    iteration: int,
    trajectory_groups_P: Sequence[TrajectoryGroup],
    taglist_P: Sequence[list[str]],
    sampling_client_steps_P: Sequence[int | None] | None = None,
) -> list[dict[str, object]]:
    """Return one record per trajectory, from parallel lists."""
    steps_P = sampling_client_steps_P or [None] * len(trajectory_groups_P)
    groups = [
        RolloutSummaryGroup(group, tags, step)
        for group, tags, step in zip(trajectory_groups_P, taglist_P, steps_P, strict=True)
    ]
    return serialize_rollout_summaries_from_groups(
        split=split, iteration=iteration, groups_P=groups
    )


def serialize_rollout_summaries_from_groups(
    *,
    split: str,
    iteration: int,
    groups_P: Sequence[RolloutSummaryGroup],
    tokenizer: Tokenizer | None = None,
) -> list[dict[str, object]]:
    """Return one record per trajectory, and one per lost rollout.

    Args:
        split: `train`, or the name of an evaluator.
        iteration: The step.
        groups_P: The groups.
        tokenizer: Adds the texts `prompt` and `reply` to each turn.
    """
    records = []
    for group_idx, item in enumerate(groups_P):
        head = {
            "schema_version": SCHEMA_VERSION,
            "split": split,
            "iteration": iteration,
            "group_idx": group_idx,
        }
        group = item.trajectory_group
        totals = group.get_total_rewards()
        for traj_idx, trajectory in enumerate(group.trajectories_G):
            records.append(
                {
                    **head,
                    "traj_idx": traj_idx,
                    "tags": item.tags,
                    "sampling_client_step": item.sampling_client_step,
                    "total_reward": totals[traj_idx],
                    "final_reward": group.final_rewards_G[traj_idx],
                    "trajectory_metrics": group.metrics_G[traj_idx],
                    "stop_reason": trajectory.stop_reason,
                    **_serialize_steps(trajectory, tokenizer),
                }
            )
        records += [
            {
                **head,
                "tags": item.tags,
                "error_type": e.error_type,
                "error_message": e.error_message,
            }
            for e in group.rollout_errors
        ]
    return records


def rollout_summaries_jsonl_path(iteration_dir: Path, base_name: str) -> Path:
    """Return `<folder>/<base name>_rollout_summaries.jsonl`."""
    return iteration_dir / f"{base_name}_rollout_summaries.jsonl"


def write_rollout_summaries_jsonl_from_groups(
    path: Path,
    *,
    split: str,
    iteration: int,
    groups_P: Sequence[RolloutSummaryGroup],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write all records of a batch; an existing file is replaced."""
    records = serialize_rollout_summaries_from_groups(
        split=split, iteration=iteration, groups_P=groups_P, tokenizer=tokenizer
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def _serialize_steps(trajectory: Trajectory, tokenizer: Tokenizer | None) -> dict[str, object]:
    return {
        "steps": [
            {
                "step_idx": index,
                "ob_len": turn.ob.length,
                "ac_len": len(turn.ac.tokens),
                "reward": turn.reward,
                "episode_done": turn.episode_done,
                "metrics": turn.metrics,
                "logs": turn.logs,
                **_texts(turn, trajectory.transitions[:index], tokenizer),
            }
            for index, turn in enumerate(trajectory.transitions)
        ],
        "final_ob_len": trajectory.final_ob.length,
    }


def _texts(
    turn: Transition, earlier: Sequence[Transition], tokenizer: Tokenizer | None
) -> dict[str, str]:
    if tokenizer is None:
        return {}
    prompt = new_prompt_text(turn, earlier[-1] if earlier else None, tokenizer)
    return {"prompt": prompt, "reply": str(tokenizer.decode(turn.ac.tokens))}


def extends(turn: Transition, before: Transition) -> bool:
    """Return whether a prompt begins, token for token, with the turn before it."""
    known = [*flatten_chunks(before.ob.chunks), *before.ac.tokens]
    return flatten_chunks(turn.ob.chunks)[: len(known)] == known


def new_prompt_text(turn: Transition, before: Transition | None, tokenizer: Tokenizer) -> str:
    """Return the text of the prompt; if it extends the turn before, only the new part."""
    flat = flatten_chunks(turn.ob.chunks)
    if before is not None and extends(turn, before):
        flat = flat[len(flatten_chunks(before.ob.chunks)) + len(before.ac.tokens) :]
    pieces: list[str] = []
    tokens: list[int] = []
    for element in flat:
        if isinstance(element, int):
            tokens.append(element)
            continue
        pieces += [str(tokenizer.decode(tokens)), f"[{type(element).__name__}]"]
        tokens = []
    return "".join([*pieces, str(tokenizer.decode(tokens))])
