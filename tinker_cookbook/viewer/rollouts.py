"""The rollouts and samples of a run, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tinker_cookbook.stores.training_store import TRAIN, TrainingRunStore
from tinker_cookbook.utils.jsonl_log import Row

__all__ = ["read_rollouts", "read_samples"]

SHOWN_PROMPTS = 4
"""Held-out prompts of an RL run whose replies are shown over time."""


def read_rollouts(store: TrainingRunStore, step: int, split: str) -> list[Row]:
    """Return the groups of a step: index, tags, rewards, and their rollouts with tokens."""
    tokens = {
        (row.get("group_idx"), row.get("traj_idx")): row.get("turns")
        for row in store.read_tokens(step, split)
    }
    groups: dict[int, Row] = {}
    for record in store.read_rollouts(step, split):
        index = record.get("group_idx", 0)
        group = groups.setdefault(
            index, {"index": index, "tags": record.get("tags", []), "rollouts": [], "errors": []}
        )
        if "error_type" in record:
            group["errors"].append(f"{record['error_type']}: {record.get('error_message')}")
            continue
        place = (index, record.get("traj_idx"))
        group["rollouts"].append(_describe_rollout(record, tokens.get(place)))
    return [groups[index] for index in sorted(groups)]


def _describe_rollout(record: Row, token_turns: list[Row] | None) -> Row:
    turns = []
    for number, step in enumerate(record.get("steps", [])):
        known = token_turns[number] if token_turns and number < len(token_turns) else {}
        turns.append(
            {
                "prompt": step.get("prompt", known.get("prompt")),
                "reply": step.get("reply"),
                "num_tokens": step.get("ac_len"),
                "reward": step.get("reward"),
                "metrics": step.get("metrics") or {},
                "logs": step.get("logs") or {},
                **{key: value for key, value in known.items() if key != "prompt"},
            }
        )
    return {
        "index": record.get("traj_idx"),
        "reward": record.get("total_reward"),
        "ending": record.get("stop_reason"),
        "metrics": record.get("trajectory_metrics") or {},
        "turns": turns,
    }


def read_samples(store: TrainingRunStore) -> list[Row]:
    """Return answers to the same prompts over time: `step` (or None), `prompt`, `answer`."""
    recorded = [*_number(store.read_samples())]
    return recorded or [*_held_out_replies(store)]


def _number(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        yield {
            "step": row.get("step"),
            "prompt": str(row.get("prompt", "")),
            "answer": str(row.get("answer", "")),
        }


def _held_out_replies(store: TrainingRunStore) -> Iterator[Row]:
    """Yield the first reply to the first held-out tasks of each evaluation of an RL run."""
    for info in store.list_iterations():
        label = next((each for each in info.eval_labels if each != TRAIN), None)
        if label is None:
            continue
        for record in store.read_rollouts(info.iteration, label):
            steps = record.get("steps") or [{}]
            is_shown = record.get("group_idx", 0) < SHOWN_PROMPTS and record.get("traj_idx") == 0
            if is_shown and "reply" in steps[0]:
                answer = f"{steps[0]['reply']}"
                reward = record.get("total_reward")
                yield {
                    "step": info.iteration,
                    "prompt": str(steps[0].get("prompt", "")),
                    "answer": answer,
                    "reward": reward,
                }
