"""Benchmarks against an OpenAI-compatible endpoint: the local service, and a scripted server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServiceProcess
from tinker_cookbook import cli
from tinker_cookbook.completers import ContextOverflowError
from tinker_cookbook.eval import BenchmarkConfig, EndpointClient, endpoint_format, run_benchmark
from tinker_cookbook.eval.benchmarks import load_trajectories
from tinker_cookbook.exceptions import ConfigurationError, EvalError, TrainingError
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.renderers.types import Message

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
ENDINGS = {"question": "What is it?", "choices": ["a dog", "a fox runs"], "label": 1}


class Scripted(BaseHTTPRequestHandler):
    """Answers with `answers` in turn; keeps the requests."""

    answers: list[tuple[int, Any]]
    requests: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((str(self.headers.get("Authorization")), body))
        status, answer = self.answers.pop(0)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def scripted() -> Iterator[tuple[type[Scripted], EndpointClient]]:
    handler = type("Handler", (Scripted,), {"answers": [], "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, EndpointClient(f"http://127.0.0.1:{server.server_port}/v1", "some-model")
    server.shutdown()


@pytest.fixture
def endpoint(local_service: ServiceProcess, monkeypatch) -> EndpointClient:
    monkeypatch.setenv("SERVICE_KEY", local_service.api_key)
    return EndpointClient(
        f"{local_service.base_url}/oai/api/v1", local_service.model, api_key_env="SERVICE_KEY"
    )


def replies(*texts: str, reason: str = "stop") -> tuple[int, Any]:
    choices = [{"message": {"content": text}, "finish_reason": reason} for text in texts]
    return 200, {"choices": choices, "usage": {"completion_tokens": 3 * len(texts)}}


@pytest.mark.anyio
async def test_questions_are_asked_in_messages_and_cut_replies_are_counted(
    endpoint: EndpointClient, tmp_path: Path
) -> None:
    config = BenchmarkConfig(
        max_examples=3, max_tokens=5, num_samples=2, temperature=1.0, save_dir=str(tmp_path)
    )
    result = await run_benchmark("arithmetic", endpoint, endpoint_format(), config)
    assert (result.num_examples, result.num_errors, result.num_truncated) == (3, 0, 6)
    found = load_trajectories(str(tmp_path), "arithmetic")
    first, second = found[:2]
    assert first.example_id == second.example_id
    assert first.turns[0].content == second.turns[0].content
    assert first.reply != second.reply
    assert first.turns[-1].token_count == 5
    assert first.turns[-1].metadata["stop_reason"] == "length"
    again = await run_benchmark("arithmetic", endpoint, endpoint_format(), config)
    assert again.num_truncated == 6
    assert load_trajectories(str(tmp_path), "arithmetic") == found, "nothing was sampled again"


@pytest.mark.anyio
async def test_an_endpoint_scores_endings_as_the_service_does(
    endpoint: EndpointClient, service_client, tmp_path: Path
) -> None:
    created = service_client.create_sampling_client(base_model=endpoint.model)
    client = created.result() if hasattr(created, "result") else created
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(ENDINGS) + "\n")
    rows = []
    for name, model, renderer in (
        ("tokens", client, load_renderer("chatml", endpoint.model)),
        ("endpoint", endpoint, endpoint_format()),
    ):
        config = BenchmarkConfig(save_dir=str(tmp_path / name), data={"truthfulqa": str(data)})
        await run_benchmark("truthfulqa", model, renderer, config)
        (found,) = load_trajectories(str(tmp_path / name), "truthfulqa")
        rows.append([turn.metadata for turn in found.turns[1:]])
    for by_tokens, by_text in zip(*rows, strict=True):
        assert by_text["logprob"] == pytest.approx(by_tokens["logprob"], abs=1e-3)
        assert by_text["num_tokens"] == by_tokens["num_tokens"]


@pytest.mark.anyio
async def test_fewer_choices_than_asked_for_are_asked_again(scripted) -> None:
    server, client = scripted
    server.answers += [replies("a"), replies("b", "c")]
    found = await client.chat(HELLO, num_samples=3, max_tokens=7, seed=4)
    assert [each.message["content"] for each in found] == ["a", "b", "c"]
    assert [each.num_tokens for each in found] == [3, 3, 3]
    asked = [body for _, body in server.requests]
    assert [(body.get("n"), body["seed"]) for body in asked] == [(3, 4), (2, 5)]


@pytest.mark.anyio
async def test_the_newer_name_of_the_token_limit_is_used_if_asked_for(scripted) -> None:
    server, client = scripted
    refusal = {"error": "Unsupported parameter: use 'max_completion_tokens' instead."}
    server.answers += [(400, refusal), replies("a"), replies("b")]
    await client.chat(HELLO, max_tokens=7)
    await client.chat(HELLO, max_tokens=8)
    assert [body.get("max_completion_tokens") for _, body in server.requests] == [None, 7, 8]


@pytest.mark.anyio
async def test_the_key_and_images_are_sent(scripted, monkeypatch) -> None:
    server, client = scripted
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers.append(replies("a"))
    picture: Message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "What?"},
            {"type": "image", "image": "data:image/png;base64,AA"},
        ],
    }
    await client.chat([picture], max_tokens=7)
    ((key, body),) = server.requests
    assert key == "Bearer secret"
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    assert "secret" not in repr(client)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((503, {}), TrainingError, "status 503"),
        ((401, {}), ConfigurationError, "refused the request"),
        ((400, {"error": "maximum context length is 9"}), ContextOverflowError, "context length"),
        ((200, {"no": "choices"}), ConfigurationError, "usually ends in /v1"),
        ((200, {"choices": []}), (ConfigurationError, TrainingError), "chat/completions"),
    ],
)
async def test_failures_are_told_apart(scripted, answer, kind, words: str) -> None:
    server, client = scripted
    server.answers.append(answer)
    with pytest.raises(kind, match=words):
        await client.chat(HELLO, max_tokens=7)


@pytest.mark.anyio
@pytest.mark.parametrize("logprobs", [None, {"text_offset": [15], "token_logprobs": [-1.0]}])
async def test_an_endpoint_without_prompt_scores_is_told(scripted, logprobs) -> None:
    server, client = scripted
    server.answers.append((200, {"choices": [{"text": "x", "logprobs": logprobs}]}))
    with pytest.raises(ConfigurationError, match="returns no log probabilities of the prompt"):
        await client.score_ending("Q: What?", " a dog")


@pytest.mark.anyio
async def test_a_busy_endpoint_is_tried_again_and_a_refusal_is_not(scripted) -> None:
    server, client = scripted
    config = BenchmarkConfig(max_examples=1, max_tokens=9, retry_pause_seconds=0.0)
    server.answers += [(429, {}), replies("7")]
    result = await run_benchmark("arithmetic", client, endpoint_format(), config)
    assert (result.num_errors, len(server.requests)) == (0, 2)
    server.answers.append((404, {"error": "no such model"}))
    with pytest.raises(EvalError, match="no such model"):
        await run_benchmark("arithmetic", client, endpoint_format(), config)
    assert server.answers == []


def test_the_command_takes_an_endpoint_and_a_folder(
    local_service: ServiceProcess, endpoint: EndpointClient, monkeypatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", str(tmp_path / "runs"))
    words = ["eval", "--max-tokens", "4", "--max-examples", "2"]
    at = ["--endpoint", endpoint.base_url, "--api-key-env", "SERVICE_KEY"]
    assert cli.main([*words, *at, "--model", endpoint.model]) == 0
    assert "arithmetic  0.000 ± 0.000      0/2          2" in capsys.readouterr().out
    assert cli.main([*words, *at]) == 2
    assert "needs --model NAME" in capsys.readouterr().err
    assert cli.main([*words, *at, "--model", "x", "tinker://a/weights/b"]) == 2
    assert "are two models; give one of them" in capsys.readouterr().err
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)  # not used for a folder
    assert cli.main([*words, "--renderer", "chatml", local_service.model]) == 0
    shown = capsys.readouterr().out
    assert "local, started for this run" in shown
    assert "2/2" not in shown
