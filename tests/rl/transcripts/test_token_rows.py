"""The numbers of each sampled token: what the trainer computed is put next to the right token."""

import json
from pathlib import Path

import numpy as np
import pytest
import tinker

from tests.assets import load_tokenizer
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl.data_processing import assemble_training_data
from tinker_cookbook.rl.rollout_logging import RolloutSummaryGroup
from tinker_cookbook.rl.transcripts.token_rows import collect_trained_tokens, write_token_rows
from tinker_cookbook.rl.types import (
    PARSE_ERROR_MASKED_METRIC_KEY,
    Trajectory,
    TrajectoryGroup,
    Transition,
)


def turn(prompt: list[int], reply: list[int], *, masked: bool = False) -> Transition:
    return Transition(
        ob=tinker.ModelInput.from_ints(prompt),
        ac=TokensWithLogprobs(reply, [-0.1 * token for token in reply]),
        reward=1.0,
        episode_done=False,
        metrics={PARSE_ERROR_MASKED_METRIC_KEY: 1} if masked else {},
    )


def group_of(*episodes: list[Transition]) -> TrajectoryGroup:
    trajectories = [Trajectory(turns, tinker.ModelInput.empty()) for turns in episodes]
    return TrajectoryGroup(trajectories, [0.0] * len(episodes), [{} for _ in episodes])


def write(path: Path, group: TrajectoryGroup, advantages: list[float] | None) -> list[dict]:
    """Write the rows of a group whose trainer logprobs are the targets, divided by -100."""
    trained = {}
    if advantages is not None:
        data_D, metadata_D = assemble_training_data([group], [np.array(advantages)])
        origins = {
            id(datum): group.trajectories_G[place["traj_idx"]]
            for datum, place in zip(data_D, metadata_D, strict=True)
        }
        logprobs_D = [datum.loss_fn_inputs["target_tokens"].to_numpy() / -100 for datum in data_D]
        trained = collect_trained_tokens(origins, data_D, logprobs_D)
    items = [RolloutSummaryGroup(group, [])]
    write_token_rows(path, items, load_tokenizer("qwen3"), trained)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_token_has_its_numbers_also_after_masked_turns_and_new_prompts(tmp_path: Path):
    broken = [99, 98]  # does not begin with the turn before: a second datum
    first = [turn([10, 11], [20, 21]), turn([10, 11, 20, 21, 12], [22], masked=True)]
    first += [turn([10, 11, 20, 21, 12, 22, 13], [23]), turn(broken, [24, 25])]
    rows = write(tmp_path / "t.jsonl", group_of(first, [turn([10], [30])]), [0.5, -0.25])
    assert [(row["group_idx"], row["traj_idx"]) for row in rows] == [(0, 0), (0, 1)]
    turns = rows[0]["turns"]
    assert [each["trainer"] for each in turns] == [[-0.2, -0.21], [None], [-0.23], [-0.24, -0.25]]
    assert [each["weight"] for each in turns] == [[1, 1], [0], [1], [1, 1]]
    assert turns[0]["logprob"] == pytest.approx([-2.0, -2.1])
    assert turns[3]["advantage"] == [0.5, 0.5]
    assert rows[1]["turns"][0]["advantage"] == [-0.25]
    tokenizer = load_tokenizer("qwen3")
    assert "".join(turns[0]["tokens"]) == tokenizer.decode([20, 21])
    assert turns[2]["prompt"] == tokenizer.decode([13]), "only what is new"


def test_an_evaluation_has_no_numbers_of_a_trainer(tmp_path: Path):
    (row,) = write(tmp_path / "t.jsonl", group_of([turn([10], [20])]), None)
    assert "trainer" not in row["turns"][0]
    assert row["turns"][0]["weight"] == [0]


def test_parts_of_one_character_are_joined_at_its_last_token(tmp_path: Path):
    tokens = load_tokenizer("qwen3").encode("a\N{OLD ITALIC LETTER KE}b", add_special_tokens=False)
    assert len(tokens) > 3
    (row,) = write(tmp_path / "t.jsonl", group_of([turn([10], list(tokens))]), [1.0])
    pieces = row["turns"][0]["tokens"]
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == "a\N{OLD ITALIC LETTER KE}b"
    assert "" in pieces
