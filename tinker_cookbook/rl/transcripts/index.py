"""The index of a run's transcript pages, and the links between pages.

A page is `iteration_NNNNNN/NAME.html`; the index is `transcripts.html` in the run directory. What
the index shows about a page is stored in the head of the page, so that the index can be rebuilt
from the pages alone.
"""

from __future__ import annotations

import glob
import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from tinker_cookbook.rl.transcripts.style import STYLE
from tinker_cookbook.utils.durable_files import write_atomically

__all__ = ["INDEX_FILE", "PageSummary", "link_pages", "navigation", "summary_tag", "write_index"]

INDEX_FILE = "transcripts.html"
SUMMARY_BYTES = 2000
"""The summary of a page is within its first bytes."""
_STEP_FOLDER = re.compile(r"iteration_(\d{6,})")
_SUMMARY = re.compile(r'<meta name="transcript" content="([^"]*)">')
_NEXT = re.compile(r'<span class="next">.*?</span>')


@dataclass(frozen=True)
class PageSummary:
    """The row of a page in the index."""

    step: int
    num_replies: int
    """Number of replies. All numbers here count the whole batch, not only the groups shown."""
    mean_reward: float | None
    """Mean reward; None without replies."""
    num_cut: int
    """Number of episodes whose last reply the token limit cut."""


def summary_tag(summary: PageSummary) -> str:
    """Return the summary as an element of the head of a page."""
    text = html.escape(json.dumps(asdict(summary)))
    return f'<meta name="transcript" content="{text}">'


def navigation(page: Path) -> str:
    """Return links to the index and to the neighbouring steps; "" for a page outside a run.

    Args:
        page: The path of the page, which may not exist yet.
    """
    if _step_of(page) is None:
        return ""
    before, after = _neighbours(page)
    links = [f'<a href="../{INDEX_FILE}">all steps</a>']
    if before is not None:
        links.append(_link(before, "previous", "\N{LEFTWARDS ARROW} step"))
    following = "" if after is None else _link(after, "next", "next: step")
    return f'<nav aria-label="Steps">{" ".join(links)} <span class="next">{following}</span></nav>'


def link_pages(page: Path) -> None:
    """Add a link to this page to the page of the previous step, which was written before it."""
    before = _neighbours(page)[0]
    if before is None:
        return
    text = before.read_text(encoding="utf-8")
    link = f'<span class="next">{_link(page, "next", "next: step")}</span>'
    changed = _NEXT.sub(lambda _: link, text, count=1)
    if changed != text:
        write_atomically(before, changed)


def write_index(page: Path) -> None:
    """Update the index after a page was written; do nothing outside a run."""
    if _step_of(page) is None:
        return
    folder = page.parent.parent
    known = _known_rows(folder / INDEX_FILE)
    known.pop(_address(page), None)
    rows: dict[str, list[str]] = {}
    for path in _pages(folder, "*"):  # some pages have no summary: charts, reports
        row = known.get(_address(path)) or _row(path)
        if row is not None:
            rows.setdefault(path.stem, []).append(row)
    write_atomically(folder / INDEX_FILE, _build_index(folder.name, rows))


def _step_of(page: Path) -> int | None:
    found = _STEP_FOLDER.fullmatch(page.parent.name)
    return None if found is None else int(found[1])


def _address(page: Path) -> str:
    return f"{page.parent.name}/{page.name}"


def _pages(folder: Path, pattern: str) -> list[Path]:
    """Return the pages of a run in the order of their steps."""
    found = [(_step_of(path), path) for path in folder.glob(f"iteration_*/{pattern}.html")]
    return [path for step, path in sorted(item for item in found if item[0] is not None)]


def _neighbours(page: Path) -> tuple[Path | None, Path | None]:
    """Return the pages of the same name of the previous and the next step."""
    step = _step_of(page)
    if step is None:
        return None, None
    others = {_step_of(path): path for path in _pages(page.parent.parent, glob.escape(page.stem))}
    before = max((other for other in others if other is not None and other < step), default=None)
    after = min((other for other in others if other is not None and other > step), default=None)
    return others.get(before), others.get(after)


def _link(page: Path, relation: str, words: str) -> str:
    address = html.escape(f"../{quote(_address(page))}")
    return f'<a rel="{relation}" href="{address}">{words} {_step_of(page)}</a>'


def _known_rows(index: Path) -> dict[str, str]:
    """Return the rows of the existing index by the address of their page."""
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    rows = re.findall(r'<tr data-page="[^"]*">.*?</tr>', text)
    return {html.unescape(row.split('"', 2)[1]): row for row in rows}


def _row(page: Path) -> str | None:
    """Return the row of a page; None for a page without a summary."""
    try:
        with page.open(encoding="utf-8", errors="replace") as file:
            found = _SUMMARY.search(file.read(SUMMARY_BYTES))
        summary = None if found is None else PageSummary(**json.loads(html.unescape(found[1])))
    except (OSError, ValueError, TypeError):
        return None
    if summary is None:
        return None
    address = html.escape(_address(page))
    reward = summary.mean_reward
    cells = [
        f'<a href="{quote(_address(page))}">step {summary.step}</a>',
        "\N{EN DASH}" if reward is None or not math.isfinite(reward) else f"{reward:.3f}",
        str(summary.num_replies),
        str(summary.num_cut),
    ]
    return f'<tr data-page="{address}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _build_index(run: str, rows: dict[str, list[str]]) -> str:
    title = html.escape(f"Transcripts of {run}")
    names = sorted(rows, key=lambda name: (name != "train", name))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(line for name in names for line in _table(name, rows[name]))
        + "\n</body></html>\n"
    )


def _table(name: str, rows: Sequence[str]) -> Iterator[str]:
    heads = ("Step", "Mean reward", "Replies", "Cut by the token limit")
    yield f"<h2>{html.escape(name.removeprefix('eval_'))}</h2>"
    yield '<table class="steps"><thead><tr>'
    yield "".join(f'<th scope="col">{head}</th>' for head in heads)
    yield "</tr></thead><tbody>"
    yield from rows
    yield "</tbody></table>"
