"""Settings from a file: YAML, JSON, or the config.json of a run; words win over them."""

import json
from pathlib import Path

import chz
import pytest

from tinker_cookbook import cli_utils
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.directory import open_log_dir
from tinker_cookbook.utils.ml_log import JsonLogger


@chz.chz
class Inner:
    depth: int = 1


@chz.chz
class Config:
    learning_rate: float | None = None
    num_epochs: int = 1
    shuffle: bool = True
    file_path: str | None = "a.jsonl"
    names: list[str] = chz.field(default_factory=list)
    inner: Inner = chz.field(default_factory=Inner)
    log_path: str | None = None
    behavior_if_log_dir_exists: str = "ask"


YAML = """
learning_rate: 1e-4
num_epochs: 3
shuffle: no
file_path: null
names: [a, b]
inner:
  depth: 4
"""
EXPECTED = Config(
    learning_rate=1e-4,
    num_epochs=3,
    shuffle=False,
    file_path=None,
    names=["a", "b"],
    inner=Inner(depth=4),
)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"config={path}"


def test_yaml_and_json_say_the_same(tmp_path: Path):
    word = write(tmp_path / "run.yaml", YAML)
    assert cli_utils.parse_config(Config, [word]) == EXPECTED
    settings = {"learning_rate": 1e-4, "num_epochs": 3, "shuffle": False, "file_path": None}
    settings |= {"names": ["a", "b"], "inner": {"depth": 4}}
    word = write(tmp_path / "run.json", json.dumps(settings))
    assert cli_utils.parse_config(Config, [word]) == EXPECTED


@pytest.mark.parametrize("first", [True, False])
def test_words_win_over_the_file(tmp_path: Path, first: bool):
    words = [write(tmp_path / "run.yml", YAML)]
    words.insert(0 if first else 1, "num_epochs=9")
    config = cli_utils.parse_config(Config, [*words, "inner.depth=5"])
    assert config == chz.replace(EXPECTED, num_epochs=9, inner=Inner(depth=5))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "num_epoch: 3", "a.yaml: num_epoch=3 is not a setting of this recipe"),
        ("a.yaml", "num_epoch: 3", "Did you mean num_epochs=3?"),
        ("a.yaml", "lr: 3", "Did you mean learning_rate=3?"),
        ("a.json", '{"num_epochs": "many"}', "num_epochs=many has the wrong type"),
        ("a.json", '{"num_epochs": 3', "a.json is not JSON"),
        ("a.yaml", "a: [", "a.yaml is not YAML"),
        ("a.json", "[1]", "a.json holds a list; it must hold settings by their keys"),
        ("a.yaml", "just words", "a.yaml holds a str"),
        ("a.json", '{"names": [{"a": 1}]}', "names is a list with values other than"),
        ("a.json", "\udcff", "is not JSON"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, name: str, text: str, message: str):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError) as caught:
        cli_utils.parse_config(Config, [f"config={path}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigurationError, match=r"config=none\.yaml cannot be read \(No such"):
        cli_utils.parse_config(Config, ["config=none.yaml"])


def test_a_folder_stands_for_the_config_of_its_run(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"the folder of a run, which has a config\.json"):
        cli_utils.parse_config(Config, [f"config={tmp_path}"])
    (tmp_path / "config.json").write_text('{"num_epochs": 9}')
    assert cli_utils.parse_config(Config, [f"config={tmp_path}"]) == Config(num_epochs=9)


@chz.chz
class Derived:
    """What a recipe makes of its settings."""

    rate: float
    log_path: str


def run_it(config: Config) -> None:
    with open_log_dir(config.log_path or "", "resume") as folder:
        JsonLogger(folder).log_hparams(Derived(rate=config.learning_rate or 0.5, log_path="x"))


def test_the_config_of_a_run_gives_its_settings_again(tmp_path: Path):
    log_path = tmp_path / "run"
    words = [f"log_path={log_path}", "num_epochs=7", "names=a,b", "file_path=my file.jsonl"]
    words.append("behavior_if_log_dir_exists=delete")
    cli_utils.entrypoint(run_it, words)
    config = cli_utils.parse_config(Config, [f"config={log_path / 'config.json'}"])
    assert config == Config(
        log_path=str(log_path), num_epochs=7, names=["a", "b"], file_path="my file.jsonl"
    )
    # what was to be deleted then is not deleted again
    assert config.behavior_if_log_dir_exists == "ask"
