"""Pairwise groups: who meets whom, what it is worth, and a run that learns from it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import tinker

from tinker_cookbook import renderers, tokenizer_utils
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.preference.types import Comparison, PreferenceModel
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl import train
from tinker_cookbook.rl.length_control import LengthControl
from tinker_cookbook.rl.preference_envs import (
    PairwisePreferenceGroupBuilder,
    PairwisePreferenceRLDatasetBuilder,
    TournamentPattern,
    get_pairs,
    get_pairs_chunked,
)
from tinker_cookbook.rl.types import Trajectory, Transition

ONE_WAY, BOTH_WAYS = TournamentPattern.ALL_PAIRS_ONE_WAY, TournamentPattern.ALL_PAIRS_BOTH_WAYS
PROMPT: list[Message] = [{"role": "user", "content": "Speak."}]


def test_pairs():
    assert get_pairs(3, ONE_WAY) == [(0, 1), (0, 2), (1, 2)]
    assert sorted(get_pairs(3, BOTH_WAYS)) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert get_pairs(1, BOTH_WAYS) == []


@pytest.mark.parametrize("num_members", range(2, 12))
@pytest.mark.parametrize("chunk_size", [2, 3, 4])
def test_everybody_meets_somebody(num_members: int, chunk_size: int):
    pairs = get_pairs_chunked(num_members, ONE_WAY, chunk_size)
    assert {i for pair in pairs for i in pair} == set(range(num_members))
    assert len(set(pairs)) == len(pairs)
    assert max(abs(i - j) for i, j in pairs) <= chunk_size


def test_a_chunk_of_one_is_refused():
    with pytest.raises(ConfigurationError, match="matchup_group_size=1 must be 2 or greater"):
        get_pairs_chunked(4, ONE_WAY, 1)


class Longer(PreferenceModel):
    """Prefers the longer completion; counts how many it judges at once."""

    def __init__(self) -> None:
        self.now = self.most = self.total = 0

    async def __call__(self, comparison: Comparison) -> float:
        self.now += 1
        self.total += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        first, second = (
            len(str(part[-1]["content"]))
            for part in (comparison.completion_A, comparison.completion_B)
        )
        return float(np.sign(second - first))


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


def said(renderer: renderers.Renderer, text: str, *, ended: bool = True) -> Trajectory:
    tokens = renderer.tokenizer.encode(text, add_special_tokens=False)
    if ended:
        tokens = [*tokens, int(renderer.get_stop_sequences()[0])]
    action = TokensWithLogprobs(tokens, [-1.0] * len(tokens))
    empty = tinker.ModelInput.empty()
    return Trajectory([Transition(empty, action, 0.0, True)], empty)


def group(renderer, judge: PreferenceModel, **changes) -> PairwisePreferenceGroupBuilder:
    settings = {"tournament_pattern": BOTH_WAYS, "num_envs": 3} | changes
    return PairwisePreferenceGroupBuilder(PROMPT, renderer, preference_model=judge, **settings)


@pytest.mark.parametrize(("pattern", "num_matches"), [(BOTH_WAYS, 6), (ONE_WAY, 3)])
def test_rewards_are_mean_verdicts_judged_at_once(renderer, pattern, num_matches: int):
    judge = Longer()
    builder = group(renderer, judge, tournament_pattern=pattern)
    trajectories = [said(renderer, text) for text in ("a", "a long one", "longer than that")]
    rewards = asyncio.run(builder.compute_group_rewards(trajectories, []))
    assert [reward for reward, _ in rewards] == [-1.0, 0.0, 1.0]
    assert [metrics["win_minus_loss"] for _, metrics in rewards] == [-1.0, 0.0, 1.0]
    assert (judge.total, judge.most) == (num_matches, num_matches)


def test_the_matches_of_all_groups_are_judged_at_once(renderer):
    judge = Longer()
    builders = [group(renderer, judge) for _ in range(3)]
    trajectories = [said(renderer, text) for text in ("a", "a long one", "longer than that")]

    async def batch() -> None:
        await asyncio.gather(*(b.compute_group_rewards(trajectories, []) for b in builders))

    asyncio.run(batch())
    assert (judge.total, judge.most) == (18, 18)


def test_length_lowers_the_reward_and_leaves_the_verdict(renderer):
    control = LengthControl(method="penalty", coef=0.1, free_tokens=2)
    builder = group(renderer, Longer(), length_control=control)
    trajectories = [said(renderer, text) for text in ("a", "a long one", "longer than that")]
    lengths = [len(trajectory.transitions[0].ac.tokens) for trajectory in trajectories]
    rewards = asyncio.run(builder.compute_group_rewards(trajectories, []))
    costs = [0.1 * max(0, length - 2) for length in lengths]
    assert [reward for reward, _ in rewards] == pytest.approx(np.array([-1, 0, 1]) - costs)
    assert [metrics["win_minus_loss"] for _, metrics in rewards] == [-1.0, 0.0, 1.0]
    assert [m["length_adjustment"] for _, m in rewards] == pytest.approx([-c for c in costs])


def test_a_reply_that_did_not_end_costs_one(renderer):
    trajectories = [said(renderer, "a"), said(renderer, "very long", ended=False)]
    rewards = asyncio.run(group(renderer, Longer()).compute_group_rewards(trajectories, []))
    assert [reward for reward, _ in rewards] == [-1.0, 0.0]
    assert rewards[1][1]["format"] == 0.0


def test_one_survivor_of_a_group_is_worth_nothing(renderer):
    rewards = asyncio.run(
        group(renderer, Longer()).compute_group_rewards([said(renderer, "a")], [])
    )
    assert rewards[0][0] == 0.0


def test_replies_may_meet_a_given_completion(renderer):
    target: list[Message] = [{"role": "assistant", "content": "middle"}]
    builder = group(renderer, Longer(), num_envs=1, eval_target_completion_A=target)
    trajectories = [said(renderer, "a"), said(renderer, "a very long one")]
    rewards = asyncio.run(builder.compute_group_rewards(trajectories, []))
    assert [reward for reward, _ in rewards] == [-1.0, 1.0]


def test_a_group_of_one_is_refused(renderer):
    with pytest.raises(ConfigurationError, match="group_size=1 must be 2 or greater"):
        group(renderer, Longer(), num_envs=1)


def test_a_run_learns_what_the_judge_prefers(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    one = {"prompt_conversation": PROMPT, "completion_A": [], "completion_B": []}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([json.dumps({"comparison": one, "label": "A"})] * 20))
    config = train.Config(
        log_path=str(tmp_path / "run"),
        model_name=local_service.model,
        base_url=local_service.base_url,
        max_tokens=6,
        learning_rate=2e-2,
        lora_rank=4,
        eval_every=0,
        dataset_builder=PairwisePreferenceRLDatasetBuilder(
            comparison_builder=ComparisonBuilderFromJsonl(train_path=str(path)),
            batch_size=2,
            policy_renderer_name="chatml",
            policy_model_name=local_service.model,
            group_size=6,
            content_preprocessor=str.strip,
            preference_model_builder=Longer,
        ),
    )
    asyncio.run(train.main(config))
    text = (tmp_path / "run/metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    assert len(steps) == 10
    assert all(abs(step["env/all/win_minus_loss"]) < 1e-9 for step in steps)  # a tournament
    assert steps[0]["env/all/by_group/frac_mixed"] == 1.0
