"""What the page is told about runs, and what a saved page contains."""

import base64
import gzip
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.viewer.runs import ATTACK, write_rl, write_supervised
from tinker_cookbook import cli
from tinker_cookbook.eval.benchmarks import BenchmarkResult
from tinker_cookbook.eval.eval_store import EvalStore
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.stores import LocalStorage, RunRegistry
from tinker_cookbook.viewer.answers import Answers
from tinker_cookbook.viewer.server import open_server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "home"))
    write_supervised(tmp_path / "runs", "sl_basic/one", 6, 1e-2)
    write_supervised(tmp_path / "runs", "sl_basic/two", 4, 1e-3)
    write_rl(tmp_path / "runs", "rl_basic/three")
    return tmp_path / "runs"


@pytest.fixture
def answers(root: Path) -> Answers:
    return Answers(RunRegistry([LocalStorage(root)]))


def test_runs_have_their_state_and_their_newest_value(answers: Answers):
    runs = {run["id"]: run for run in answers.runs()}
    assert sorted(runs) == ["rl_basic/three", "sl_basic/one", "sl_basic/two"]
    one = runs["sl_basic/one"]
    assert (one["state"], one["step"], one["metric"]) == ("completed", 6, "test/nll")
    assert runs["rl_basic/three"]["state"] == "failed", "nothing uses it, and it has no final one"
    assert runs["rl_basic/three"]["iterations"] == 2


def test_a_change_of_a_run_changes_its_version(answers: Answers, root: Path):
    before = {run["id"]: run["version"] for run in answers.runs()}
    write_supervised(root, "sl_basic/two", 2, 1e-3)
    after = {run["id"]: run["version"] for run in answers.runs()}
    changed = [run for run in before if before[run] != after[run]]
    assert changed == ["sl_basic/two"]


def test_curves_of_several_runs_and_metrics(answers: Answers):
    runs = ["sl_basic/one", "sl_basic/two", "rl_basic/three"]
    found = answers.curves(runs, ["test/nll", "env/all/reward/total"], 100)
    assert found["test/nll"]["sl_basic/one"]["x"] == [0, 2, 4]
    assert sorted(found["test/nll"]) == ["sl_basic/one", "sl_basic/two"]
    assert found["env/all/reward/total"]["rl_basic/three"]["y"] == [0.25, 0.75]
    part = answers.curves(runs[:1], ["train_mean_nll"], 100, (2, 3))["train_mean_nll"]
    assert part["sl_basic/one"]["x"] == [1, 2, 3, 4], "one more point at each end"


def test_the_details_of_a_run(answers: Answers):
    found = answers.run("sl_basic/one")
    assert found["settings"]["learning_rate"] == 1e-2
    assert [sample["answer"] for sample in found["samples"]] == ["answer 0", "answer 6"]
    times = {row["name"]: row["mean"] for row in found["times"]}
    assert times == {"total": 2.0, "step": 2.0, "forward_backward": 1.5}
    assert found["timed_steps"] == [5]
    spans = answers.spans("sl_basic/one", 5)
    assert [(span["name"], span["start"], span["seconds"]) for span in spans] == [
        ("forward_backward", 0.0, 1.5),
        ("optim_step", 1.5, 0.5),
    ]
    assert found["checkpoints"][0]["name"] == "final"


def test_rollouts_have_their_tokens_and_errors(answers: Answers):
    first, second = answers.rollouts("rl_basic/three", 1, "train")
    assert [each["reward"] for each in second["rollouts"]] == [2.0, 3.0]
    assert second["errors"] == [f"EnvError: {ATTACK}"]
    assert "tokens" not in first["rollouts"][0]["turns"][0]
    turn = first["rollouts"][1]["turns"][0]
    assert "".join(turn["tokens"]) == turn["reply"]
    assert turn["trainer"] == [-0.5, -0.02, -2.0]
    assert answers.run("rl_basic/three")["iterations"][1] == {"step": 1, "splits": ["train"]}


def test_stored_evaluations_are_listed(answers: Answers, root: Path):
    result = BenchmarkResult("arithmetic", 0.5, 10, 5)
    store = EvalStore(root / "evals")
    name = store.create_run("org/model", ["arithmetic"])
    store.write_result(name, result)
    (row,) = answers.evaluations()
    assert (row["benchmark"], row["model"], row["numbers"]["score"]) == (
        "arithmetic",
        "org/model",
        0.5,
    )
    opened = RunRegistry([LocalStorage(root)]).get_eval_store()
    assert opened is not None
    assert [each.run_id for each in opened.list_runs()] == [name]


def test_a_saved_page_contains_everything_and_no_markup_of_the_data(root: Path, tmp_path: Path):
    target = tmp_path / "page.html"
    assert cli.main(["view", str(root), "--html", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert ATTACK not in text
    assert not re.search(r"(src|href)=\"http", text), "nothing is fetched"
    found = re.search(r'<script id="data" type="text/plain">([^<]+)</script>', text)
    assert found is not None
    data = json.loads(gzip.decompress(base64.b64decode(found[1])))
    assert data["curves"]["test/nll"]["sl_basic/one"]["x"] == [0, 2, 4]
    assert data["curves"]["axis/seconds"]["sl_basic/one"]["y"][-1] == 12.0
    assert data["rollouts"]['["rl_basic/three",1,"train"]'][0]["rollouts"][1]["reward"] == 1.0


def test_compare_shows_the_named_runs_only(root: Path, tmp_path: Path):
    target = tmp_path / "page.html"
    words = ["runs", "compare", "one", str(root / "rl_basic" / "three"), "--folder", str(root)]
    assert cli.main([*words, "--html", str(target)]) == 0
    found = re.search(r'<script id="data" type="text/plain">([^<]+)', target.read_text())
    assert found is not None
    data = json.loads(gzip.decompress(base64.b64decode(found[1])))
    assert sorted(run["id"].rpartition("/")[2] for run in data["runs"]) == ["one", "three"]


@pytest.fixture
def url(answers: Answers) -> Iterator[str]:
    server = open_server(answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url: str, path: str, words: dict[str, object] | None = None, **headers: str) -> bytes:
    body = None if words is None else urlencode(words, doseq=True).encode()
    request = urllib.request.Request(f"{url}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def test_the_server_answers_its_page(url: str):
    assert b"<title>Runs</title>" in ask(url, "/")
    runs = json.loads(ask(url, "/api/runs", {}))
    assert len(runs) == 3
    words = {"run": ["sl_basic/one"], "metric": ["test/nll"], "parts": 10, "first": 2, "last": 3}
    assert json.loads(ask(url, "/api/curves", words))["test/nll"]["sl_basic/one"]["x"] == [0, 2, 4]


@pytest.mark.parametrize(
    ("path", "words", "headers", "status"),
    [
        ("/", None, {"Host": "evil.example"}, 403),
        ("/api/runs", {}, {"Host": "evil.example:80"}, 403),
        ("/api/runs", {}, {"Origin": "http://evil.example"}, 403),
        ("/api/secrets", {}, {}, 404),
        ("/etc/passwd", None, {}, 404),
        ("/api/run", {"run": "../../etc"}, {}, 400),
        ("/api/rollouts", {"run": "rl_basic/three", "step": 1, "split": "../../x"}, {}, 400),
        ("/api/rollouts", {"run": "rl_basic/three", "step": "x", "split": "train"}, {}, 400),
        ("/api/curves", {"run": "sl_basic/one", "metric": "a"}, {}, 400),
    ],
)
def test_other_questions_are_refused(
    url: str, path: str, words: dict[str, object] | None, headers: dict[str, str], status: int
):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, path, words, **headers)
    assert error.value.code == status
    error.value.close()


def test_a_run_that_is_deleted_while_it_is_shown(url: str, root: Path):
    words = {"run": ["sl_basic/two"], "metric": ["test/nll"], "parts": 10}
    ask(url, "/api/curves", words)
    LocalStorage(root).remove_dir("sl_basic/two")
    assert json.loads(ask(url, "/api/curves", words)) == {"test/nll": {}}
    assert len(json.loads(ask(url, "/api/runs", {}))) in (2, 3)


def test_a_port_in_use_is_named(answers: Answers, url: str):
    with pytest.raises(ConfigurationError, match=url.rpartition(":")[2]):
        open_server(answers, port=int(url.rpartition(":")[2]))
