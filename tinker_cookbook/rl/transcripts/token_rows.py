"""The sampled tokens of a step as JSON lines, for pages that colour each token by its numbers.

`<base name>_tokens.jsonl` has one object per trajectory of the groups on the transcript page. Its
`turns` hold the prompt as text and, for each sampled token, its text and these numbers:

| key | value |
|---|---|
| `logprob` | log probability when it was sampled |
| `trainer` | log probability in the trainer's gradient pass; missing in evaluations |
| `advantage` | advantage with which it was trained, including the KL penalty |
| `weight` | 1 if it was trained on, otherwise 0 |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.rl.data_processing import PARSE_ERROR_MASKED_METRIC_KEY
from tinker_cookbook.rl.rollout_logging import RolloutSummaryGroup, new_prompt_text
from tinker_cookbook.rl.types import Trajectory, Transition
from tinker_cookbook.utils.jsonl_log import Row

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["TOKENS_END", "TrainedTokens", "collect_trained_tokens", "write_token_rows"]

TOKENS_END = "_tokens.jsonl"
MAX_TOKENS_PER_CHARACTER = 8
DIGITS = 4
"""Decimals of the numbers."""


@dataclass
class TrainedTokens:
    """The numbers of a trajectory's trained tokens, in their order."""

    trainer: list[float]
    advantage: list[float]


def collect_trained_tokens(
    origins: MutableMapping[int, Trajectory],
    data_D: Sequence[tinker.Datum],
    training_logprobs_D: Sequence[np.ndarray],
) -> dict[int, TrainedTokens]:
    """Return the numbers of the trained tokens by `id` of the trajectory.

    Args:
        origins: The trajectory of each datum, by `id` of the datum; those of `data_D` are removed.
            A trajectory whose prompts do not extend each other has several datums.
        data_D: The datums of a step, in the order of their turns.
        training_logprobs_D: float [T] each, from the gradient pass.
    """
    found: dict[int, TrainedTokens] = {}
    for datum, logprobs_T in zip(data_D, training_logprobs_D, strict=True):
        origin = origins.pop(id(datum), None)
        if origin is None:
            continue
        numbers = found.setdefault(id(origin), TrainedTokens([], []))
        kept_T = datum.loss_fn_inputs["mask"].to_numpy() > 0
        numbers.trainer += np.asarray(logprobs_T)[kept_T].tolist()
        numbers.advantage += datum.loss_fn_inputs["advantages"].to_numpy()[kept_T].tolist()
    return found


def write_token_rows(
    path: Path,
    shown_P: Sequence[RolloutSummaryGroup],
    tokenizer: Tokenizer,
    trained: Mapping[int, TrainedTokens],
) -> None:
    """Write one row for each trajectory of the groups; an existing file is replaced.

    Args:
        path: The file.
        shown_P: The groups.
        tokenizer: Decodes the tokens.
        trained: The result of `collect_trained_tokens`; empty for an evaluation.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"group_idx": group_idx, "traj_idx": traj_idx, "turns": turns}
        for group_idx, item in enumerate(shown_P)
        for traj_idx, trajectory in enumerate(item.trajectory_group.trajectories_G)
        if (turns := list(_turns(trajectory, tokenizer, trained.get(id(trajectory)))))
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _turns(
    trajectory: Trajectory, tokenizer: Tokenizer, trained: TrainedTokens | None
) -> Iterator[Row]:
    before: Transition | None = None
    used = 0
    total = sum(len(turn.ac.tokens) for turn in trajectory.transitions if _is_trained(turn))
    # Other loops may cut datums; then it is unknown which token a number belongs to.
    known = trained if trained is not None and len(trained.trainer) == total else None
    for turn in trajectory.transitions:
        count = len(turn.ac.tokens)
        is_trained = _is_trained(turn)
        row: Row = {
            "prompt": new_prompt_text(turn, before, tokenizer),
            "tokens": _pieces(turn.ac.tokens, tokenizer),
            "logprob": _round(turn.ac.maybe_logprobs or [math.nan] * count),
            "weight": [int(is_trained and known is not None)] * count,
        }
        if known is not None:
            own = slice(used, used + count)
            nothing = [math.nan] * count
            row["trainer"] = _round(known.trainer[own] if is_trained else nothing)
            row["advantage"] = _round(known.advantage[own] if is_trained else nothing)
            used += count if is_trained else 0
        yield row
        before = turn


def _is_trained(turn: Transition) -> bool:
    return turn.metrics.get(PARSE_ERROR_MASKED_METRIC_KEY, 0) < 1


def _pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token; the last token of a character has its whole text."""
    pieces: list[str] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = str(tokenizer.decode(pending))
        if text.endswith("\ufffd") and len(pending) < MAX_TOKENS_PER_CHARACTER:
            pieces.append("")
            continue
        pieces.append(text)
        pending = []
    if pending:
        pieces[-1] = str(tokenizer.decode(pending))
    return pieces


def _round(values: Sequence[float]) -> list[float | None]:
    return [round(value, DIGITS) if math.isfinite(value) else None for value in values]
