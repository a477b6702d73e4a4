"""The rollouts of a step as one HTML page without other files."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.rl.algorithms import AdvantageEstimator
from tinker_cookbook.rl.data_processing import compute_advantages
from tinker_cookbook.rl.rollout_logging import (
    RolloutSummaryExportConfig,
    RolloutSummaryGroup,
    extends,
    new_prompt_text,
    rollout_summaries_jsonl_path,
    write_rollout_summaries_jsonl_from_groups,
)
from tinker_cookbook.rl.transcripts.index import (
    PageSummary,
    link_pages,
    navigation,
    summary_tag,
    write_index,
)
from tinker_cookbook.rl.transcripts.logged_reports import write_logged_reports
from tinker_cookbook.rl.transcripts.style import FILTER_SCRIPT, STYLE
from tinker_cookbook.rl.transcripts.token_rows import TOKENS_END, TrainedTokens, write_token_rows
from tinker_cookbook.rl.types import (
    STOP_METRIC_PREFIX,
    StopReason,
    Trajectory,
    TrajectoryGroup,
    Transition,
)
from tinker_cookbook.utils.disk_errors import optional_file

if TYPE_CHECKING:
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["build_page", "write_transcripts"]

SAID_CHARACTERS = 160
CUT = "cut by the token limit"
ENDINGS: dict[str, str] = {
    StopReason.COMPLETED: "completed",
    StopReason.TOOL_STOPPED: "ended by a tool",
    StopReason.MAX_TURNS: "out of turns",
    StopReason.MAX_TOKENS: "out of tokens for the episode",
    StopReason.MAX_SAMPLED_TOKENS: "out of tokens to sample",
    StopReason.MAX_TOOL_CALLS: "out of tool calls",
    StopReason.CONTEXT_OVERFLOW: "the prompt grew too long",
    StopReason.PARSE_ERROR: "unreadable reply",
    StopReason.ROLLOUT_TIMEOUT: "out of time",
}
"""Why an episode ended, in words."""
ENDED_BY_THE_CUT = (
    StopReason.COMPLETED,
    StopReason.MAX_TOKENS,
    StopReason.MAX_SAMPLED_TOKENS,
    StopReason.PARSE_ERROR,
)
"""The stop reasons that environments give an episode whose last reply was cut."""
PREFIX_BREAK = (
    "This prompt does not begin with the tokens of the turn before: it is trained on as a separate "
    "record, at its whole length."
)


def write_transcripts(
    export: RolloutSummaryExportConfig,
    groups_P: Sequence[RolloutSummaryGroup],
    *,
    num_groups_on_page: int,
    estimator: AdvantageEstimator = "group_mean",
    trained: Mapping[int, TrainedTokens] | None = None,
) -> None:
    """Write all rollouts of a batch as JSON lines, and the first groups as a page and by token.

    Args:
        export: What the batch is and where to write. Without a folder, nothing is written; without
            a tokenizer, only the JSON lines.
        groups_P: All groups.
        num_groups_on_page: Number of groups on the page; 0: do not write a page.
        estimator: Estimator of the advantages on the page.
        trained: The trainer's numbers of each trajectory, by its `id`; None for an evaluation.
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
        tokens_path = Path(export.folder) / f"{export.base_name}{TOKENS_END}"
        with optional_file(tokens_path):
            write_token_rows(tokens_path, shown_P, export.tokenizer, trained or {})
        page_path = Path(export.folder) / f"{export.base_name}.html"
        page = build_page(
            title,
            shown_P,
            len(groups_P),
            export.tokenizer,
            estimator=estimator,
            logged_page=logged,
            head=summary_tag(_summarize(export, groups_P)),
            links=navigation(page_path),
        )
        with optional_file(page_path):
            page_path.write_text(page, encoding="utf-8")
            link_pages(page_path)
            write_index(page_path)


def _summarize(
    export: RolloutSummaryExportConfig, groups_P: Sequence[RolloutSummaryGroup]
) -> PageSummary:
    rewards = [r for item in groups_P for r in item.trajectory_group.get_total_rewards()]
    endings = [
        _ending(trajectory)
        for item in groups_P
        for trajectory in item.trajectory_group.trajectories_G
    ]
    return PageSummary(
        step=export.iteration,
        num_replies=len(rewards),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        num_cut=sum(ending == CUT for ending in endings),
    )


def build_page(
    title: str,
    shown_P: Sequence[RolloutSummaryGroup],
    num_groups: int,
    tokenizer: Tokenizer,
    *,
    estimator: AdvantageEstimator = "group_mean",
    logged_page: str | None = None,
    head: str = "",
    links: str = "",
) -> str:
    """Return the page as text.

    Args:
        title: Heading of the page.
        shown_P: Groups on the page.
        num_groups: Number of groups of the whole batch.
        tokenizer: Decodes the tokens.
        estimator: Estimator of the advantages, which are shown without KL penalty and length
            normalization.
        logged_page: File in the same folder with the logs of the environments.
        head: Markup for the head of the page.
        links: Markup above and below the groups: links to other pages.
    """
    body = [links, f"<h1>{html.escape(title)}</h1>"]
    if logged_page is not None:
        body.append(f'<p><a href="{html.escape(logged_page)}">What the environments logged</a></p>')
    body.append(
        f'<p class="note">{len(shown_P)} of {num_groups} groups, {_means(shown_P)}. Darker '
        "orange marks less likely tokens; point at a token to see its log probability. Training "
        "makes replies with an advantage above 0 more likely.</p>"
    )
    body += _filter(shown_P)
    for index, item in enumerate(shown_P):
        body += ["<section>", *_group(index, item, tokenizer, estimator), "</section>"]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{FILTER_SCRIPT}</script>\n</body></html>\n"
    )


def _filter(shown_P: Sequence[RolloutSummaryGroup]) -> Iterator[str]:
    """Yield the filter form, which the script of the page shows."""
    endings = {_ending(t) for item in shown_P for t in item.trajectory_group.trajectories_G}
    yield '<form id="filter" hidden aria-label="Which replies are shown">'
    for name, words in (("least", "reward from"), ("most", "to")):
        yield f'<label>{words} <input name="{name}" type="number" step="any"></label>'
    yield '<label>ended <select name="ending"><option value="">any way</option>'
    yield from (f"<option>{html.escape(ending)}</option>" for ending in sorted(endings))
    yield '</select></label> <button type="reset">Show all</button>'
    yield '<span id="shown" class="note" role="status"></span></form>'


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
        ending = _ending(trajectory)
        yield (
            f'<details data-reward="{rewards_G[number]:.6g}" data-ending="{html.escape(ending)}"'
            f"{' open' if number == 0 else ''}><summary>"
        )
        yield (
            f"trajectory {number}: reward <b>{rewards_G[number]:.3f}</b>, advantage "
            f'<b class="{side}">{advantage:+.3f}</b>, {_count(trajectory.transitions, "turn")}, '
            f'<span class="{"bad" if CUT in ending else "end"}">{html.escape(ending)}</span>'
            f"{_cut_before(trajectory)}"
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
    """Describe the rewards of the group, and whether they give a gradient."""
    rewards = group.get_total_rewards()
    if not rewards:
        return "lost"
    if min(rewards) == max(rewards):
        return f"every reward {rewards[0]:.3f}: nothing to learn from"
    mean = sum(rewards) / len(rewards)
    return f"reward {min(rewards):.3f} to {max(rewards):.3f}, mean {mean:.3f}"


def _is_cut(turn: Transition) -> bool:
    """Return whether a reply was cut; the empty reply of an episode without turns was not."""
    return turn.ac.stop_reason == "length" and bool(turn.ac.tokens)


def _ending(trajectory: Trajectory) -> str:
    """Return in words why an episode ended, and whether its last reply was cut."""
    reason = trajectory.stop_reason
    words = "" if reason is None else ENDINGS.get(reason, reason.replace("_", " "))
    if not trajectory.transitions or not _is_cut(trajectory.transitions[-1]):
        return words or "no reason given"
    if not words or reason in ENDED_BY_THE_CUT:
        return CUT
    return f"{words}, its last reply {CUT}"


def _cut_before(trajectory: Trajectory) -> str:
    """Return in words how many replies before the last one were cut."""
    cut = [turn for turn in trajectory.transitions[:-1] if _is_cut(turn)]
    return f", {_count(cut, 'earlier reply', 'earlier replies')} {CUT}" if cut else ""


def _said(trajectory: Trajectory, tokenizer: Tokenizer) -> str:
    """Return the last reply in one line, which is shown while the trajectory is folded."""
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
        # The heading says how the episode ended, also where the last reply was cut.
        metrics = {k: v for k, v in turn.metrics.items() if not k.startswith(STOP_METRIC_PREFIX)}
        yield _table({"reward": turn.reward, **metrics, **turn.logs})
        before = turn


def _about(turn: Transition) -> str:
    """Describe a reply: its length, its mean log probability, and whether it was cut."""
    text = _count(turn.ac.tokens, "token")
    logprobs = turn.ac.maybe_logprobs
    if logprobs:
        text += f", {sum(logprobs) / len(logprobs):.2f} nats each on average"
    if _is_cut(turn):
        text += f', <span class="bad">{CUT}</span>'
    return text


def _tokens(turn: Transition, tokenizer: Tokenizer) -> str:
    """Put each sampled token into a span; tokens that are parts of one character share a span."""
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


def _table(values: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(_show(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>{rows}</table>"


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
