"""The dashboard in a real browser: sign in, curves, runs, checkpoints, streamed answers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.browsers import open_browser
from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, rl_datum, tokens, train_step

ATTACK = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def trained(local_service: ServiceProcess) -> str:
    """A run with a hostile name, some steps and a checkpoint; returns the checkpoint's path."""
    client = local_service.connect(display_name=ATTACK)
    run = client.create_lora_training_client(base_model=local_service.model, rank=4).result()
    for number in range(14):
        train_step(run, batch(seed=number % 3), tinker.AdamParams(learning_rate=1e-2))
    return run.save_weights_for_sampler("tried-in-a-browser").result().path


@pytest.fixture
def page(browser: Any, local_service: ServiceProcess) -> Iterator[Any]:
    """An open page. Requests to other addresses and errors in its script fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    def note(request: Any) -> None:
        if not request.url.startswith((local_service.base_url, "data:")):
            problems.append(f"asked {request.url}")

    page.on("request", note)
    page.goto(f"{local_service.base_url}/")
    yield page
    context.close()
    assert not problems


def sign_in(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.click("#login-form button")


def test_the_key_is_asked_for(page: Any, local_service: ServiceProcess, trained: str) -> None:
    page.wait_for_selector("#login:visible")
    assert page.is_hidden("#content")
    sign_in(page, "tml-not-the-key-0123456789")
    page.wait_for_selector("#login-error:not(:empty)")
    assert "not the key" in page.inner_text("#login-error")
    sign_in(page, local_service.api_key)
    page.wait_for_selector("#runs tbody tr")
    assert local_service.api_key not in page.content()
    page.reload()
    page.wait_for_selector("#runs tbody tr")
    page.click("#leave")
    page.wait_for_selector("#login:visible")
    assert page.is_hidden("#content")


def test_runs_curves_and_a_streamed_answer(
    page: Any, local_service: ServiceProcess, trained: str
) -> None:
    sign_in(page, local_service.api_key)
    page.wait_for_selector("#chart svg path.smooth")
    page.wait_for_selector("#legend li")
    assert "at step 14" in page.inner_text("#legend")
    assert ATTACK in page.inner_text("#runs"), "the name is shown without changes"
    assert page.title() == "Tinker service"
    assert page.locator("#content img").count() == 0
    assert "tried-in-a-browser" in page.inner_text("#checkpoints")
    page.select_option("#model", trained)
    page.fill("#prompt", "Hello")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "12")
    page.click("#send")
    page.wait_for_selector("#speed:not(:empty)")
    assert "tokens" in page.inner_text("#speed")
    assert page.inner_text("#answer").strip()
    page.fill("#max-tokens", "100000")
    page.click("#send")
    page.wait_for_selector("#answer.error")
    assert "max_tokens=100000" in page.inner_text("#answer")
    take(page, "dashboard")


@pytest.fixture(scope="module")
def kinds(local_service: ServiceProcess) -> str:
    """Runs of other kinds: a resumed one with many checkpoints, one of reinforcement learning.

    Returns:
        The id of the resumed run.
    """
    client = local_service.connect(display_name="sl_basic chat lr=0.01 " + "long-name" * 8)
    first = client.create_lora_training_client(base_model=local_service.model, rank=2).result()
    path = ""
    for number in range(4):
        train_step(first, batch())
        path = first.save_state(f"{number + 1:06d}").result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    train_step(again, batch())
    again.save_weights_for_sampler("final").result()
    policy = local_service.connect(display_name="rl_basic sums lr=0.0001")
    run = policy.create_lora_training_client(base_model=local_service.model, rank=2).result()
    advantages = [0.0] * 5 + [1.0, -1.0, 0.5, -0.5, 2.0, -1.0]
    data = [rl_datum(tokens(12, seed), [0.0] * 5 + [-5.0] * 6, advantages) for seed in range(2)]
    train_step(run, data, loss="importance_sampling")
    return again.model_id


def show_only(page: Any, name: str) -> None:
    """Choose one run for the chart."""
    from playwright.sync_api import expect

    page.wait_for_selector("#runs tbody tr")
    checked = page.locator("#runs input:checked")
    others = page.locator(f"#runs input:checked:not([aria-label='Show the curve of {name}'])")
    page.get_by_label(f"Show the curve of {name}").check()
    while others.count():
        others.first.click()
    expect(checked).to_have_count(1)


def take(page: Any, name: str) -> None:
    """Screenshots, for whoever asks for them."""
    folder = os.environ.get("PAGE_SCREENSHOTS")
    if not folder:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=str(Path(folder) / f"{name}-{scheme}.png"), full_page=True)


def test_reinforcement_learning_shows_what_means_something(
    page: Any, local_service: ServiceProcess, kinds: str
) -> None:
    sign_in(page, local_service.api_key)
    name = "rl_basic sums lr=0.0001"
    show_only(page, name)
    page.locator("#legend", has_text="rl_basic").wait_for()
    assert "Entropy of the sampled tokens" in page.inner_text("#chart-title")
    titles = page.locator("#measure option").all_inner_texts()
    assert "importance_sampling objective per token" in titles
    assert "KL divergence of sampler and trainer, nats per token" in titles
    assert "Tokens per step" in titles
    assert not [title for title in titles if "oss per token" in title]
    assert page.locator("#chart circle").count() == 1, "one point can be seen"
    page.select_option("#measure", "loss")
    assert page.inner_text("#chart-title") == "importance_sampling objective per token"
    page.select_option("#measure", "tokens")
    assert "22 at step 1" in page.inner_text("#legend")
    take(page, "dashboard-rl")
    page.get_by_label("Show the curve of sl_basic chat").check()
    page.locator("#legend li").nth(1).wait_for()
    assert "(importance_sampling): 22 at step 1" in page.inner_text("#legend")
    assert "(cross_entropy):" in page.inner_text("#legend")
    page.select_option("#measure", "loss")
    assert page.inner_text("#chart-title") == "Loss or objective per token"


def test_two_boxes_changed_at_the_same_time_both_count(
    page: Any, local_service: ServiceProcess, kinds: str
) -> None:
    """The second change happens before the rows are made again after the first."""
    from playwright.sync_api import expect

    sign_in(page, local_service.api_key)
    page.wait_for_selector("#runs tbody tr")
    expect(page.locator("#runs input:checked")).to_have_count(1)
    page.evaluate(
        """() => {
            const [checked] = document.querySelectorAll("#runs input:checked");
            const [other] = document.querySelectorAll("#runs input:not(:checked)");
            document.otherRun = other.dataset.key;
            other.click();
            checked.click();
        }"""
    )
    page.wait_for_timeout(2500)  # the rows are made again meanwhile
    kept = page.locator("#runs input:checked")
    expect(kept).to_have_count(1)
    assert kept.get_attribute("data-key") == page.evaluate("document.otherRun")


def test_a_resumed_run_is_shown_once_and_its_checkpoints_together(
    page: Any, local_service: ServiceProcess, kinds: str
) -> None:
    sign_in(page, local_service.api_key)
    name = "sl_basic chat lr=0.01 " + "long-name" * 8
    show_only(page, name)
    rows = page.locator("#runs tbody tr", has_text="sl_basic chat")
    assert rows.count() == 1
    assert "resumed at step 4" in rows.inner_text()
    page.locator("#legend", has_text="at step 5").wait_for()
    heads = page.locator("#checkpoints tr.group", has_text="sl_basic chat")
    assert heads.count() == 1
    assert "5 checkpoints" in heads.inner_text()
    assert "final" in page.inner_text("#checkpoints")
    # Other tests of this service save checkpoints with the same names in other runs.
    folded = f"{kinds.partition(':')[0]}:train:0/weights/000002"
    assert folded not in page.inner_text("#checkpoints"), "folded"
    unfold = page.get_by_role("button", name=f"Show all of {name}")
    unfold.focus()
    page.keyboard.press("Enter")
    for number in range(4):
        path = folded.replace("000002", f"{number + 1:06d}")
        assert path in page.inner_text("#checkpoints")
    page.wait_for_timeout(2500)  # the tables are made anew meanwhile
    assert "Show the newest of" in page.evaluate("document.activeElement.ariaLabel")
    assert folded in page.inner_text("#checkpoints"), "it stays unfolded"
    page.keyboard.press("Enter")
    assert folded not in page.inner_text("#checkpoints")
    take(page, "dashboard-sl")


def test_the_base_model_answers_next_to_the_tuned_one(
    page: Any, local_service: ServiceProcess, trained: str
) -> None:
    sign_in(page, local_service.api_key)
    page.wait_for_selector("#runs tbody tr")
    page.select_option("#model", local_service.model)
    assert page.is_hidden("#compare"), "it is the base model"
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if "chat/" in r.url else None)
    page.select_option("#model", trained)
    chosen = page.locator("#model option:checked").inner_text()
    assert chosen == f"tried-in-a-browser of {ATTACK}"
    page.get_by_label("base model's answer").check()
    page.get_by_label("System prompt").fill("Answer in one word.")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "10")
    page.click("#send")
    page.wait_for_selector("#speed:not(:empty)")
    page.wait_for_selector("#base-speed:not(:empty)")
    assert [body["model"] for body in bodies] == [trained, local_service.model]
    assert bodies[0]["messages"] == bodies[1]["messages"]
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Answer in one word."}
    tuned, base = page.inner_text("#answer"), page.inner_text("#base-answer")
    assert tuned.strip()
    assert base.strip()
    assert tuned != base
    take(page, "dashboard-compare")
    page.get_by_label("base model's answer").uncheck()
    page.get_by_label("System prompt").fill(" ")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    assert page.is_hidden("#base-answer")
    assert [message["role"] for message in bodies[2]["messages"]] == ["user"]


def test_it_fits_a_narrow_screen(
    page: Any, local_service: ServiceProcess, trained: str, kinds: str
) -> None:
    page.set_viewport_size({"width": 360, "height": 780})
    sign_in(page, local_service.api_key)
    page.wait_for_selector("#chart svg")
    boxes = [section.bounding_box() for section in page.locator("section:visible").all()]
    right = max(box["x"] + box["width"] for box in boxes)
    assert right <= 360, "nothing has to be scrolled sideways but tables in their own boxes"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 390, "height": 780})
    take(page, "dashboard-narrow")


def test_a_ticket_signs_in_and_leaves_the_address(browser: Any, tiny_model_folder: Path) -> None:
    """The link that `serve` prints."""
    program = "import sys; from tinker_cookbook.cli import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as state:
        arguments = ["serve", "--model", str(tiny_model_folder), "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments, "--state-dir", state],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        link = next(line.split()[1] for line in lines if line.startswith("Dashboard:"))
        context = browser.new_context()
        page = context.new_page()
        page.goto(link)
        page.wait_for_selector("#content:visible")
        assert "ticket" not in page.url
        second = browser.new_context().new_page()
        second.goto(link)
        second.wait_for_selector("#login-error:not(:empty)")
        assert "been used before" in second.inner_text("#login-error")
        second.context.close()
        context.close()
        process.terminate()
        process.wait(30)
        process.stdout.close()
