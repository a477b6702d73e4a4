"""The rollouts of a step as one HTML page that needs no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.rl.advantages import AdvantageEstimator
from tinker_cookbook.rl.data_processing import compute_advantages
from tinker_cookbook.rl.logged_reports import write_logged_reports
from tinker_cookbook.rl.rollout_logging import (
    RolloutSummaryExportConfig,
    RolloutSummaryGroup,
    extends,
    new_prompt_text,
    rollout_summaries_jsonl_path,
    write_rollout_summaries_jsonl_from_groups,
)
from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup, Transition
from tinker_cookbook.utils.disk_errors import optional_file

if TYPE_CHECKING:
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["build_page", "write_transcripts"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
details { border: 1px solid #d0d7de; border-radius: 6px; margin: .4rem 0; padding: .2rem .7rem }
summary { cursor: pointer; padding: .25rem 0 } summary b { font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; padding: .5rem .7rem;
      background: #f6f8fa; border-radius: 4px; font: 13px/1.55 ui-monospace, monospace }
pre.reply { background: #fff; border: 1px solid #d0d7de }
table { border-collapse: collapse; margin: .2rem 0 .6rem; font-size: .9rem }
tr { display: inline-block; margin-right: 1.4rem } td { padding: .1rem .5rem .1rem 0 }
td:first-child { color: #57606a }
td:last-child { font-variant-numeric: tabular-nums; white-space: pre-wrap }
.good { color: #116329 } .bad { color: #a40e26 } .note { color: #57606a }
h2 span { font-weight: normal } details[open] > summary .said { display: none }
pre.reply + .note { margin: -.2rem 0 .3rem; font-size: .85rem }
.said { display: block; margin-left: 1.1rem; overflow: hidden; text-overflow: ellipsis;
        white-space: nowrap; font: 13px/1.55 ui-monospace, monospace; color: #57606a }
""".strip()
SAID_CHARACTERS = 160
PREFIX_BREAK = (
    "This prompt does not begin with the tokens of the turn before: trained on as a record of its "
    "own, at its whole length."
)


def write_transcripts(
    export: RolloutSummaryExportConfig,
    groups_P: Sequence[RolloutSummaryGroup],
    *,
    num_groups_on_page: int,
    estimator: AdvantageEstimator = "group_mean",
) -> None:
    """Write all rollouts of a batch as JSON lines, and the first groups as a page.

    Args:
        export: Where to; nothing is written without a folder, and no page without a tokenizer.
        groups_P: All groups.
        num_groups_on_page: Groups on the page; 0: no page.
        estimator: Of the advantages on the page.
    """
    if export.folder is None:
        return
    title = f"{export.split}, step {export.iteration}"
    shown_P = groups_P[:num_groups_on_page]
    rows_path = rollout_summaries_jsonl_path(export.folder, export.base_name)
    with optional_file(rows_path):
        write_rollout_summaries_jsonl_from_groups(
            rows_path,
            split=export.split,
            iteration=export.iteration,
            groups_P=groups_P,
            tokenizer=export.tokenizer,
        )
    logged = write_logged_reports(Path(export.folder), export.base_name, title, shown_P)
    if num_groups_on_page and export.tokenizer is not None:
        page = build_page(
            title,
            shown_P,
            len(groups_P),
            export.tokenizer,
            estimator=estimator,
            logged_page=logged,
        )
        page_path = Path(export.folder) / f"{export.base_name}.html"
        with optional_file(page_path):
            page_path.write_text(page, encoding="utf-8")


def build_page(
    title: str,
    shown_P: Sequence[RolloutSummaryGroup],
    num_groups: int,
    tokenizer: Tokenizer,
    *,
    estimator: AdvantageEstimator = "group_mean",
    logged_page: str | None = None,
) -> str:
    """The page as text.

    Args:
        title: Heading.
        shown_P: Groups on the page.
        num_groups: Groups of the whole batch.
        tokenizer: Turns tokens into text.
        estimator: Of the advantages, which are shown without KL penalty and length handling.
        logged_page: File beside this one with what the environments logged.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    if logged_page is not None:
        body.append(f'<p><a href="{html.escape(logged_page)}">What the environments logged</a></p>')
    body.append(
        f'<p class="note">{len(shown_P)} of {num_groups} groups, {_means(shown_P)}. A sampled '
        "token is the darker orange the less likely it was; point at it for its log probability. "
        "An advantage above 0 makes a reply likelier.</p>"
    )
    for index, item in enumerate(shown_P):
        body += _group(index, item, tokenizer, estimator)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _group(
    index: int, item: RolloutSummaryGroup, tokenizer: Tokenizer, estimator: AdvantageEstimator
) -> Iterator[str]:
    group = item.trajectory_group
    tags = f" ({', '.join(map(html.escape, item.tags))})" if item.tags else ""
    yield f'<h2>Group {index}{tags} <span class="note">{_spread(group)}</span></h2>'
    for error in group.rollout_errors:
        yield f'<p class="bad">lost rollout: {html.escape(error.error_message)}</p>'
    if not group.trajectories_G:
        return
    (advantages_G,) = compute_advantages([group], estimator=estimator)
    rewards_G = group.get_total_rewards()
    for number, trajectory in enumerate(group.trajectories_G):
        advantage = float(advantages_G[number])
        side = "good" if advantage > 0 else "bad" if advantage < 0 else "note"
        yield f"<details{' open' if number == 0 else ''}><summary>"
        yield (
            f"trajectory {number}: reward <b>{rewards_G[number]:.3f}</b>, advantage "
            f'<b class="{side}">{advantage:+.3f}</b>, {_count(trajectory.transitions, "turn")}, '
            f"{html.escape(str(trajectory.stop_reason))}"
            f'<span class="said">{html.escape(_said(trajectory, tokenizer))}</span></summary>'
        )
        yield from _turns(trajectory, tokenizer)
        final = {"group reward": group.final_rewards_G[number], **group.metrics_G[number]}
        yield _table(final)
        yield "</details>"


def _means(shown_P: Sequence[RolloutSummaryGroup]) -> str:
    rewards = [r for item in shown_P for r in item.trajectory_group.get_total_rewards()]
    if not rewards:
        return "no trajectory"
    return f"{_count(rewards, 'reply', 'replies')}, mean reward {sum(rewards) / len(rewards):.3f}"


def _spread(group: TrajectoryGroup) -> str:
    """Whether the group can teach anything."""
    rewards = group.get_total_rewards()
    if not rewards:
        return "lost"
    if min(rewards) == max(rewards):
        return f"every reward {rewards[0]:.3f}: nothing to learn from"
    mean = sum(rewards) / len(rewards)
    return f"reward {min(rewards):.3f} to {max(rewards):.3f}, mean {mean:.3f}"


def _said(trajectory: Trajectory, tokenizer: Tokenizer) -> str:
    """The last reply in one line, to be read without opening the trajectory."""
    if not trajectory.transitions:
        return ""
    text = str(tokenizer.decode(trajectory.transitions[-1].ac.tokens))
    return " ".join(text.split())[:SAID_CHARACTERS]


def _count(things: Sequence[object], one: str, many: str | None = None) -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"


def _turns(trajectory: Trajectory, tokenizer: Tokenizer) -> Iterator[str]:
    before: Transition | None = None
    for turn in trajectory.transitions:
        if before is not None and not extends(turn, before):
            yield f'<p class="bad">{PREFIX_BREAK}</p>'
        yield f"<pre>{html.escape(new_prompt_text(turn, before, tokenizer))}</pre>"
        yield f'<pre class="reply">{_tokens(turn, tokenizer)}</pre>'
        yield f'<p class="note">{_about(turn)}</p>'
        yield _table({"reward": turn.reward, **turn.metrics, **turn.logs})
        before = turn


def _about(turn: Transition) -> str:
    """How long and how likely a reply is, and whether it was cut."""
    text = _count(turn.ac.tokens, "token")
    logprobs = turn.ac.maybe_logprobs
    if logprobs:
        text += f", {sum(logprobs) / len(logprobs):.2f} nats each on average"
    if turn.ac.stop_reason == "length":
        text += ', <span class="bad">cut by the token limit</span>'
    return text


def _tokens(turn: Transition, tokenizer: Tokenizer) -> str:
    """Each sampled token in a span; bytes that make a character only together share one."""
    logprobs = turn.ac.maybe_logprobs or [math.nan] * len(turn.ac.tokens)
    spans: list[str] = []
    pending: list[tuple[int, float]] = []
    for token, logprob in zip(turn.ac.tokens, logprobs, strict=True):
        pending.append((token, logprob))
        text = str(tokenizer.decode([token for token, _ in pending]))
        if text.endswith("\ufffd") and len(pending) < 8:
            continue
        spans.append(_span(text, pending))
        pending = []
    if pending:
        spans.append(_span(str(tokenizer.decode([token for token, _ in pending])), pending))
    return "".join(spans)


def _span(text: str, tokens: list[tuple[int, float]]) -> str:
    logprob = sum(value for _, value in tokens)
    if math.isnan(logprob):
        return f"<span>{html.escape(text)}</span>"
    shade = 1.0 - math.exp(max(logprob, -50.0))
    note = ", ".join(f"{token}: {value:.3f}" for token, value in tokens)
    return (
        f'<span title="{note}" style="background:rgba(255,140,0,{0.55 * shade:.2f})">'
        f"{html.escape(text)}</span>"
    )


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(_show(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>{rows}</table>"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
