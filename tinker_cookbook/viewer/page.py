"""Build the page: for the server, or as one file that contains its data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path

from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.page_parts import fill_page
from tinker_cookbook.viewer.answers import Answers
from tinker_cookbook.viewer.columns import AXES

__all__ = ["build_page", "build_saved_page", "collect_data"]

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("source.js", "charts.js", "tables.js", "rollouts.js", "sweeps.js", "main.js")
LIBRARY = ("uPlot.min.css", "uPlot.iife.min.js")
SAVED_PARTS = 300
"""Intervals of a curve in a saved page; fewer with many runs."""
SAVED_STEPS = 8
"""Steps of a run whose rollouts and spans a saved page has: the first, the last, and others."""
SAVED_GROUPS = 8


def build_page(place: str, *, shows_all: bool = False) -> tuple[str, str]:
    """Return the page that asks a server for its data, and its content security policy.

    Args:
        place: Where the runs are; shown at the top.
        shows_all: Whether all runs are chosen at first, not only the newest.
    """
    text = _fill(place, shows_all).replace("<!-- policy -->\n", "").replace("<!-- data -->\n", "")
    return text, _policy(text, "connect-src 'self'; frame-ancestors 'none'")


def build_saved_page(data: Row, *, shows_all: bool = True) -> str:
    """Return the page with its data inside; it works without a server and a network.

    Args:
        data: The result of `collect_data`.
        shows_all: As above.
    """
    text = _fill(data["place"], shows_all)
    policy = html.escape(_policy(text, "connect-src 'none'"))
    text = text.replace(
        "<!-- policy -->", f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    packed = gzip.compress(json.dumps(data, ensure_ascii=False).encode(), mtime=0)
    block = base64.b64encode(packed).decode()
    return text.replace("<!-- data -->", f'<script id="data" type="text/plain">{block}</script>')


def collect_data(answers: Answers) -> Row:
    """Return everything that a saved page shows.

    Args:
        answers: Answers about the runs to save.
    """
    runs = answers.runs()
    ids = [run["id"] for run in runs]
    keys = answers.keys(ids)
    details = {run: answers.run(run) for run in ids}
    parts = max(50, SAVED_PARTS // max(1, len(ids) // 5))
    metrics = [*sorted({key for names in keys.values() for key in names}), *AXES]
    data: Row = {
        "place": answers.place(),
        "runs": runs,
        "keys": keys,
        "curves": answers.curves(ids, metrics, parts),
        "details": details,
        "evaluations": answers.evaluations(),
        "rollouts": {},
        "spans": {},
    }
    for run, detail in details.items():
        detail["iterations"] = _thin(detail["iterations"])
        detail["timed_steps"] = _thin(detail["timed_steps"])
        for each in detail["iterations"]:
            for split in each["splits"]:
                groups = answers.rollouts(run, each["step"], split)[:SAVED_GROUPS]
                data["rollouts"][_key(run, each["step"], split)] = groups
        for step in detail["timed_steps"]:
            data["spans"][_key(run, step)] = answers.spans(run, step)
    return data


def _thin(items: list) -> list:
    """Return at most SAVED_STEPS items, with the first and the last one."""
    if len(items) <= SAVED_STEPS:
        return items
    last = len(items) - 1
    return [items[round(number * last / (SAVED_STEPS - 1))] for number in range(SAVED_STEPS)]


def _key(*words: str | int) -> str:
    """Return the key that the page's script makes with `JSON.stringify`."""
    return json.dumps(words, ensure_ascii=False, separators=(",", ":"))


def _fill(place: str, shows_all: bool) -> str:
    text = (FOLDER / "page.html").read_text(encoding="utf-8")
    for name in (*SCRIPTS, "page.css"):
        text = text.replace(f"/* {name} */", (FOLDER / name).read_text(encoding="utf-8").rstrip())
    for name in LIBRARY:
        content = (FOLDER / "uplot" / name).read_text(encoding="utf-8").rstrip()
        text = text.replace(f"/* {name} */", content)
    chosen = ' data-all="yes"' if shows_all else ""
    start = f'<html lang="en" data-place="{html.escape(place)}"{chosen}>'
    return fill_page(text).replace('<html lang="en">', start, 1)


def _policy(text: str, more: str) -> str:
    """Return a policy: the page may run only its own script and style."""
    script, style = _hash_of(text, "script"), _hash_of(text, "style")
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
        f"base-uri 'none'; form-action 'none'; {more}"
    )


def _hash_of(text: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None, f"the page has one <{tag}>"
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
