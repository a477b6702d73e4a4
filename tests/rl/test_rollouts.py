# pyright: reportIncompatibleMethodOverride=false
import asyncio
import pickle
import re
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import pytest

from tests.rl.envs import STOP, EchoEnv, EnvsBuilder, ScriptedPolicy
from tinker_cookbook.completers import ContextOverflowError
from tinker_cookbook.exceptions import (
    AllTrajectoriesFailedError,
    ConfigurationError,
    DataValidationError,
)
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.rollout_limits import RolloutConfig, RolloutLimits, TerminationRewardPolicy
from tinker_cookbook.rl.rollout_runner import (
    SamplingTurnTimeoutError,
    run_rollout,
)
from tinker_cookbook.rl.rollout_strategy import (
    FailFast,
    MinViableGroup,
    RetryOnFailure,
    rollout_strategy_from_config,
)
from tinker_cookbook.rl.rollouts import (
    RolloutErrorCounter,
    RolloutSettings,
    do_group_rollout,
    rollout_group,
    set_rollout_executor,
)
from tinker_cookbook.rl.types import Env, InitialObservationOverflow


def raise_in(turn: int, *, failing: int = 0) -> None:
    if turn == failing:
        raise ZeroDivisionError("reward is 1/0")


def do_nothing(turn: int) -> None:
    return None


def hang(turn: int):
    return asyncio.sleep(60)


@pytest.mark.anyio
async def test_an_episode_is_recorded_turn_by_turn():
    done = await run_rollout(ScriptedPolicy([[5, STOP], [6]]), EchoEnv(num_turns=2))
    assert [turn.ac.tokens for turn in done.transitions] == [[5, STOP], [6]]
    assert done.transitions[1].ob.to_ints() == [1, 2, 3, 5, STOP, 100]
    assert done.final_ob.to_ints() == [1, 2, 3, 5, STOP, 100, 6, 101]
    assert done.stop_reason == "completed"
    assert done.transitions[-1].metrics["stop/completed"] == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("limits", "num_turns", "reason"),
    [
        (RolloutLimits(max_turns=2), 2, "max_turns"),
        (RolloutLimits(max_sampled_tokens=5), 3, "max_sampled_tokens"),
        (RolloutLimits(max_trajectory_tokens=8), 2, "context_overflow"),
    ],
)
async def test_limits_end_an_episode_with_what_it_has(
    limits: RolloutLimits, num_turns: int, reason: str
):
    done = await run_rollout(ScriptedPolicy(), EchoEnv(num_turns=10), limits=limits)
    assert len(done.transitions) == num_turns
    assert done.stop_reason == reason
    assert done.transitions[-1].episode_done
    limit = limits.max_sampled_tokens
    assert limit is None or sum(len(t.ac.tokens) for t in done.transitions) <= limit


@pytest.mark.anyio
async def test_a_turn_limit_cuts_the_reply_and_counts_it():
    limits = RolloutLimits(max_turn_tokens=1)
    done = await run_rollout(ScriptedPolicy([[5, 6, 7]]), EchoEnv(), limits=limits)
    assert done.transitions[0].ac.tokens == [5]
    assert done.transitions[0].metrics["num_truncations_max_turn_tokens"] == 1


@pytest.mark.anyio
async def test_a_hanging_env_is_cut_off_and_keeps_its_turns():
    limits = RolloutLimits(rollout_timeout_seconds=0.3)
    env = EchoEnv(num_turns=5, on_step=lambda turn: hang(turn) if turn == 1 else None)
    started = time.monotonic()
    done = await run_rollout(ScriptedPolicy(), env, limits=limits)
    assert time.monotonic() - started < 10
    assert done.stop_reason == "rollout_timeout"
    assert [turn.reward for turn in done.transitions] == [1.0, 0.0]


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["initial_observation", "sampling"])
async def test_a_hang_before_the_first_reply_is_recorded_as_that(where: str):
    class Stuck(EchoEnv):
        async def initial_observation(self):
            await asyncio.sleep(60 if where == "initial_observation" else 0)
            return await super().initial_observation()

    policy = ScriptedPolicy(delay_seconds=60 if where == "sampling" else 0)
    limits = RolloutLimits(rollout_timeout_seconds=0.1)
    group = await do_group_rollout(
        EnvsBuilder(lambda _: Stuck(), group_size=2, group_rewards=[0.0, 0.25]),
        policy,
        config=RolloutConfig(limits=limits),
    )
    assert [done.stop_reason for done in group.trajectories_G] == ["rollout_timeout"] * 2
    [turn] = group.trajectories_G[0].transitions
    assert (turn.ac.tokens, turn.reward, turn.episode_done) == ([], 0.0, True)
    assert turn.metrics == {"stop/rollout_timeout": 1}
    assert group.get_total_rewards() == [0.0, 0.25]
    assert trajectory_to_data(group.trajectories_G[0], 1.0) == []


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [None, 60.0])
@pytest.mark.parametrize("where", ["initial_observation", "step", "sampling of the second turn"])
async def test_a_timeout_that_is_not_of_the_limits_is_an_error(where: str, seconds: float | None):
    def fail() -> None:
        raise TimeoutError("the database did not answer")

    class Slow(EchoEnv):
        async def initial_observation(self):
            if where == "initial_observation":
                fail()
            return await super().initial_observation()

        async def step(self, action, *, extra=None):
            if where == "step":
                fail()
            return await super().step(action, extra=extra)

    class SlowPolicy(ScriptedPolicy):
        async def __call__(self, model_input, stop, **options):
            if where == "sampling of the second turn" and self.num_calls == 1:
                fail()
            return await super().__call__(model_input, stop, **options)

    limits = RolloutLimits(rollout_timeout_seconds=seconds)
    with pytest.raises(TimeoutError, match="the database did not answer"):
        await run_rollout(SlowPolicy(), Slow(num_turns=3), limits=limits)


@pytest.mark.anyio
async def test_slow_sampling_is_an_error():
    limits = RolloutLimits(sampling_turn_timeout_seconds=0.05)
    with pytest.raises(SamplingTurnTimeoutError, match=r"sampling_turn_timeout_seconds=0.05"):
        await run_rollout(ScriptedPolicy(delay_seconds=30), EchoEnv(), limits=limits)


@pytest.mark.anyio
@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None, "1"])
async def test_rewards_are_finite_numbers(reward):
    env = EchoEnv(reward=lambda turn: reward)
    with pytest.raises(DataValidationError, match=r"reward=.* of EchoEnv.step at turn 0"):
        await run_rollout(ScriptedPolicy(), env)


@pytest.mark.anyio
async def test_a_first_prompt_over_the_limit_is_recorded_as_that():
    class Full(ScriptedPolicy):
        async def __call__(self, model_input, stop, *, max_tokens=None):
            raise ContextOverflowError("prompt of 3 tokens is too long")

    limits = RolloutLimits(max_trajectory_tokens=2)
    over_limit = await run_rollout(ScriptedPolicy(), EchoEnv(), limits=limits)
    assert over_limit.stop_reason == "context_overflow"
    assert over_limit.final_ob.to_ints() == [1, 2, 3]
    [turn] = over_limit.transitions
    assert (turn.ac.tokens, turn.metrics) == ([], {"stop/context_overflow": 1})
    with pytest.raises(ContextOverflowError, match="is too long"):
        await run_rollout(Full(), EchoEnv())


@pytest.mark.anyio
async def test_an_env_may_give_up_before_the_first_turn():
    class TooLong(EchoEnv):
        async def initial_observation(self):
            return InitialObservationOverflow(reward=-0.5, metrics={"too_long": 1})

    done = await run_rollout(ScriptedPolicy(), TooLong())
    assert done.stop_reason == "context_overflow"
    assert sum(turn.reward for turn in done.transitions) == -0.5
    assert not any(turn.ac.tokens for turn in done.transitions)


@pytest.mark.anyio
async def test_an_env_that_returns_something_else_is_told():
    class Wrong(EchoEnv):
        async def step(self, action, *, extra=None):
            return 1.0, True

    with pytest.raises(
        DataValidationError, match=r"Wrong.step returned tuple; return a StepResult"
    ):
        await run_rollout(ScriptedPolicy(), Wrong())


@pytest.mark.parametrize("bad", [0, -1])
def test_limits_are_positive(bad: int):
    with pytest.raises(ConfigurationError, match=f"max_turns={bad} must be greater than 0"):
        RolloutLimits(max_turns=bad)


# ---- groups ----


def flaky(index: int, *, num_failing: int) -> Env:
    """The first `num_failing` environments fail, later ones work."""
    return EchoEnv(on_step=raise_in if index < num_failing else do_nothing)


@pytest.mark.anyio
async def test_fail_fast_raises_the_envs_own_error():
    builder = EnvsBuilder(partial(flaky, num_failing=1))
    with pytest.raises(ZeroDivisionError, match="1/0"):
        await do_group_rollout(builder, ScriptedPolicy(), FailFast())
    assert builder.num_cleanups == 1


@pytest.mark.anyio
async def test_retry_completes_the_group_and_records_the_cause():
    builder = EnvsBuilder(partial(flaky, num_failing=2))
    group = await do_group_rollout(builder, ScriptedPolicy(), RetryOnFailure(max_retries=3))
    assert len(group.trajectories_G) == 4
    assert [error.error_type for error in group.rollout_errors] == ["ZeroDivisionError"] * 2
    assert "EchoEnv" in group.rollout_errors[0].error_message
    assert "test_rollouts.py:" in group.rollout_errors[0].error_message
    assert builder.num_cleanups == 1


class OnceOnly(EnvsBuilder):
    """Cannot make a second set of environments, or makes a smaller one."""

    again: str = "raises"

    async def make_envs(self):
        if self.num_made and self.again == "raises":
            raise OSError("the seats are taken")
        envs = await super().make_envs()
        return envs if self.num_made == self.group_size else envs[:1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("again", "cause"),
    [
        ("raises", "OnceOnly: OSError .*the seats are taken"),
        ("fewer", "make_envs returned 1 environments for a retry and 4 before"),
    ],
)
async def test_a_retry_that_cannot_be_made_costs_one_member(again: str, cause: str):
    def make(index: int) -> Env:
        return EchoEnv(on_step=raise_in if index == 2 else do_nothing)

    builder = OnceOnly(make)
    builder.again = again
    group = await do_group_rollout(builder, ScriptedPolicy(), MinViableGroup(max_retries=2))
    assert len(group.trajectories_G) == 3
    messages = [error.error_message for error in group.rollout_errors]
    assert len(messages) == 3  # the rollout, and each of the two retries
    assert "reward is 1/0" in messages[0]
    assert all(re.search(cause, message) for message in messages[1:])
    builder = OnceOnly(make)
    builder.again = again
    with pytest.raises(AllTrajectoriesFailedError, match=cause):
        await do_group_rollout(builder, ScriptedPolicy(), RetryOnFailure(max_retries=1))


@pytest.mark.anyio
async def test_retries_are_limited():
    builder = EnvsBuilder(partial(flaky, num_failing=99))
    with pytest.raises(AllTrajectoriesFailedError, match=r"2 retries.*reward is 1/0"):
        await do_group_rollout(builder, ScriptedPolicy(), RetryOnFailure(max_retries=2))


@pytest.mark.anyio
async def test_a_viable_group_goes_on_without_the_failed():
    builder = EnvsBuilder(partial(flaky, num_failing=1))
    group = await do_group_rollout(builder, ScriptedPolicy(), MinViableGroup(max_retries=0))
    assert len(group.trajectories_G) == len(group.final_rewards_G) == len(group.metrics_G) == 3
    too_few = EnvsBuilder(partial(flaky, num_failing=2))
    with pytest.raises(AllTrajectoriesFailedError, match="2 of 4 rollouts of a group succeeded, 3"):
        await do_group_rollout(too_few, ScriptedPolicy(), MinViableGroup(max_retries=0))


@pytest.mark.anyio
async def test_a_rollout_that_hangs_counts_as_failed():
    def make(index: int) -> Env:
        return EchoEnv(on_step=hang if index == 0 else do_nothing)

    strategy = MinViableGroup(max_retries=0, per_rollout_timeout=0.3)
    group = await do_group_rollout(EnvsBuilder(make), ScriptedPolicy(), strategy)
    assert len(group.trajectories_G) == 3
    assert "longer than per_rollout_timeout=0.3" in group.rollout_errors[0].error_message


@pytest.mark.anyio
async def test_members_run_at_once():
    started = time.monotonic()
    builder = EnvsBuilder(lambda _: EchoEnv(num_turns=2), group_size=50)
    await do_group_rollout(builder, ScriptedPolicy(delay_seconds=0.2))
    assert time.monotonic() - started < 10  # 20 seconds in sequence


@pytest.mark.anyio
async def test_an_empty_group_is_refused():
    builder = EnvsBuilder(lambda _: EchoEnv(), group_size=0)
    with pytest.raises(ConfigurationError, match=r"EnvsBuilder.make_envs returned no environment"):
        await do_group_rollout(builder, ScriptedPolicy())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "returned 1 rewards for 4 trajectories"),
        ([0.0, float("nan"), 0.0, 0.0], r"reward=nan of EnvsBuilder.compute_group_rewards"),
    ],
)
async def test_group_rewards_are_checked(rewards: list[float], message: str):
    builder = EnvsBuilder(lambda _: EchoEnv(), group_rewards=rewards)
    with pytest.raises(DataValidationError, match=message):
        await do_group_rollout(builder, ScriptedPolicy())


@pytest.mark.anyio
async def test_a_failing_group_is_left_out_and_counted():
    class Broken(EnvsBuilder):
        async def make_envs(self):
            raise OSError("the database is gone")

    settings = RolloutSettings(MinViableGroup())
    group = await rollout_group(Broken(lambda _: EchoEnv()), ScriptedPolicy(), settings)
    assert group.trajectories_G == []
    assert "the database is gone" in group.rollout_errors[0].error_message
    counter = RolloutErrorCounter()
    counter.ingest(group)
    assert counter.get_metrics() == {
        "rollout_errors/OSError": 1.0,
        "rollout_errors/total": 1.0,
        "rollout_errors/groups_failed": 1.0,
    }
    with pytest.raises(OSError, match="database"):
        await rollout_group(
            Broken(lambda _: EchoEnv()), ScriptedPolicy(), RolloutSettings(FailFast())
        )


@pytest.mark.anyio
async def test_a_hanging_grader_costs_its_group_only():
    class Slow(EnvsBuilder):
        async def compute_group_rewards(self, trajectory_group, env_group):
            await asyncio.sleep(60)
            return []

    termination = TerminationRewardPolicy(grader_timeout_seconds=0.1)
    settings = RolloutSettings(MinViableGroup(), RolloutConfig(termination=termination))
    group = await rollout_group(Slow(lambda _: EchoEnv()), ScriptedPolicy(), settings)
    assert group.trajectories_G == []
    assert group.rollout_errors[0].error_type == "TimeoutError"


@pytest.mark.anyio
async def test_no_reward_at_a_limit_if_so_wanted():
    config = RolloutConfig(
        limits=RolloutLimits(max_turns=1),
        termination=TerminationRewardPolicy(zero_reward_on_limit=True),
    )
    builder = EnvsBuilder(lambda _: EchoEnv(num_turns=2), group_rewards=[1.0] * 4)
    group = await do_group_rollout(builder, ScriptedPolicy(), config=config)
    assert group.get_total_rewards() == [0.0] * 4


def test_tolerance_setting():
    assert rollout_strategy_from_config(False) == FailFast()
    assert rollout_strategy_from_config(True) == RetryOnFailure()
    assert rollout_strategy_from_config(MinViableGroup()) == MinViableGroup()


# ---- executors ----


@dataclass
class PlainBuilder(EnvsBuilder):
    """Pickles: its parts are plain data and functions of this module."""


def make_plain(index: int) -> Env:
    return EchoEnv()


def make_blocking(index: int) -> Env:
    return EchoEnv(on_step=lambda turn: time.sleep(1.0))


@pytest.mark.anyio
async def test_groups_run_in_a_thread_so_that_a_blocking_env_holds_up_nobody():
    with ThreadPoolExecutor(2) as pool:
        set_rollout_executor(pool)
        try:
            blocking = PlainBuilder(make_blocking, group_size=1)
            work = asyncio.create_task(rollout_group(blocking, ScriptedPolicy(), RolloutSettings()))
            ticks = 0
            while not work.done():
                await asyncio.sleep(0.02)
                ticks += 1
            assert ticks > 10
            assert len((await work).trajectories_G) == 1
        finally:
            set_rollout_executor(None)


@pytest.mark.anyio
async def test_an_unpicklable_builder_is_refused_with_advice():
    with ThreadPoolExecutor(1) as pool:
        set_rollout_executor(pool)
        try:
            with pytest.raises(ConfigurationError, match=r"builder EnvsBuilder cannot be pickled"):
                await rollout_group(
                    EnvsBuilder(lambda _: EchoEnv()), ScriptedPolicy(), RolloutSettings()
                )
        finally:
            set_rollout_executor(None)


def test_process_pools_that_fork_are_refused():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        pytest.raises(ConfigurationError, match="spawn"),
    ):
        set_rollout_executor(pool)


def test_builders_pickle():
    group = EnvsBuilder(make_plain)
    assert pickle.loads(pickle.dumps(group)) == group
