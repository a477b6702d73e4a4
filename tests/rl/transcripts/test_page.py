"""Transcript pages: how episodes ended, the list of the steps, links between them, the filter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tinker

from tests.assets import load_tokenizer
from tests.browsers import open_browser
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl.rollout_logging import RolloutSummaryExportConfig, RolloutSummaryGroup
from tinker_cookbook.rl.transcripts.index import INDEX_FILE
from tinker_cookbook.rl.transcripts.page import build_page, write_transcripts
from tinker_cookbook.rl.types import StopReason, Trajectory, TrajectoryGroup, Transition
from tinker_cookbook.utils.misc_utils import iteration_dir

HOSTILE = '<img src=x onerror=alert(1)>"&'


def episode(
    *cuts: bool, reason: str | None = StopReason.COMPLETED, reward: float = 1.0, tokens: int = 3
) -> Trajectory:
    """One reply for each of `cuts`: whether it was cut by the token limit."""
    turns = [
        Transition(
            ob=tinker.ModelInput.from_ints([10, 11]),
            ac=TokensWithLogprobs([20] * tokens, [-1.0] * tokens, "length" if cut else "stop"),
            reward=reward / len(cuts),
            episode_done=number == len(cuts) - 1,
        )
        for number, cut in enumerate(cuts)
    ]
    if reason is not None:
        turns[-1].metrics[f"stop/{reason}"] = 1
    return Trajectory(turns, tinker.ModelInput.empty(), reason)


def group_of(*episodes: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup(list(episodes), [0.0] * len(episodes), [{} for _ in episodes])


def page_of(*episodes: Trajectory) -> str:
    items = [RolloutSummaryGroup(group_of(*episodes), [HOSTILE])]
    return build_page(HOSTILE, items, 1, load_tokenizer("qwen3"))


def write(
    run: Path, step: int, *groups: TrajectoryGroup, name: str = "train", shown: int = 4
) -> Path:
    folder = iteration_dir(run, step)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    export = RolloutSummaryExportConfig(
        name, step, name, folder=folder, tokenizer=load_tokenizer("qwen3")
    )
    items = [RolloutSummaryGroup(group, []) for group in groups]
    write_transcripts(export, items, num_groups_on_page=shown)
    return folder / f"{name}.html"


class Page(HTMLParser):
    """Links, addresses of other files, and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: dict[str, Path] = {}
        self.tags: list[str] = []
        self.sources: list[str] = []
        self._at = path.parent
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.sources += [values[key] or "" for key in ("src", "srcset", "data") if key in values]
        if tag == "a":
            target = (self._at / unquote(values["href"] or "")).resolve()
            self.links[values.get("rel") or target.name] = target


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (episode(False), "completed"),
        (episode(True), "cut by the token limit"),
        (episode(False, True), "cut by the token limit"),
        (episode(True, reason=StopReason.MAX_TOKENS), "cut by the token limit"),
        (episode(True, reason=StopReason.MAX_SAMPLED_TOKENS), "cut by the token limit"),
        (episode(True, reason=StopReason.PARSE_ERROR), "cut by the token limit"),
        (episode(True, reason=None), "cut by the token limit"),
        (episode(False, reason=StopReason.MAX_TOKENS), "out of tokens for the episode"),
        (episode(False, reason=StopReason.PARSE_ERROR), "unreadable reply"),
        (episode(False, reason=StopReason.MAX_TURNS), "out of turns"),
        (
            episode(True, reason=StopReason.ROLLOUT_TIMEOUT),
            "out of time, its last reply cut by the token limit",
        ),
        (
            episode(True, reason=StopReason.CONTEXT_OVERFLOW, tokens=0),
            "the prompt grew too long",
        ),
        (episode(False, reason="won_<b>"), "won &lt;b&gt;"),
        (episode(False, reason=None), "no reason given"),
    ],
)
def test_an_episode_ended_in_one_way(found: Trajectory, words: str) -> None:
    page = page_of(found)
    (ending,) = re.findall(r'data-ending="([^"]*)"', page)
    assert ending == words
    (summary,) = re.findall(r"<summary>(.*?)</summary>", page, re.DOTALL)
    assert f">{words}</span>" in summary
    if "cut" in words:
        assert "completed" not in page
    else:
        assert "cut by the token limit" not in page


def test_every_reason_has_words_of_its_own() -> None:
    pages = [page_of(episode(False, reason=reason)) for reason in StopReason]
    endings = [re.findall(r'data-ending="([^"]*)"', page)[0] for page in pages]
    assert len(set(endings)) == len(StopReason)
    assert not any("_" in ending for ending in endings)


def test_replies_that_were_cut_on_the_way_are_counted_apart() -> None:
    page = page_of(episode(True, True, False))
    assert 'data-ending="completed"' in page
    assert "2 earlier replies cut by the token limit" in page
    assert "1 earlier reply cut by the token limit" in page_of(episode(True, False))


def test_the_list_of_steps_has_every_page(tmp_path: Path) -> None:
    good, cut = group_of(episode(False, reward=1.0)), group_of(episode(True, reward=0.0))
    write(tmp_path, 0, good, cut, cut)
    write(tmp_path, 10, good, good, shown=1)
    write(tmp_path, 2, cut)
    write(tmp_path, 0, good, name="eval_held out #1")
    text = (tmp_path / INDEX_FILE).read_text("utf-8")
    rows = re.findall(r"<tr data-page=\"([^\"]*)\">(.*?)</tr>", text)
    cells = {page: re.findall(r"<td>(?:<a[^>]*>)?([^<]*)", row) for page, row in rows}
    assert list(cells) == [
        "iteration_000000/train.html",
        "iteration_000002/train.html",
        "iteration_000010/train.html",
        "iteration_000000/eval_held out #1.html",
    ]
    assert cells["iteration_000000/train.html"] == ["step 0", "0.333", "3", "2"]
    assert cells["iteration_000010/train.html"] == ["step 10", "1.000", "2", "0"], "the whole batch"
    assert "<h2>held out #1</h2>" in text
    assert all(link.is_file() for link in Page(tmp_path / INDEX_FILE).links.values())
    write(tmp_path, 2, good)
    (tmp_path / "iteration_000010" / "train.html").unlink()
    write(tmp_path, 3, TrajectoryGroup([], [], []))
    text = (tmp_path / INDEX_FILE).read_text("utf-8")
    assert "<td>1.000</td><td>1</td><td>0</td>" in text, "a page that is written again"
    assert "iteration_000010" not in text
    assert "<td>\N{EN DASH}</td><td>0</td>" in text
    (tmp_path / INDEX_FILE).write_text("damaged")
    write(tmp_path, 4, good)
    text = (tmp_path / INDEX_FILE).read_text("utf-8")
    assert text.count("<tr data-page") == 5, "it is made from the pages"


def test_pages_link_to_the_steps_around_them(tmp_path: Path) -> None:
    group = group_of(episode(False))
    first, second, third = (write(tmp_path, step, group) for step in (0, 5, 12))
    other = write(tmp_path, 7, group, name="eval_test")
    links = Page(second).links
    assert links == {
        INDEX_FILE: tmp_path / INDEX_FILE,
        "previous": first,
        "next": third,
    }
    assert "previous" not in Page(first).links
    assert Page(first).links["next"] == second
    assert "next" not in Page(third).links
    assert set(Page(other).links) == {INDEX_FILE}
    write(tmp_path, 5, group)
    assert Page(second).links["next"] == third, "a resumed run writes it again"


def test_pages_need_no_other_file_and_escape_names(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of(episode(False), episode(True)), "utf-8")
    found = Page(page)
    assert not found.sources
    assert not set(found.tags) & {"img", "link", "iframe"}
    text = page.read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "alert(1)>" not in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


def test_replies_are_filtered_by_reward_and_ending(browser: Any, tmp_path: Path) -> None:
    mixed = group_of(*(episode(False, reward=reward) for reward in (-1.0, 0.0, 1.0)))
    path = write(tmp_path, 0, mixed, group_of(episode(True, reward=0.5)))
    write(tmp_path, 1, mixed)
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())

    def shown() -> list[float]:
        found = page.locator("details[data-reward]:visible").all()
        return [float(item.get_attribute("data-reward")) for item in found]

    assert shown() == [-1, 0, 1, 0.5]
    page.get_by_label("reward from").fill("0.5")
    assert shown() == [1, 0.5]
    assert page.inner_text("#shown") == "2 of 4 shown"
    page.get_by_label("to", exact=True).fill("0.7")
    assert shown() == [0.5]
    assert page.locator("section:visible").count() == 1, "a group without a reply is left out"
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.getElementById('shown').textContent.startsWith('4')")
    page.get_by_label("ended").select_option("cut by the token limit")
    assert shown() == [0.5]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("link", name="all steps").click()
    folder = os.environ.get("PAGE_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / "transcripts.png"))
    page.get_by_role("link", name="step 1").click()
    page.get_by_role("link", name="step 0").click()
    assert page.url == path.as_uri()
    shades = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shades.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if folder:
            page.screenshot(path=str(Path(folder) / f"transcript-{scheme}.png"), full_page=True)
    assert shades[0] != shades[1]
    context.close()
    assert not problems
