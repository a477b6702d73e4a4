"""The RL recipes for two steps against a real service, and their rewards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes import rl_basic, rl_loop
from recipes.multiturn import __main__ as multiturn
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook import recipe
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl import recipe as rl_recipe
from tinker_cookbook.utils.jsonl_log import read_rows

SMALL = {"groups_per_batch": 2, "group_size": 2, "max_steps": 2, "max_tokens": 6, "lora_rank": 2}


@pytest.mark.parametrize("reward", [rl_basic.count_reward, rl_loop.reward])
@pytest.mark.parametrize(
    ("reply", "num_words", "expected"),
    [
        ("Rivers run down.", 3, 1.0),
        ("It's well-known, isn't it?", 4, 1.0),
        ("one two", 4, 0.5),
        ("one two three four five six", 3, 0.0),
        ("", 3, 0.0),
        ("... !!", 3, 0.0),
    ],
)
def test_word_counts(reward, reply: str, num_words: int, expected: float):
    assert reward(reply, num_words) == pytest.approx(expected)


def test_held_out_topics_are_not_trained_on():
    assert not set(rl_loop.HELD_OUT) & set(rl_loop.TRAINED)


def test_group_size_is_checked_before_anything_starts():
    with pytest.raises(ConfigurationError, match="group_size=1 gives every advantage 0"):
        rl_loop.Config(group_size=1)
    with pytest.raises(ConfigurationError, match="group_size=1 gives every advantage 0"):
        rl_basic.Config(group_size=1)


def test_recipes_that_have_their_own_main_get_the_same_settings(tmp_path: Path):
    config = rl_basic.Config(renderer_name="chatml", log_path=str(tmp_path))
    older = rl_recipe.build_config(config, rl_basic.Data, "m", recipe_name="mine", lora_rank=3)
    config = recipe.complete(config, "m")
    data = recipe.fill(rl_basic.Data, config)
    assert older == recipe.rl(config, data, recipe_name="mine", lora_rank=3)
    assert (older.lora_rank, older.model_name, older.log_path) == (3, "m", str(tmp_path))


def test_a_run_directory_is_named_after_recipe_words_and_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", "/runs")
    config = recipe.complete(multiturn.Config(renderer_name="chatml"), "some/Model")
    assert re.fullmatch(r"/runs/multiturn/guess-number-model-[0-9a-f]{8}", config.log_path or "")


def check_report(output: str, rows: list[dict]) -> None:
    """The output shows before and after, every checkpoint with its use, and how to sample."""
    key = next(key for key in rows[-1] if key.endswith("reward/total"))
    assert f"\nheld-out reward  {rows[0][key]:.4f} -> {rows[-1][key]:.4f}\n" in output
    [weights] = re.findall(r"\nweights  (tinker://\S+/sampler_weights/final)  ", output)
    state = weights.replace("/sampler_weights/", "/weights/")
    assert f"\nstate    {state}  (to continue training: load_checkpoint_path=...)\n" in output
    assert f"\ndownload tinker checkpoint download {state}\n" in output
    assert "\nsample   tinker-cookbook sample tinker://" in output
    assert re.search(r"Write exactly . words about .*\n  before: .*\n  after:  ", output)


def check_names(recipe: str, service, log_path: Path) -> None:
    """The session and the run on the service have the run's name."""
    import tinker

    name = f"{recipe} {log_path.name} lr=0.0005"
    [final] = [r for r in read_rows(log_path / "checkpoints.jsonl") if r.get("final")]
    rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
    run = rest.get_training_run_by_tinker_path(final["state_path"]).result()
    if recipe == "rl_basic":
        assert (run.user_metadata or {})["run_name"] == name
    session_id = final["state_path"].removeprefix("tinker://").partition(":")[0]
    assert rest.get_session(session_id).result().display_name == name


@pytest.mark.parametrize("key", ["groups_per_batch", "num_batches", "max_tokens", "max_steps"])
def test_sizes_are_checked_before_anything_starts(key: str):
    for module in (rl_basic, rl_loop):
        if hasattr(module.Config, key):
            with pytest.raises(ConfigurationError, match=f"{key}=0 is less than 1; use 1 or more"):
                module.Config(**{key: 0})


@pytest.mark.parametrize("module", [rl_basic, rl_loop])
def test_recipes_run(
    module, local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    settings = {"model_name": local_service.model, "base_url": local_service.base_url, **SMALL}
    settings |= {"renderer_name": "chatml", "log_path": tmp_path / "run"}
    words = [f"{key}={value}" for key, value in settings.items()]
    run_in_this_process(module, words)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert any("reward" in key and key.startswith("test/") for key in rows[-1])
    check_report(capsys.readouterr().out, rows)
    check_names(module.__name__.rpartition(".")[2], local_service, tmp_path / "run")
    run_in_this_process(module, words)
    assert "already complete" in capsys.readouterr().out
