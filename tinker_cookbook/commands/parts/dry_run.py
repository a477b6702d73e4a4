"""What `dry_run=true` prints: the work of a run and its memory, before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tinker_cookbook import service
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.directory import holds_a_run
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.utils.byte_sizes import format_bytes
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

if TYPE_CHECKING:
    from tinker_cookbook.local.plan import StepWork
    from tinker_cookbook.runs.workload import Workload
    from tinker_cookbook.utils.cost_estimation import TokenUsage

__all__ = ["print_dry_run"]


def print_dry_run(
    loop: SharedOptions,
    *,
    prepares: bool = False,
    train: Callable[[Any], object] | None = None,
) -> None:
    """Count the work of a train loop and print it.

    Args:
        loop: The settings of the loop.
        prepares: Whether the recipe does something else before the loop, which is not counted.
        train: Runs a train loop, for `dry_run_probe`.
    """
    from tinker_cookbook.preference import train_dpo, train_kto, train_pointwise
    from tinker_cookbook.rl import train as rl_train
    from tinker_cookbook.supervised import train as sl_train

    if isinstance(loop, sl_train.Config):
        work = sl_train.count_work(loop)
        lines = _supervised_lines(work)
    elif isinstance(loop, train_dpo.Config):
        work = train_dpo.count_work(loop)
        lines = _preference_lines(work, "pairs of sequences")
    elif isinstance(loop, train_kto.Config):
        work = train_kto.count_work(loop)
        lines = _preference_lines(work, "replies, each with a mismatched one")
    elif isinstance(loop, train_pointwise.Config):
        work = train_pointwise.count_work(loop)
        lines = _judge_lines(work)
    elif isinstance(loop, rl_train.Config):
        work = asyncio.run(rl_train.count_work(loop))
        lines = _rl_lines(loop, work)
    else:
        raise ConfigurationError(
            "dry_run=true is not supported by this recipe; it is for recipes that train with "
            "supervised.train, preference.train_dpo, preference.train_kto, "
            "preference.train_pointwise or rl.train."
        )
    choice = service.choose_service(loop.base_url)
    assert loop.log_path is not None, "a recipe chooses the run directory"
    state = "holds a run" if holds_a_run(loop.log_path) else "new"
    print(choice.describe(str(loop.model_name)))
    print(f"run      {loop.log_path}  ({state})")
    print(*lines, _rate_line(loop, work), sep="\n")
    if choice.kind == "local":
        print(*_memory_lines(loop, work), sep="\n")
    print(*_time_lines(loop, work, train), sep="\n")
    if choice.kind == "hosted" or loop.prices is not None:
        print(*_cost_lines(loop, work), sep="\n")
    if prepares:
        print("before   this recipe also prepares the model, which is not counted here")
    started = "Only the probe was run" if loop.dry_run_probe else "Nothing was started"
    print(f"\n{started}. Without dry_run=true the same command trains.")


def _supervised_lines(work: Workload) -> Iterator[str]:
    yield from (f"data     {line}" for line in work.notes)
    if work.example is not None:
        yield work.example
    yield f"rows     {work.num_rows:,} sequences in {work.total_steps:,} steps"
    yield (
        f"tokens   {work.num_tokens:,} in all steps, {work.num_loss_tokens:,} of them trained; "
        f"the longest sequence has {work.longest:,}"
    )


def _preference_lines(work: Workload, rows: str) -> Iterator[str]:
    yield from (f"data     {line}" for line in work.notes)
    if work.example is not None:
        yield work.example
    yield f"rows     {work.num_rows // 2:,} {rows}, in {work.total_steps:,} steps"
    yield (
        f"tokens   {work.num_tokens:,} in all steps, {work.num_loss_tokens:,} of them in "
        f"completions; the longest sequence has {work.longest:,}"
    )
    yield "before   the reference scores each sequence once, which is not counted here"


def _judge_lines(work: Workload) -> Iterator[str]:
    yield from (f"data     {line}" for line in work.notes)
    yield f"rows     {work.num_rows // 2:,} comparisons in {work.total_steps:,} steps"
    yield (
        f"tokens   {work.num_tokens:,} in all steps, each completion with its conversation; the "
        f"longest has {work.longest:,}"
    )


def _rl_lines(loop: SharedOptions, work: Workload) -> Iterator[str]:
    size, max_tokens = _episode_sizes(loop)
    line = f"rows     {work.num_rows:,} groups in {work.total_steps:,} steps"
    if size is not None:
        line += f", {work.num_rows * size:,} episodes"
    if work.num_held_out_episodes:
        line += f"; {work.num_held_out_episodes:,} held-out episodes per evaluation"
    yield line
    if size is not None and max_tokens is not None:
        most = work.num_rows * size * max_tokens
        yield f"tokens   sampled: at most {most:,} per turn of an episode ({max_tokens} each)"


def _episode_sizes(loop: SharedOptions) -> tuple[int | None, int | None]:
    """Return the episodes of a group and the maximum tokens of a turn; None where unknown."""
    size = getattr(getattr(loop, "dataset_builder", None), "group_size", None)
    max_tokens = getattr(loop, "max_tokens", None)
    return (
        size if isinstance(size, int) else None,
        max_tokens if isinstance(max_tokens, int) else None,
    )


def _rate_line(loop: SharedOptions, work: Workload) -> str:
    def rate(step: int) -> str:
        multiplier = compute_schedule_lr_multiplier(
            loop.lr_schedule, step, work.total_steps, warmup_steps=loop.warmup_steps
        )
        return f"{loop.learning_rate * multiplier:.3g}"

    last = work.total_steps - 1
    return (
        f"rate     {rate(0)} in the first step, {rate(last)} in the last ({loop.lr_schedule} from "
        f"{loop.learning_rate:.3g}, {loop.warmup_steps} warmup steps)"
    )


def _time_lines(
    loop: SharedOptions, work: Workload, train: Callable[[Any], object] | None
) -> Iterator[str]:
    from tinker_cookbook.commands.parts import time_estimate

    if loop.dry_run_probe and train is not None:
        print("time     measuring ...", flush=True)
        times = time_estimate.probe_times(loop, train)
    else:
        times = time_estimate.find_recorded_times(loop)
    if times is None:
        yield "time     no complete run like this one is recorded; dry_run_probe=true measures it"
        return
    seconds = time_estimate.estimate_seconds(times, loop, work)
    yield time_estimate.describe_time(times, seconds, work)


def _cost_lines(loop: SharedOptions, work: Workload) -> Iterator[str]:
    """Return the cost on a hosted service; prices are fetched only if the user asks for it."""
    from tinker_cookbook.utils import cost_estimation

    usage = _most_usage(loop, work)
    if usage is None:
        yield "cost     the number of tokens is not known before the run"
        return
    if loop.prices is None:
        yield (
            f"cost     at most {usage.trained:,} tokens trained and {usage.sampled:,} sampled; "
            "prices=FILE (or prices=fetch) computes the price"
        )
        return
    model = str(loop.model_name)
    rates = cost_estimation.find_model_rates(loop.prices, model)
    if rates is None:
        yield f"cost     prices={loop.prices} has no prices of {model}"
        return
    word = "at most " if usage.sampled else ""
    yield (
        f"cost     {word}${rates.estimate_usd(usage):.2f} for {usage.trained:,} tokens trained, "
        f"{usage.sampled:,} sampled and {usage.prefill_uncached:,} of prompts; evaluations are "
        "not counted"
    )


def _most_usage(loop: SharedOptions, work: Workload) -> TokenUsage | None:
    """Return the tokens of the steps; for reinforcement learning, if no reply ends early."""
    from tinker_cookbook.utils.cost_estimation import TokenUsage

    if work.num_tokens is not None:
        return TokenUsage(trained=work.num_tokens)
    size, max_tokens = _episode_sizes(loop)
    if size is None or max_tokens is None:
        return None
    sampled = work.num_rows * size * max_tokens
    prompts = (work.num_prompt_tokens or 0) * size
    return TokenUsage(sampled=sampled, prefill_uncached=prompts, trained=sampled + prompts)


def _memory_lines(loop: SharedOptions, work: Workload) -> Iterator[str]:
    """Return the memory that the local service will use, from the shapes of the model and data."""
    from tinker_cookbook.model_files import resolve_model_folder
    from tinker_cookbook.preference import train_dpo, train_kto, train_pointwise
    from tinker_cookbook.service.embedded import check_local_extra
    from tinker_cookbook.unembedding import choose_train_unembed

    check_local_extra()
    from tinker_cookbook.local.engine.budget import KEPT_FORWARD_BYTES
    from tinker_cookbook.local.plan import MachineRates, build_plan

    model = str(loop.model_name)
    plan = build_plan(
        model,
        resolve_model_folder(model, weights=False),
        rank=loop.lora_rank,
        train_unembed=choose_train_unembed(model, loop.train_unembed),
        rates=MachineRates(1.0, 1.0),  # no speeds are printed
        step=_step_work(loop, work),
    )
    free = "unknown" if plan.free_bytes is None else format_bytes(plan.free_bytes)
    verdict = "" if plan.fits else "; MORE THAN IS FREE"
    yield f"memory   {format_bytes(plan.total_bytes)} on this machine, {free} free{verdict}"
    if isinstance(loop, train_dpo.Config | train_kto.Config | train_pointwise.Config):
        yield (
            f"         and up to {format_bytes(KEPT_FORWARD_BYTES)} more while much is free, for "
            "forward passes that are kept for the backward pass"
        )
    yield (
        f"longest  {plan.max_train_tokens:,} tokens can be trained in the free memory "
        f"({plan.dtype})"
    )


def _step_work(loop: SharedOptions, work: Workload) -> StepWork:
    """Return what a step computes; the number of trained tokens of RL is not known."""
    from tinker_cookbook.local.plan import StepWork

    if not work.total_steps:
        return StepWork()
    if work.num_tokens is not None:
        return StepWork(max(work.num_tokens // work.total_steps, work.longest or 0))
    size, max_tokens = _episode_sizes(loop)
    if size is None or max_tokens is None:
        return StepWork()
    return StepWork(
        sequences=work.num_rows * size // work.total_steps,
        held_out_sequences=work.num_held_out_episodes,
        reply_tokens=max_tokens,
        overlaps=getattr(loop, "async_config", None) is not None,
    )
