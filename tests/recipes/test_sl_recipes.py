"""sl_basic and sl_loop as a user runs them: from a checkout, copied, on their own service."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import chz
import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import (
    ROOT,
    ForkedRecipes,
    count_lines,
    final_adapter,
    metric_rows,
    read_jsonl,
    recipe_environment,
    run_in_this_process,
    run_recipe,
    start_recipe,
)
from tinker_cookbook import cli
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.sources.options import TrainedTokens

QUICK = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=4")


@pytest.fixture
def remote(local_service: ServiceProcess, tmp_path: Path) -> ForkedRecipes:
    return ForkedRecipes(recipe_environment(local_service, tmp_path), tmp_path / "output.log")


@pytest.mark.parametrize("recipe", ["sl_basic", "sl_loop"])
def test_a_recipe_copied_alone_runs_in_a_bare_folder(
    recipe: str, local_service: ServiceProcess, tmp_path: Path
):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(ROOT / "recipes" / f"{recipe}.py", folder)
    env = recipe_environment(local_service, tmp_path / "home")
    model = f"model_name={local_service.model}"
    done = run_recipe(recipe, *QUICK, model, "max_steps=2", env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"model    {local_service.model}" in done.stdout
    [run] = (tmp_path / "home" / "runs" / recipe).iterdir()
    assert [row["step"] for row in metric_rows(run)] == [0, 1, 2]
    assert "held-out loss" in done.stdout
    assert f"tinker-cookbook sample tinker://{_run_id(run)}/sampler_weights/final" in done.stdout


def _run_id(run: Path) -> str:
    return read_jsonl(run / "checkpoints.jsonl")[-1]["sampler_path"].split("/")[2]


def test_the_whole_story_on_a_service_of_its_own(tiny_model_folder: Path, tmp_path: Path):
    """Start, kill with SIGKILL, resume; then sample, although that service is long gone."""
    env = recipe_environment(None, tmp_path)
    settings = (*QUICK, f"model_name={tiny_model_folder}", "max_steps=4", "save_every=2")
    settings += ("infrequent_eval_every=0", f"log_path={tmp_path / 'run'}")
    process = start_recipe("recipes.sl_basic", *settings, env=env)
    deadline = time.monotonic() + 120
    while count_lines(tmp_path / "run" / "checkpoints.jsonl") < 1 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    done = run_recipe("recipes.sl_basic", *settings, env=env)
    assert done.returncode == 0, done.stderr
    assert "service  local, started for this run" in done.stdout
    assert "\nwatch    http://127.0.0.1:" in done.stdout
    assert "sample   tinker-cookbook sample tinker://" in done.stdout
    state = tmp_path / "cookbook" / "service"
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert final_adapter(tmp_path / "run", state)

    command = next(x for x in done.stdout.splitlines() if x.startswith("sample   "))
    words = command.split()[1:]
    assert words[0] == "tinker-cookbook"
    options = ["--renderer", "chatml", "--max-tokens", "4"]
    sampled = subprocess.run(
        [sys.executable, "-m", "tinker_cookbook.cli", *words[1:], *options],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert sampled.returncode == 0, sampled.stderr
    assert "`tinker-cookbook serve` running in another terminal" in sampled.stdout
    assert "\n> How is the weather out there?\n" in sampled.stdout


def test_the_sample_before_and_after_is_shown(remote: ForkedRecipes, tmp_path, local_service):
    log_path = tmp_path / "run"
    model = f"model_name={local_service.model}"
    settings = (*QUICK, model, "max_steps=2", f"log_path={log_path}", "prompt=Is it day?")
    remote.run("recipes.sl_basic", *settings)
    samples = read_jsonl(log_path / "samples.jsonl")
    assert [row["prompt"] for row in samples] == ["Is it day?"] * 2
    output = (tmp_path / "output.log").read_text()
    assert f"Is it day?\n  before: {samples[0]['answer'].splitlines()[0]}" in output
    assert "  after:  " in output


def test_the_loop_shows_a_sample_before_and_after(remote: ForkedRecipes, tmp_path, local_service):
    log_path = tmp_path / "run"
    loop_settings = [key for key in QUICK if not key.startswith(("eval_every", "infrequent"))]
    model = f"model_name={local_service.model}"
    remote.run("recipes.sl_loop", *loop_settings, model, "max_steps=2", f"log_path={log_path}")
    assert len(read_jsonl(log_path / "samples.jsonl")) == 2
    output = (tmp_path / "output.log").read_text()
    assert "How do I keep bread fresh?\n  before: " in output
    assert "  after:  " in output


def weighted_files(folder: Path) -> str:
    """A ShareGPT array and an Alpaca table, three quarters and a quarter of an epoch."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (folder / "chats.json").write_text(json.dumps([{"conversations": turns}] * 7))
    (folder / "more.csv").write_text("instruction,output\n" + "c,d\n" * 9)
    return f"{folder}/chats.json:0.75,{folder}/more.csv:0.25"


@pytest.mark.parametrize("recipe", ["sl_basic", "sl_loop"])
def test_files_of_other_shapes_are_mixed_from_the_command_line(
    recipe: str, remote: ForkedRecipes, tmp_path, local_service
):
    settings = (*QUICK, f"model_name={local_service.model}", f"log_path={tmp_path / 'run'}")
    settings += (f"data={weighted_files(tmp_path)}", "train_on_what=all_messages")
    remote.run(f"recipes.{recipe}", *settings)
    # 2 of 7 rows are held out; the 5 others and 2 of the table are an epoch: 3 steps of 2, 1 of 1.
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
    output = (tmp_path / "output.log").read_text()
    assert "data     " in output
    assert "16 rows, 2 files (1 JSON array, 1 CSV), read as Alpaca" in output
    assert "chats.json: 5 rows an epoch of its 5" in output
    assert "more.csv: 2 rows an epoch of its 9" in output


def test_the_output_layer_is_trained_or_not(remote: ForkedRecipes, tmp_path, local_service):
    trained = {}
    for wanted in ("true", "false"):
        log_path = tmp_path / wanted
        model = f"model_name={local_service.model}"
        settings = (*QUICK, model, f"log_path={log_path}", "max_steps=1", "eval_every=0")
        settings += ("infrequent_eval_every=0", f"train_unembed={wanted}")
        remote.run("recipes.sl_basic", *settings)
        names = final_adapter(log_path, local_service.state_dir)
        trained[wanted] = any("lm_head" in name for name in names)
    assert trained == {"true": True, "false": False}


def test_the_command_line_lists_all_ways_to_choose_trained_tokens():
    assert set(get_args(TrainedTokens)) == {mode.value for mode in TrainOnWhat}


def test_the_blueprint_takes_overrides(monkeypatch):
    from recipes import sl_basic

    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    blueprint = sl_basic.build_config_blueprint()
    assert isinstance(blueprint, chz.Blueprint)
    config = blueprint.make_from_argv(
        ["learning_rate=0.5", "dataset_builder.common_config.batch_size=3", "log_path=/tmp/x"]
    )
    assert isinstance(config, train.Config)
    assert config.learning_rate == 0.5
    assert config.dataset_builder.common_config.batch_size == 3  # pyright: ignore
    assert config.recipe_name == "sl_basic"
    other = sl_basic.build_config_blueprint(model_name="Qwen/Qwen3-8B").make()
    assert other.renderer_name == "qwen3"


def test_the_second_recipe_stays_flat():
    assert len((ROOT / "recipes" / "sl_loop.py").read_text().splitlines()) <= 200
    assert len((ROOT / "recipes" / "sl_basic.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("where", ["local", "remote"])
def test_the_flat_recipe_refuses_rows_beyond_the_context_before_the_first_step(
    where: str, local_service: ServiceProcess, tmp_path: Path, monkeypatch, capsys
):
    from recipes import sl_loop

    for name, value in recipe_environment(local_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    address = "local" if where == "local" else local_service.base_url
    settings = [*QUICK, f"model_name={local_service.model}", f"log_path={tmp_path / 'new'}"]
    with pytest.raises(SystemExit):
        run_in_this_process(sl_loop, [*settings, f"base_url={address}", "max_length=5000"])
    assert "max_length=5000 is more than the 1024 tokens" in capsys.readouterr().err
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_sample_command_refuses_a_checkpoint_that_is_gone(monkeypatch, local_service, capsys):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    words = ["sample", "tinker://no-such-run/sampler_weights/final"]
    words += ["--base-url", local_service.base_url, "--model", local_service.model]
    assert cli.main(words) == 2
    assert "cannot be sampled" in capsys.readouterr().err


# What goes wrong, what is typed, and what the one line on stderr must say.
BAD_INPUT = {
    "a misspelt key": (["learning_rat=1e-4"], "Did you mean learning_rate=1e-4?"),
    "a key from elsewhere": (["lr=1e-4"], "Did you mean learning_rate=1e-4?"),
    "a wrong type": (["num_epochs=many"], "num_epochs=many has the wrong type; it must be int"),
    "a missing file": (["file_path=none.jsonl"], "none.jsonl"),
    "two names of the data": (["file_path=a.jsonl", "data=b.jsonl"], "both given"),
    "half of the weights": (["data=a.jsonl:0.7,b.jsonl"], "weight at some places only"),
    "trained tokens": (["train_on_what=all"], "use one of last_assistant_message"),
    "a learning rate": (["learning_rate=3"], "learning_rate=3.0 is not between 0 and 1"),
    "a rank": (["lora_rank=0"], "lora_rank=0 is out of range; use 1 to 1024"),
    "an unknown model": (["base_url=local", "model_name=no-such/model"], "no-such/model"),
    "an unknown renderer": (["renderer_name=chatmll"], "chatml"),
    "a dead address": (["base_url=http://127.0.0.1:9"], "does not answer (Connection refused)"),
    "no address": (["base_url=localhost:80"], "use http://HOST:PORT"),
    "rows beyond the context": (["max_length=1026"], "use max_length=1024 or less"),
    "rows beyond the context, here": (
        ["base_url=local", "max_length=5000"],
        "max_length=5000 is more than the 1024 tokens",
    ),
    "too large a batch": (["batch_size=5000"], "batch_size=5000"),
    "too much held out": (["test_size=5000"], "5000"),
    "a file of the wrong form": (["file_path={bad_file}"], "bad.jsonl:2"),
    "an old folder": (["log_path={old_run}", "learning_rate=0.1"], "learning_rate: 0.5 -> 0.1"),
    "a folder that is a file": (["log_path={bad_file}"], "is a file; name a folder"),
    "weights of another kind": (["load_checkpoint_path=tinker://x/weights/y"], "tinker://x"),
    "a schedule": (["lr_schedule=step"], "use one of linear, cosine, constant"),
    "a model of elsewhere": (["model_name=openai/gpt-oss-20b"], "is not offered by http"),
    "an empty value": (["data="], "data= has no value; give one, or leave the key out"),
    "no value": (["learning_rate"], "write key=value"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    bad_file, old_run = folder / "bad.jsonl", folder / "old"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "usr", "content": "a"}]}
    bad_file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    old_run.mkdir()
    (old_run / "config.json").write_text(json.dumps({"learning_rate": 0.5}))
    return {"bad_file": bad_file, "old_run": old_run}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_line(
    case: str, local_service: ServiceProcess, places, tmp_path: Path, monkeypatch, capsys
):
    from recipes import sl_basic

    for name, value in recipe_environment(local_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    words, expected = BAD_INPUT[case]
    settings = [*QUICK, f"model_name={local_service.model}", f"log_path={tmp_path / 'new'}"]
    given = [word.format(**places) for word in words]
    keys = {word.partition("=")[0] for word in given}
    settings = [key for key in settings if key.partition("=")[0] not in keys]
    with pytest.raises(SystemExit) as stop:
        run_in_this_process(sl_basic, [*settings, *given])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.splitlines()[0].partition(": ")[0].endswith("Error")
