"""book_style from end to end on a tiny model: files, metrics, samples, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.book_style.__main__ import Config
from tests.conftest import ServiceProcess
from tinker_cookbook import cli_utils
from tinker_cookbook.exceptions import ConfigurationError

ROOT = Path(__file__).parent.parent.parent
SENTENCES = [
    f"The {animal} met the {person} by the well, and they spoke of number {i}."
    for i, (animal, person) in enumerate(
        (a, p)
        for a in ("fox", "goose", "raven", "wolf", "cat")
        for p in ("miller", "tailor", "king", "cook", "fisherman")
    )
]


def run_recipe(service: ServiceProcess, *settings: str) -> subprocess.CompletedProcess[str]:
    where = {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
    return subprocess.run(
        [sys.executable, "-m", "recipes.book_style", *settings],
        cwd=ROOT,
        env=os.environ | where,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def settings_for(service: ServiceProcess, folder: Path) -> list[str]:
    book = folder / "fables.txt"
    book.write_text("\n\n".join(SENTENCES))
    return [
        f"book={book}",
        f"log_path={folder / 'run'}",
        f"model_name={service.model}",
        *("renderer_name=chatml", "passage_tokens=120", "test_passages=2", "max_steps=3"),
        *("lora_rank=4", "learning_rate=0.002", "style=Aesop", "save_every=2"),
    ]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("instructions", ["template", "local"])
def test_a_run_measures_and_samples_before_and_after(
    local_service: ServiceProcess, tmp_path: Path, instructions: str
):
    settings = [*settings_for(local_service, tmp_path), f"instructions={instructions}"]
    done = run_recipe(local_service, *settings)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "held-out loss" in done.stdout
    assert "before:" in done.stdout
    assert "in the style of Aesop" in done.stdout

    run = tmp_path / "run"
    [train_file] = (run / "passages").glob("train-*.jsonl")
    [test_file] = (run / "passages").glob("held-out-*.jsonl")
    passages = [
        row["messages"][1]["content"] for f in (train_file, test_file) for row in read_rows(f)
    ]
    assert "\n\n".join(passages) == "\n\n".join(SENTENCES), "the book in order, its end held out"
    assert len(read_rows(test_file)) == 2
    rows = read_rows(run / "metrics.jsonl")
    assert [row["num_sequences"] for row in rows if "num_sequences" in row] == [1, 1, 1]
    assert sum("test/nll" in row for row in rows) >= 2

    again = run_recipe(local_service, *settings)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout + again.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("passage_tokens=5", "passage_tokens=5 is out of range"),
        ("test_passages=0", "leaves nothing to measure"),
        ("max_passages=2", "max_passages=2 leaves nothing to train"),
        ("instructions=openai", "needs instructions_url and instructions_model"),
        ("instructions=magic", "instructions=magic is not accepted; use one of"),
        ("bok=x.txt", r"Did you mean book=x.txt\?"),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str):
    with pytest.raises(ConfigurationError, match=message):
        cli_utils.parse_config(Config, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("book=missing.txt", "book=missing.txt is not a file"),
        ("test_passages=500", "test_passages=500 are held out; give a longer book"),
    ],
)
def test_a_book_that_cannot_be_used_is_answered_in_one_line(
    local_service: ServiceProcess, tmp_path: Path, setting: str, message: str
):
    done = run_recipe(local_service, *settings_for(local_service, tmp_path), setting)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
