"""The page of runs in a real browser: served, and as a saved file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsers import open_browser
from tests.viewer.runs import ATTACK, write_rl, write_supervised
from tinker_cookbook import cli
from tinker_cookbook.stores import LocalStorage, RunRegistry, TrainingRunStore
from tinker_cookbook.viewer.answers import Answers
from tinker_cookbook.viewer.server import open_server

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page") / "runs"
    os.environ.setdefault("TINKER_COOKBOOK_HOME", str(root.parent / "home"))
    write_rl(root, "rl_basic/three")
    write_supervised(root, "sl_basic/two", 4, 1e-3)
    write_supervised(root, "sl_basic/one", 6, 1e-2)
    return root


@pytest.fixture(scope="module")
def saved(root: Path) -> str:
    target = root.parent / "page.html"
    assert cli.main(["view", str(root), "--html", str(target)]) == 0
    return target.as_uri()


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[str]:
    server = open_server(Answers(RunRegistry([LocalStorage(root)])))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["saved", "served"])
def address(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page; errors in its script and requests to other addresses fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: note(r.url, problems))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    yield page
    context.close()
    assert not problems


def note(url: str, problems: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "file:", "data:", "about:")):
        problems.append(f"asked {url}")


def chart(page: Any, metric: str) -> Any:
    return page.locator(".charts section", has=page.get_by_role("heading", name=metric, exact=True))


def test_curves_of_several_runs_with_their_values(page: Any, address: str):
    page.goto(address)
    plot = chart(page, "test/nll").locator(".plot")
    page.locator('.plot[data-runs="2"] canvas').first.wait_for()
    assert "sl_basic/one ends at 4.333" in plot.get_attribute("aria-label")
    plot.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    tip = plot.locator(".tip")
    assert "step 2" in tip.inner_text()
    assert "sl_basic/two" in tip.inner_text()
    assert "4.500" in tip.inner_text(), "a value of one of the runs"
    box = plot.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 20)
    tip.get_by_text("step 0").wait_for()
    assert page.title() == "Runs"
    assert page.locator("main img").count() == 0


def test_smoothing_log_scale_and_axes_change_the_curves(page: Any, saved: str):
    page.goto(saved)
    section = chart(page, "train_mean_nll")
    section.locator("canvas").wait_for()
    plot = section.locator(".plot")
    raw = plot.get_attribute("aria-label")
    page.get_by_label("Smoothing").fill("0.9")
    section.locator('.plot[data-smooth="0.9"]').wait_for()
    assert plot.get_attribute("aria-label") != raw
    page.get_by_label("Log scale").check()
    page.get_by_label("Horizontal axis").select_option("axis/seconds")
    page.locator('.plot[aria-label*="by seconds of training"]').first.wait_for()
    plot.focus()
    page.keyboard.press("Home")
    assert "step 0" in plot.locator(".tip").inner_text()
    assert "smooth=0.9" in page.url, "the address keeps the view"
    page.reload()
    page.locator('.plot[aria-label*="by seconds of training"]').first.wait_for()
    assert page.get_by_label("Log scale").is_checked()


def test_several_metrics_share_a_chart_and_metrics_are_found_by_name(page: Any, saved: str):
    page.goto(saved)
    page.locator(".plot canvas").first.wait_for()
    for name in ("test/nll", "train_mean_nll"):
        page.get_by_placeholder("name of a metric").fill(name)
        page.get_by_role("button", name="Add").click()
    page.locator('#joint .plot[data-runs="2"] canvas').wait_for()
    assert "dashed: train_mean_nll" in page.inner_text("#joint")
    page.get_by_role("button", name="Remove test/nll").click()
    page.locator("#joint", has_text="solid: train_mean_nll").wait_for()
    page.get_by_label("Filter the metrics").fill("grad_norm_that_is_not_there")
    page.get_by_label("Filter the metrics").fill("num_tok")
    assert chart(page, "num_tokens").count() == 1
    assert chart(page, "test/nll").count() == 0


def test_only_chosen_runs_are_shown(page: Any, saved: str):
    page.goto(saved)
    page.locator('.plot[data-runs="2"]').first.wait_for()
    page.get_by_role("checkbox", name="sl_basic/two").uncheck()
    page.locator('.plot[data-runs="1"] canvas').first.wait_for()
    page.get_by_label("Filter the runs").fill("failed")
    assert page.locator("#runs li").count() == 1
    page.get_by_role("button", name="none").click()
    page.get_by_text("Choose runs in the list.").first.wait_for()


def test_settings_that_differ(page: Any, served: str):
    page.goto(f"{served}#tab=settings&run=sl_basic/one&run=sl_basic/two")
    page.locator("#settings-table tbody tr").first.wait_for()
    text = page.inner_text("#settings-table")
    assert "learning_rate" in text
    assert "0.001" in text
    assert "note" not in text, "it is equal in both"
    page.get_by_label("Also show equal settings").check()
    page.locator("#settings-table", has_text="owned").wait_for()
    assert ATTACK in page.inner_text("#settings-table")
    assert "tinker://r/weights/f" in page.inner_text("#checkpoints")


def test_samples_evaluations_and_times(page: Any, served: str):
    page.goto(f"{served}#run=sl_basic/one&run=sl_basic/two")
    page.locator(".plot canvas").first.wait_for()
    page.keyboard.press("3")
    page.get_by_text("answer 6").wait_for()
    assert ATTACK in page.inner_text("#samples")
    page.keyboard.press("5")
    page.get_by_text("first 5, best 4.333 at step 4").wait_for()
    page.keyboard.press("6")
    page.get_by_text("1.500 s, 75%").first.wait_for()
    assert page.locator(".track.spans i").count() == 4
    assert page.locator("main img").count() == 0


def test_rollouts_by_step_group_and_reward(page: Any, address: str):
    page.goto(f"{address}#tab=rollouts&run=rl_basic/three")
    page.get_by_text("4 of 4 rollouts in 2 groups").wait_for()
    assert "step-1" in page.inner_text("#rollout-groups")
    page.keyboard.press("[")
    page.get_by_text("step-0").first.wait_for()
    page.get_by_label("Order").select_option("high")
    assert page.locator("#rollout-groups h2").first.inner_text() == "Group 1"
    page.get_by_label("Reward from").fill("1")
    page.get_by_label("to", exact=True).fill("2")
    page.get_by_text("2 of 4 rollouts in 2 groups").wait_for()
    assert ATTACK not in page.inner_text("#rollout-groups"), "errors have no reward"
    page.locator(".rollout summary", has_text="Hello").click()
    reply = page.locator("pre.reply", has_text="Hello <b>you</b>")
    reply.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    told = page.inner_text("#token")
    assert "log probability -3.000 (5.0%)" in told
    assert "difference -1.0000" in told
    assert "advantage 0.500" in told
    colours = {}
    for kind in ("logprob", "advantage", "weight", "difference", "none"):
        page.get_by_label("Colour tokens by").select_option(kind)
        page.locator(".rollout summary", has_text="Hello").click()
        token = page.locator("pre.reply span", has_text="you")
        colours[kind] = token.evaluate("node => getComputedStyle(node).backgroundColor")
    assert len(set(colours.values())) == 5, colours


def test_a_running_run_is_followed(page: Any, root: Path, served: str):
    page.goto(f"{served}#run=sl_basic/live")
    write_supervised(root, "sl_basic/live", 2, 1e-2)
    page.get_by_role("checkbox", name="sl_basic/live").check(timeout=10_000)
    page.locator(
        '.plot[aria-label*="sl_basic/live ends at 4;"], .plot[aria-label$="live ends at 4"]'
    )
    store = TrainingRunStore(LocalStorage(root), "sl_basic/live")
    store.write_metrics({"train_mean_nll": 1.2345}, 2)
    page.locator('.plot[aria-label*="live ends at 1.234"]').first.wait_for(timeout=10_000)
    LocalStorage(root).remove_dir("sl_basic/live")
    page.locator("#runs", has_not_text="live").wait_for(timeout=10_000)


def test_a_zoom_asks_for_the_points_that_had_no_room(page: Any, root: Path, served: str):
    lines = [f'{{"step": {n}, "loss": {n % 7}}}\n' for n in range(4000)]
    folder = root / "big" / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    page.goto(f"{served}#run=big/run")
    plot = chart(page, "loss").locator(".plot")
    plot.locator("canvas").wait_for()
    box = plot.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60, steps=4)
    page.mouse.up()
    plot.locator('.uplot[data-detail="yes"]').wait_for()
    page.mouse.dblclick(box["x"] + 30, box["y"] + 30)
    LocalStorage(root).remove_dir("big")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_view_is_wider_than_the_screen(page: Any, saved: str, width: int):
    page.set_viewport_size({"width": width, "height": 844})
    for tab in ("curves", "settings", "samples", "rollouts", "evaluations", "timing"):
        page.goto("about:blank")
        page.goto(f"{saved}#tab={tab}")
        page.locator(f"#{tab}:visible").wait_for()
        page.wait_for_timeout(150)
        wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{tab} is {wide} pixels too wide"
        take(page, f"view-{tab}-{width}")


def take(page: Any, name: str) -> None:
    """Screenshots, for whoever asks for them."""
    folder = os.environ.get("PAGE_SCREENSHOTS")
    if not folder:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=str(Path(folder) / f"{name}-{scheme}.png"), full_page=True)
