"""Run directories for the tests of the page, written as the loops write them."""

from __future__ import annotations

import math
from pathlib import Path

from tinker_cookbook.stores import LocalStorage, TrainingRunStore

ATTACK = "<img src=x onerror=\"document.title='owned'\"></script>"


def write_supervised(root: Path, name: str, steps: int, rate: float) -> TrainingRunStore:
    """A supervised run with samples, times and a final checkpoint."""
    store = TrainingRunStore(LocalStorage(root), name)
    settings = {"learning_rate": rate, "seed": 0, "note": ATTACK}
    store.write_config({"recipe_name": "sl_basic", "recipe_settings": settings, **settings})
    for step in range(steps):
        row = {"train_mean_nll": 4.0 * math.exp(-rate * step), "num_tokens": 100 + step}
        row |= {"time/total": 2.0, "time/step": 2.0, "time/forward_backward": 1.5}
        row |= {"test/nll": 5.0 - step / steps} if step % 2 == 0 else {}
        store.write_metrics(row, step)
    begin = 1_000.0
    spans = [
        {"name": "forward_backward", "wall_start": begin, "duration_seconds": 1.5},
        {"name": "optim_step", "wall_start": begin + 1.5, "duration_seconds": 0.5},
    ]
    store.write_timing_spans(steps - 1, spans)
    for step in (0, steps):
        store.write_sample({"step": step, "prompt": ATTACK, "answer": f"answer {step}"})
    store.write_checkpoint({"name": "final", "final": True, "state_path": "tinker://r/weights/f"})
    return store


def write_rl(root: Path, name: str) -> TrainingRunStore:
    """A run of reinforcement learning with two groups in each of two steps."""
    store = TrainingRunStore(LocalStorage(root), name)
    store.write_config({"recipe_name": "rl_basic", "loss_fn": "ppo", "max_tokens": 8})
    for step in range(2):
        store.write_metrics({"env/all/reward/total": 0.25 + step / 2}, step)
        records = [record(step, group, number) for group in range(2) for number in range(2)]
        lost = {"group_idx": 1, "tags": [], "error_type": "EnvError", "error_message": ATTACK}
        store.write_rollouts(step, [*records, lost])
        turn = {
            "prompt": "Say it.",
            "tokens": ["Hel", "lo", " <b>you</b>"],
            "logprob": [-0.5, -0.01, -3.0],
            "trainer": [-0.5, -0.02, -2.0],
            "advantage": [0.5, 0.5, 0.5],
            "weight": [1, 1, 1],
        }
        store.write_tokens(step, [{"group_idx": 0, "traj_idx": 1, "turns": [turn]}])
    return store


def record(step: int, group: int, number: int) -> dict[str, object]:
    """The summary of a rollout; its reward is its number in the step."""
    reply = "Hello <b>you</b>" if number else "Bye"
    turn = {"prompt": "Say it.", "reply": reply, "ac_len": 3, "reward": 0.0}
    return {
        "group_idx": group,
        "traj_idx": number,
        "tags": [f"step-{step}"],
        "total_reward": float(2 * group + number),
        "stop_reason": "completed",
        "trajectory_metrics": {},
        "steps": [{**turn, "metrics": {"format": 1.0}, "logs": {}}],
    }
