"""Make the pictures of the documentation from a real run, so that they show what a reader will see.

    python docs/pictures/make.py            # all of them: about 10 minutes on two cores
    python docs/pictures/make.py render     # one of: render, dashboard, transcript, runs

Terminal output becomes an SVG file; pages are photographed by Chromium. Needs the extra `dev`
and an installed Chromium.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COLUMNS = 100
WIDTH, HEIGHT = 1100, 700
API_KEY = "tml-only-for-the-pictures-of-the-docs"
# rich's own template names fonts on a web server; this one uses those of the reader.
SVG_FORMAT = """\
<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace;
font-size: {char_height}px; line-height: {line_height}px; }} {styles}</style>
<defs>{lines}</defs>
<rect fill="#1b1e23" width="{terminal_width}" height="{terminal_height}" rx="8"/>
<g transform="translate(10, 10)"><g class="{unique_id}-matrix">{backgrounds}{matrix}</g></g>
</svg>
"""


def read_terminal(words: list[str]) -> str:
    """Run a command on a terminal, so that it writes colours; return what it wrote."""
    output = io.BytesIO()

    def read(fd: int) -> bytes:
        data = os.read(fd, 4096)
        output.write(data)
        return data

    os.environ["COLUMNS"] = str(COLUMNS)
    status = os.waitstatus_to_exitcode(pty.spawn(words, read))
    if status != 0:
        raise SystemExit(f"{' '.join(words)} ended with status {status}")
    return output.getvalue().decode().replace("\r\n", "\n")


def write_terminal(name: str, title: str, text: str) -> None:
    """Write terminal output as an SVG file, with the command above it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {title}", style="bold"))
    console.print(Text.from_ansi(text), soft_wrap=False)
    svg = console.export_svg(title=title, code_format=SVG_FORMAT, unique_id=name)
    (HERE / f"{name}.svg").write_text(svg, encoding="utf-8")


@contextmanager
def open_page() -> Iterator[Page]:
    """Open an empty page in Chromium."""
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        browser.close()


@contextmanager
def open_service(folder: Path) -> Iterator[str]:
    """Serve the default model; yield the service's address."""
    words = [sys.executable, "-m", "tinker_cookbook.cli", "serve", "--port", "0"]
    words += ["--state-dir", str(folder / "state")]
    environment = {**os.environ, "TINKER_API_KEY": API_KEY}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "it was asked for"
    try:
        for line in process.stdout:
            if found := re.search(r"TINKER_BASE_URL=(\S+)", line):
                yield found[1].strip("'\"")
                return
        raise SystemExit("the service ended before it was ready")
    finally:
        process.terminate()
        process.wait()


def run_recipe(url: str, folder: Path, name: str, *settings: str) -> Path:
    """Run a recipe on the service; return its run directory."""
    environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": API_KEY}
    log_path = folder / name
    words = [sys.executable, "-m", f"recipes.{name}", f"log_path={log_path}", *settings]
    subprocess.run(words, env=environment, cwd=ROOT, check=True)
    return log_path


def make_render() -> None:
    """Draw a conversation with its trained tokens in colour."""
    data = "recipes/data/conversations.jsonl"
    shown = ["tinker-cookbook", "render", data, "--limit", "2"]
    words = [sys.executable, "-m", "tinker_cookbook.cli", *shown[1:]]
    write_terminal("render", " ".join(shown), read_terminal(words))


def make_dashboard() -> None:
    """Photograph the service's page with a finished supervised run."""
    with tempfile.TemporaryDirectory() as name, open_service(Path(name)) as url:
        run_recipe(url, Path(name), "sl_basic")
        with open_page() as page:
            page.goto(url)
            page.fill("#key", API_KEY)
            page.click("#login-form button")
            page.wait_for_selector("#chart svg path")
            page.screenshot(path=HERE / "dashboard.png")


def make_transcript() -> None:
    """Photograph the transcript of a step of reinforcement learning."""
    with tempfile.TemporaryDirectory() as name, open_service(Path(name)) as url:
        run = run_recipe(url, Path(name), "rl_basic", "max_steps=6")
        with open_page() as page:
            page.goto((run / "iteration_000005" / "train.html").as_uri())
            page.screenshot(path=HERE / "transcript.png")


def make_runs() -> None:
    """Photograph the page of a sweep of learning rates."""
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, "-m", "tinker_cookbook.cli", "sweep", "sl_basic", "--folder", name]
        words += ["learning_rate=3e-4,1e-3,3e-3", "max_steps=6", "batch_size=3", "test_size=8"]
        subprocess.run([*words, "eval_every=3", "base_url=local"], cwd=ROOT, check=True)
        with open_page() as page:
            page.goto((Path(name) / "sweep.html").as_uri())
            page.wait_for_selector('.plot[data-runs="3"] canvas')
            page.evaluate("document.getElementById('place').textContent = '~/tinker-runs'")
            page.screenshot(path=HERE / "runs.png")


MAKERS = {
    "render": make_render,
    "dashboard": make_dashboard,
    "transcript": make_transcript,
    "runs": make_runs,
}


def main(names: list[str]) -> None:
    """Make the pictures with these names; all without any."""
    for name in names or list(MAKERS):
        if name not in MAKERS:
            raise SystemExit(f"{name!r} is not a picture; use one of {', '.join(MAKERS)}")
        MAKERS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
