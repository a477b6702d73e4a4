"""Programs as they are written for the cookbook: only its documented names, nothing of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import chz
import pytest
import tinker

from tinker_cookbook import renderers
from tinker_cookbook.completers import (
    MessageCompleter,
    TinkerMessageCompleter,
    TinkerTokenCompleter,
    TokenCompleter,
)
from tinker_cookbook.rl import train
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.metric_util import RLTestSetEvaluator, compute_trajectory_metrics
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.rollout_strategy import RolloutResult, RolloutStrategy
from tinker_cookbook.rl.rollouts import do_group_rollout, do_single_rollout
from tinker_cookbook.rl.types import (
    Env,
    EnvGroupBuilder,
    Metrics,
    RLDataset,
    RLDatasetBuilder,
    Trajectory,
)
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.tool_use import ToolResult, build_agent_tool_env, simple_tool_result, tool


@pytest.fixture
def service(local_service, monkeypatch: pytest.MonkeyPatch):
    """The address and key as a program finds them in its environment."""
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    return local_service


# ---- a problem, its data set, and the train loop ----


class AdditionEnv(ProblemEnv):
    def __init__(
        self,
        x: int,
        y: int,
        renderer: renderers.Renderer,
        convo_prefix: list[renderers.Message] | None = None,
    ):
        super().__init__(renderer, convo_prefix, format_coef=0.5)
        self.x = x
        self.y = y

    def get_question(self) -> str:
        return f"What is {self.x} + {self.y}?"

    def check_answer(self, sample_str: str) -> bool:
        return str(self.x + self.y) in sample_str

    def check_format(self, sample_str: str) -> bool:
        return len(sample_str) < 20

    def get_reference_answer(self) -> str:
        return str(self.x + self.y)

    @staticmethod
    def standard_fewshot_prefix() -> list[renderers.Message]:
        return [
            {"role": "user", "content": "What is 4 + 5?"},
            {"role": "assistant", "content": "9"},
        ]


class AdditionDataset(RLDataset):
    def __init__(self, batch_size: int, renderer: renderers.Renderer, group_size: int):
        self.batch_size = batch_size
        self.renderer = renderer
        self.group_size = group_size

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [
            ProblemGroupBuilder(
                env_thunk=partial(
                    AdditionEnv,
                    index,
                    i,
                    renderer=self.renderer,
                    convo_prefix=AdditionEnv.standard_fewshot_prefix(),
                ),
                num_envs=self.group_size,
                dataset_name="addition",
            )
            for i in range(self.batch_size)
        ]

    def __len__(self) -> int:
        return 2


@chz.chz
class AdditionDatasetBuilder(RLDatasetBuilder):
    batch_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    group_size: int

    async def __call__(self) -> tuple[AdditionDataset, AdditionDataset]:
        tokenizer = get_tokenizer(self.model_name_for_tokenizer)
        renderer = renderers.get_renderer(self.renderer_name, tokenizer)
        return (
            AdditionDataset(self.batch_size, renderer, self.group_size),
            AdditionDataset(1, renderer, 2),
        )


def test_a_problem_env_trains(service, tmp_path: Path):
    builder = AdditionDatasetBuilder(
        batch_size=2,
        model_name_for_tokenizer=service.model,
        renderer_name="role_colon",
        group_size=4,
    )
    test_data = AdditionDataset(1, renderer_of(service), 2)
    config = train.Config(
        model_name=service.model,
        recipe_name="addition",
        log_path=str(tmp_path / "run"),
        dataset_builder=builder,
        learning_rate=4e-5,
        max_tokens=8,
        lora_rank=4,
        eval_every=1,
        save_every=1,
        evaluator_builders=[lambda: RLTestSetEvaluator(test_data, max_tokens=8, name="more")],
        kl_penalty_coef=0.01,
        kl_reference_config=train.KLReferenceConfig(base_model=service.model),
        remove_constant_reward_groups=False,
        rollout_error_tolerance=TwoOfThem(),
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    )
    asyncio.run(train.main(config))
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["env/all/total_episodes"] == 4  # two of each group
    for key in ("env/all/format", "env/all/correct", "kl_policy_base", "optim/entropy"):
        assert key in rows[0]
    assert {"test/env/all/reward/total", "more/env/all/reward/total"} <= rows[0].keys()
    names = [json.loads(x) for x in (tmp_path / "run/checkpoints.jsonl").read_text().splitlines()]
    assert {"000001", "final"} <= {record["name"] for record in names}


def renderer_of(service, name: str = "role_colon") -> renderers.Renderer:
    return renderers.get_renderer(name, get_tokenizer(service.model))


class TwoOfThem(RolloutStrategy):
    """A strategy as the interface has it, without our `config`."""

    @property
    def catches_group_errors(self) -> bool:
        return True

    async def execute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, env_group_builder: EnvGroupBuilder, policy: TokenCompleter
    ) -> RolloutResult:
        envs = (await env_group_builder.make_envs())[:2]
        trajectories = [await do_single_rollout(policy, env) for env in envs]
        return RolloutResult(trajectories=trajectories, envs=envs, errors=[])


# ---- tools ----


class Shop:
    def __init__(self) -> None:
        self.asked: list[str] = []

    @tool
    async def price(
        self,
        item: Annotated[str, "What to buy."],
        count: Annotated[int, "How many."] = 1,
    ) -> ToolResult:
        """Look up a price."""
        self.asked.append(item)
        return simple_tool_result(f"{3 * count} coins", metrics={"lookups": 1.0})


class ShopGroup(EnvGroupBuilder):
    def __init__(self, renderer: renderers.Renderer) -> None:
        self.renderer = renderer

    async def make_envs(self) -> Sequence[Env]:
        async def reward_fn(history: list[renderers.Message]) -> tuple[float, dict[str, float]]:
            said = renderers.get_text_content(history[-1])
            return float("3" in said), {"turns": float(len(history))}

        messages: list[renderers.Message] = [
            {"role": "system", "content": "You sell things."},
            {"role": "user", "content": "What does an apple cost?"},
        ]
        return [
            build_agent_tool_env(
                self.renderer,
                [Shop().price],
                messages,
                reward_fn,
                max_turns=3,
                failed_parse_reward=-0.5,
                max_trajectory_tokens=4096,
            )
            for _ in range(2)
        ]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        return [(0.25 * i, {"place": i}) for i, _ in enumerate(trajectory_group)]

    def logging_tags(self) -> list[str]:
        return ["shop"]


def reply(renderer: renderers.Renderer, text: str) -> list[int]:
    tokens = renderer.tokenizer.encode(text, add_special_tokens=False)
    return [*tokens, int(renderer.get_stop_sequences()[0])]


def test_tools_are_called_and_graded(service):
    renderer = renderer_of(service, "qwen3_instruct")

    async def play() -> tuple[str, float, dict]:
        env = (await ShopGroup(renderer).make_envs())[0]
        first = await env.initial_observation()
        assert isinstance(first, tuple)
        assert "Look up a price." in renderer.tokenizer.decode(first[0].to_ints())
        call = json.dumps({"name": "price", "arguments": {"item": "apple"}})
        asked = await env.step(reply(renderer, f"<tool_call>\n{call}\n</tool_call>"))
        said = await env.step(reply(renderer, "3 coins"))
        shown = renderer.tokenizer.decode(asked.next_observation.to_ints())
        return str(shown), said.reward, {**asked.metrics, **said.metrics}

    shown, reward, metrics = asyncio.run(play())
    assert "3 coins" in shown
    assert (reward, metrics["lookups"], metrics["turns"]) == (1.0, 1.0, 4.0)


# ---- a program's loop, and another model in the environment ----


class AskedByModelEnv(MessageEnv):
    """The question comes from another model; the reward is how short the answer is."""

    def __init__(self, asker: MessageCompleter) -> None:
        self.asker = asker
        self.convo: list[renderers.Message] = []

    async def initial_observation(self) -> list[renderers.Message]:
        question = await self.asker([{"role": "user", "content": "Ask me something."}])
        text = renderers.get_text_content(question)
        self.convo = [{"role": "user", "content": text or "?"}]
        return self.convo

    async def step(self, message: renderers.Message) -> MessageStepResult:
        self.convo.append(message)
        length = len(renderers.get_text_content(message))
        return MessageStepResult(
            reward=-length / 100, episode_done=True, next_messages=self.convo, metrics={"n": length}
        )


class AskedGroup(EnvGroupBuilder):
    def __init__(self, renderer: renderers.Renderer, asker: MessageCompleter) -> None:
        self.renderer = renderer
        self.asker = asker

    async def make_envs(self) -> Sequence[Env]:
        return [EnvFromMessageEnv(self.renderer, AskedByModelEnv(self.asker)) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # the SDK's own, for `*_async`
def test_a_loop_of_ones_own(service):
    async def work() -> tuple[dict, dict]:
        service_client = tinker.ServiceClient()
        training_client = await service_client.create_lora_training_client_async(
            base_model=service.model, rank=4
        )
        renderer = renderer_of(service, "qwen3_instruct")
        sampling_client = await training_client.save_weights_and_get_sampling_client_async()
        asker = TinkerMessageCompleter(sampling_client, renderer, max_tokens=6)
        policy = TinkerTokenCompleter(sampling_client, max_tokens=6, temperature=1.0)
        builders = [AskedGroup(renderer, asker), ShopGroup(renderer)]
        groups = await asyncio.gather(*(do_group_rollout(b, policy) for b in builders))
        found = compute_trajectory_metrics(groups, [b.logging_tags() for b in builders])
        advantages_P = compute_advantages(groups)
        data_D, metadata_D = assemble_training_data(groups, advantages_P)
        assert {m["group_idx"] for m in metadata_D} == {0, 1}
        metrics: dict = {}
        logprobs_D = await train.train_step(
            data_D, training_client, 1e-4, 2, "importance_sampling", metrics=metrics
        )
        assert [len(logprobs) for logprobs in logprobs_D] == [d.model_input.length for d in data_D]
        return found, metrics

    found, metrics = asyncio.run(work())
    assert found["env/all/total_episodes"] == 5
    assert found["env/shop/place"] == 0.5
    assert metrics["optim/kl_sample_train_v2"] < 1e-3
