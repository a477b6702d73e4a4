import asyncio
import http.server
import json
import threading
from typing import Any

import pytest
import tinker

from tinker_cookbook import renderers
from tinker_cookbook.completers import (
    ContextOverflowError,
    OpenAIMessageCompleter,
    TinkerMessageCompleter,
    TinkerTokenCompleter,
    TokensWithLogprobs,
    derive_seed,
)
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, TrainingError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.metrics import score_sequences
from tinker_cookbook.tokenizer_utils import get_tokenizer

PROMPT = tinker.ModelInput.from_ints([5, 6, 7, 8])


@pytest.fixture(scope="module")
def sampling_client(shared_client, local_service):
    return shared_client.create_sampling_client(base_model=local_service.model).result()


def sample(completer: TinkerTokenCompleter, **kwargs) -> TokensWithLogprobs:
    return asyncio.run(completer(PROMPT, [], **kwargs))


def test_a_reply_has_tokens_logprobs_and_a_reason(sampling_client):
    reply = sample(TinkerTokenCompleter(sampling_client, max_tokens=6))
    assert len(reply.tokens) == len(reply.logprobs) == 6
    assert all(logprob <= 0 for logprob in reply.logprobs)
    assert reply.stop_reason == "length"
    assert reply.sequence_id


class HalfAClient:
    """As tests of programs make it: one method, by the name that ends in `_async`."""

    def __init__(self, inner: tinker.SamplingClient) -> None:
        self._inner = inner

    async def sample_async(self, **kwargs) -> tinker.SampleResponse:
        return await self._inner.sample(**kwargs)


class Recorder:
    """Passes everything on to a client, and notes what is sampled."""

    def __init__(self, inner: tinker.SamplingClient) -> None:
        self._inner = inner
        self.num_samples = 0

    def sample(self, **kwargs):
        self.num_samples += 1
        return self._inner.sample(**kwargs)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def test_clients_of_ones_own_may_have_half_of_the_methods(sampling_client):
    half: Any = HalfAClient(sampling_client)
    expected = sample(TinkerTokenCompleter(sampling_client, max_tokens=6, seed=3)).tokens
    assert sample(TinkerTokenCompleter(half, max_tokens=6, seed=3)).tokens == expected
    [scores] = asyncio.run(score_sequences(half, [PROMPT]))
    assert len(scores) == 4
    recorder: Any = Recorder(sampling_client)
    assert sample(TinkerTokenCompleter(recorder, max_tokens=6, seed=3)).tokens == expected
    assert recorder.num_samples == 1
    nothing: Any = object()
    with pytest.raises(AttributeError, match="object has neither sample nor sample_async"):
        sample(TinkerTokenCompleter(nothing, max_tokens=6))


def test_the_smaller_limit_holds(sampling_client):
    completer = TinkerTokenCompleter(sampling_client, max_tokens=6, context_window=9)
    assert len(sample(completer, max_tokens=3).tokens) == 3
    assert len(sample(completer, max_tokens=9).tokens) == 5


def test_a_prompt_that_fills_the_context_is_refused(sampling_client):
    completer = TinkerTokenCompleter(sampling_client, max_tokens=6, context_window=4)
    with pytest.raises(ContextOverflowError, match=r"prompt of 4 tokens.*context of 4 "):
        sample(completer)


def test_a_seed_fixes_every_reply_of_a_rollout(sampling_client):
    def draw(*names: int) -> list[list[int]]:
        completer = TinkerTokenCompleter(sampling_client, 8, seed=3).for_rollout(*names)
        return [asyncio.run(completer(PROMPT, [])).tokens for _ in range(2)]

    assert draw(0, 0) == draw(0, 0)
    first, second = draw(0, 0)
    assert first != second
    assert draw(0, 0) != draw(1, 0)
    free = TinkerTokenCompleter(sampling_client, 8)
    assert free.for_rollout(1) is free


def test_seeds_depend_on_every_name():
    assert derive_seed(1, "train", 2) == derive_seed(1, "train", 2)
    assert len({derive_seed(s, n, i) for s in (1, 2) for n in ("a", "b") for i in range(50)}) == 200


def test_logprobs_that_are_missing_are_asked_for_in_vain():
    with pytest.raises(DataValidationError, match="logprobs=None"):
        _ = TokensWithLogprobs([1], None).logprobs


def test_messages_are_rendered_and_parsed(sampling_client, local_service):
    renderer = renderers.get_renderer("chatml", get_tokenizer(local_service.model))
    completer = TinkerMessageCompleter(sampling_client, renderer, max_tokens=5)
    reply = asyncio.run(completer([{"role": "user", "content": "hello"}]))
    assert reply["role"] == "assistant"
    assert set(reply) <= {"role", "content", "tool_calls"}


class ChatServer(http.server.BaseHTTPRequestHandler):
    """Answers like a chat completions server, after as many failures as it is told."""

    failures: list[int] = []  # noqa: RUF012 - shared with the handlers on purpose
    seen: list[dict] = []  # noqa: RUF012
    reply: dict = {"content": "4"}  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status = self.failures.pop(0) if self.failures else 200
        answer = {"choices": [{"message": {"role": "assistant", **self.reply}}]}
        payload = json.dumps(answer if status == 200 else {"error": "no such model"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch):
    ChatServer.failures, ChatServer.seen, ChatServer.reply = [], [], {"content": "4"}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ChatServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def ask(base_url: str, **settings):
    completer = OpenAIMessageCompleter(base_url, "judge", first_pause_seconds=0.01, **settings)
    return asyncio.run(completer([{"role": "user", "content": "2 + 2?"}]))


def test_any_chat_server_can_judge(chat_server: str):
    assert ask(chat_server, temperature=0.0) == {"role": "assistant", "content": "4"}
    (seen,) = ChatServer.seen
    assert seen["path"] == "/v1/chat/completions"
    assert seen["key"] == "Bearer secret"
    assert seen["messages"] == [{"role": "user", "content": "2 + 2?"}]
    assert seen["temperature"] == 0.0


def test_tool_calls_come_back(chat_server: str):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    ChatServer.reply = {"content": None, "tool_calls": [call | {"index": 0}]}
    reply = ask(chat_server)
    (found,) = reply.get("tool_calls", [])
    assert found.function.name == "add"
    assert reply["content"] == ""


def test_a_busy_server_is_asked_again(chat_server: str):
    ChatServer.failures = [429, 503]
    assert ask(chat_server)["content"] == "4"
    assert len(ChatServer.seen) == 3


def test_a_refusal_is_not_repeated(chat_server: str):
    ChatServer.failures = [404]
    with pytest.raises(TrainingError, match=r"status 404.*no such model"):
        ask(chat_server)
    assert len(ChatServer.seen) == 1


def test_addresses_are_checked():
    with pytest.raises(ConfigurationError, match="'localhost:8000' is not an address"):
        OpenAIMessageCompleter("localhost:8000", "judge")


def test_the_local_service_can_judge(local_service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", local_service.api_key)
    address = f"{local_service.base_url}/oai/api/v1"
    judge = OpenAIMessageCompleter(
        address, local_service.model, max_tokens=4, temperature=0.0, api_key_env="JUDGE_KEY"
    )
    messages: list[Message] = [{"role": "user", "content": "A or B?"}]
    first, second = (asyncio.run(judge(messages)) for _ in range(2))
    assert first == second
    assert first["role"] == "assistant"
    assert first["content"]
    unknown = OpenAIMessageCompleter(address, "no-model", api_key_env="JUDGE_KEY")
    with pytest.raises(TrainingError, match=r"status 404.*no-model"):
        asyncio.run(unknown(messages))
