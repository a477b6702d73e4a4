"""Command lines of recipes: parsing, hints, help, errors in one line."""

from pathlib import Path
from typing import Literal

import chz
import pytest

from tinker_cookbook import cli_utils
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.settings_help import read_settings_of, type_choices


@chz.chz
class Config:
    """Settings for the tests."""

    learning_rate: float = chz.field(default=1e-4, doc="Peak learning rate.")
    num_epochs: int = chz.field(default=1, doc="Passes.")
    max_steps: int | None = chz.field(default=None, doc="Steps.")
    lr_schedule: Literal["linear", "cosine"] = chz.field(default="linear", doc="Shape.")
    names: list[str] = chz.field(default_factory=list, doc="Words.")
    shuffle: bool = chz.field(default=True, doc="Mix.")


@chz.chz
class NeedsOne:
    file_path: str


def test_values_are_parsed_by_type():
    words = ["learning_rate=3e-4", "--num-epochs=2", "max_steps=None", "names=a,b", "shuffle=False"]
    config = cli_utils.parse_config(Config, words)
    assert config == Config(learning_rate=3e-4, num_epochs=2, names=["a", "b"], shuffle=False)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rat=1", "Did you mean learning_rate=1?"),
        ("lr=1e-3", "Did you mean learning_rate=1e-3?"),
        ("epochs=3", "Did you mean num_epochs=3?"),
        ("zzz=1", "not a setting of this recipe"),
        ("num_epochs=two", "num_epochs=two has the wrong type; it must be int"),
        ("max_steps=many", "it must be int | None"),
        ("lr_schedule=lin", "use one of linear, cosine. Did you mean linear? lr_schedule: "),
        ("shuffle=maybe", "it must be bool"),
        ("learning_rate", "write key=value"),
        ("=3", "write key=value"),
        ("names=", "names= has no value; give one, or leave the key out"),
        ("seed.x=3", "seed.x=3 is not a setting of this recipe"),
        ("shuffle.x=3", "shuffle has no part of that name"),
    ],
)
def test_mistakes_are_explained(word: str, message: str):
    with pytest.raises(ConfigurationError) as caught:
        cli_utils.parse_config(Config, [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigurationError, match="file_path"):
        cli_utils.parse_config(NeedsOne, [])


def run_it(config: Config) -> None:
    if config.num_epochs == 7:
        raise ConfigurationError("num_epochs=7 is unlucky; use another.")
    if config.num_epochs == 8:
        raise KeyboardInterrupt
    print(f"ran {config.num_epochs}")


def test_entrypoint_runs_and_reports_in_one_line(capsys):
    cli_utils.entrypoint(run_it, ["num_epochs=3"])
    assert capsys.readouterr().out == "ran 3\n"
    with pytest.raises(SystemExit) as stop:
        cli_utils.entrypoint(run_it, ["num_epochs=7"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "ConfigurationError: num_epochs=7 is unlucky; use another.\n"
    with pytest.raises(SystemExit) as stop:
        cli_utils.entrypoint(run_it, ["num_epochs=8"])
    assert stop.value.code == 130
    assert "\ninterrupted" in capsys.readouterr().err


def test_a_refused_request_is_reported_in_one_line(capsys, shared_client, local_service):
    import tinker

    def ask(config: Config) -> None:
        sampler = shared_client.create_sampling_client(base_model=local_service.model).result()
        params = tinker.SamplingParams(max_tokens=10**6)
        sampler.sample(tinker.ModelInput.from_ints([1, 2]), config.num_epochs, params).result()

    with pytest.raises(SystemExit) as stop:
        cli_utils.entrypoint(ask, [])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("TrainingError: the service refused a request: max_tokens=1000000 and")
    assert "request_id" not in line


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_shows_every_key_with_its_doc(capsys, word: str):
    cli_utils.entrypoint(run_it, ["num_epochs=3", word])
    out = capsys.readouterr().out
    assert out.startswith("Command lines of recipes")
    for field in chz.chz_fields(Config).values():
        assert field.logical_name in out
        assert field._doc in out
    assert max(map(len, out.splitlines())) <= 110


def test_model_name_from_argv():
    assert cli_utils.model_name_from_argv(["a=1"], "d") == "d"
    assert cli_utils.model_name_from_argv(["model_name=x", "--model-name=y"], "d") == "y"


def test_check_log_dir(tmp_path: Path):
    cli_utils.check_log_dir(str(tmp_path / "new"), "raise")
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigurationError, match="already holds a run"):
        cli_utils.check_log_dir(str(tmp_path), "ask")
    cli_utils.check_log_dir(str(tmp_path), "resume")
    cli_utils.check_log_dir(str(tmp_path), "delete")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bundled_files_are_found_near_a_recipe_or_in_the_package(tmp_path: Path):
    recipe = str(tmp_path / "recipe.py")
    installed = cli_utils.bundled_file("conversations.jsonl", recipe)
    assert installed == cli_utils.bundled_file("conversations.jsonl", beside=recipe)  # of copies
    assert installed.stat().st_size > 10_000
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "conversations.jsonl"
    own.write_text("")
    assert cli_utils.bundled_file("conversations.jsonl", recipe) == own
    with pytest.raises(ConfigurationError, match="data="):
        cli_utils.bundled_file("nothing.jsonl", recipe)


def test_an_enum_is_explained_by_the_values_that_users_type():
    from recipes.code_rl.__main__ import Config as CodeConfig

    setting = read_settings_of(CodeConfig)["sandbox"]
    assert setting.default == "local"
    assert type_choices(setting.type_text) == ["local", "sandboxfusion", "modal"]
    with pytest.raises(ConfigurationError, match="use one of local, sandboxfusion, modal"):
        cli_utils.parse_config(CodeConfig, ["sandbox=docker"])


def test_a_loss_that_not_every_service_has_is_marked():
    from recipes.rl_basic import Config as RLConfig

    with pytest.raises(ConfigurationError) as caught:
        cli_utils.parse_config(RLConfig, ["loss_fn=ppoo"])
    message = str(caught.value)
    assert "use one of importance_sampling, ppo, cispo" in message
    assert "Did you mean ppo?" in message
    assert "Not every service has stable_reinforce; the local one has all others." in message
