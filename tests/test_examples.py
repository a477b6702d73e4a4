"""Every script in examples/ runs on the local service, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tinker_cookbook.utils.sdk_sessions import close_session

ROOT = Path(__file__).parent.parent


def run_example(service: ServiceProcess, name: str, *arguments: str) -> str:
    where = {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", f"examples/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | where,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_is_tested():
    tested = set(re.findall(r'run_example\(\s*\w+,\s*"(\w+)"', Path(__file__).read_text()))
    assert tested == {path.stem for path in (ROOT / "examples").glob("*.py")}


_HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print("loaded:", *sorted({"tinker", "torch", "transformers", "datasets"} & set(sys.modules)))
"""


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_help_loads_nothing_slow(path: Path):
    done = subprocess.run(
        [sys.executable, "-c", _HELP, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("render_chat", ["--model", "no/such"]),
        ("train_step_by_hand", ["--base-url", "nowhere"]),
        ("asyncio_training", ["--base-url", "nowhere"]),
        ("sample_from_checkpoint", ["--base-url", "nowhere", "tinker://no/sampler_weights/x"]),
    ],
)
def test_a_mistake_takes_one_line(name: str, words: list[str]):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(r"\w+Error: .*\n", done.stderr)


def test_render_chat_shows_weights(local_service: ServiceProcess):
    out = run_example(
        local_service, "render_chat", "--model", local_service.model, "--renderer", "chatml"
    )
    assert "weight 1  'Calm as a plate. Glass is steady.<|im_end|>'" in out
    assert "weight 0  '<|im_start|>system" in out


def test_a_step_by_hand_lowers_the_loss(local_service: ServiceProcess):
    out = run_example(
        local_service, "train_step_by_hand", "--model", local_service.model, "--steps", "4"
    )
    losses = [float(value) for value in re.findall(r"loss per token ([\d.]+)", out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.05


def test_two_asyncio_runs_learn_their_own_sentence(local_service: ServiceProcess):
    out = run_example(local_service, "asyncio_training", "--model", local_service.model)
    rows = re.findall(r"sentence 0 (-[\d.]+), of sentence 1 (-[\d.]+)", out)
    (first_own, first_other), (second_other, second_own) = [(float(a), float(b)) for a, b in rows]
    assert first_own > second_other
    assert second_own > first_other


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_sampling_from_a_model_and_a_checkpoint(
    local_service: ServiceProcess, from_checkpoint: bool
):
    target = local_service.model
    options = ["--renderer", "chatml", "--max-tokens", "5", "--prompt", "How is the sea?"]
    if from_checkpoint:
        client = local_service.connect()
        run = client.create_lora_training_client(local_service.model, rank=4).result()
        target = run.save_weights_for_sampler("example").result().path
        close_session(client, "success")
        options += ["--model", local_service.model]
    out = run_example(local_service, "sample_from_checkpoint", target, *options)
    assert "> How is the sea?" in out
