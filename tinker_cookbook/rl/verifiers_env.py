"""Environments of the package `verifiers` (0.1): `pip install 'tinker-cookbook[verifiers]'`.

An environment of verifiers asks a client for replies, while the environments here are given replies
step by step. Each episode therefore runs as a task whose client waits for the reply that is sampled
here. So tokens, log probabilities and the merging of turns are the same as in other environments.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import chz

from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message, ToolCall, ToolSpec
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset

__all__ = ["VerifiersDatasetBuilder", "VerifiersEnv", "VerifiersGroup"]

DeclareTools = Callable[[list[Message], list[ToolSpec]], list[Message]]
Record = dict[str, Any]
"""A JSON object: a row of data, a message, the output of an episode."""


class VerifiersTool(Protocol):
    """A tool declaration of verifiers."""

    name: str
    description: str
    parameters: Mapping[str, object]


class VerifiersTask(Protocol):
    """The part of a `verifiers.Environment` that is used here."""

    def run_rollout(
        self, input: Record, client: object, model: str, sampling_args: Record
    ) -> Coroutine[object, object, Record]:
        """Run one episode and return its output: `reward`, `metrics`, and `error` if it failed."""
        ...

    def get_dataset(self) -> Sequence[Record]:
        """Return the rows to train on."""
        ...

    def get_eval_dataset(self) -> Sequence[Record]:
        """Return the held-out rows."""
        ...


class VerifiersEnv(MessageEnv):
    """One episode on one row of the environment's data, scored by the environment's rubric."""

    def __init__(
        self, environment: VerifiersTask, row: Record, declare_tools: DeclareTools
    ) -> None:
        """Set the row; the episode starts when the first prompt is asked for.

        Args:
            environment: A `verifiers.Environment`.
            row: A row of its data set: `prompt`, `example_id`, and what its rubric needs.
            declare_tools: Adds tool declarations to a conversation, as `Renderer.declare_tools`.
        """
        self._environment = environment
        self._row = row
        self._declare_tools = declare_tools
        self._requests: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._replies: asyncio.Queue[Message] = asyncio.Queue()
        self._said: list[tuple[tuple[str, str], Message]] = []
        """Replies by their identity in verifiers, so that each is rendered as it was sampled."""
        self._episode: asyncio.Task[Record] | None = None

    async def initial_observation(self) -> list[Message]:
        """Start the episode and return its first request."""
        client = _client_class()(self._answer)
        episode = self._environment.run_rollout(dict(self._row), client, "policy", {})
        self._episode = started = asyncio.ensure_future(episode)
        messages = await self._next_request(started)
        if messages is None:
            raise TrainingError(
                f"the episode of example {self._row.get('example_id')} ended before its first "
                f"request: {_problem(started)}"
            )
        return messages

    async def step(self, message: Message) -> MessageStepResult:
        """Pass on the reply, and wait for the next request or the end.

        Raises:
            TrainingError: if the environment failed.
        """
        episode = self._episode
        assert episode is not None, "initial_observation starts the episode"
        await self._replies.put(message)
        messages = await self._next_request(episode)
        if messages is not None:
            return MessageStepResult(0.0, False, messages)
        output = episode.result()
        if output.get("error"):
            raise TrainingError(f"the environment failed: {output['error']}")
        found = output.get("metrics") or {}
        metrics = {name: float(value) for name, value in found.items()}
        return MessageStepResult(float(output["reward"]), True, [], metrics)

    def cancel(self) -> None:
        """Cancel an episode that will not be continued."""
        if self._episode is not None:
            self._episode.cancel()

    async def _next_request(self, episode: asyncio.Task[Record]) -> list[Message] | None:
        """Return the next conversation to continue; None if the episode has ended."""
        waiting = asyncio.ensure_future(self._requests.get())
        await asyncio.wait({waiting, episode}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return None

    async def _answer(
        self, prompt: Sequence[object], tools: Sequence[VerifiersTool] | None
    ) -> object:
        """Return a reply to a prompt; called by the episode."""
        messages = [self._to_message(message) for message in prompt]
        specs: list[ToolSpec] = [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in tools or ()
        ]
        await self._requests.put(self._declare_tools(messages, specs))
        reply = await self._replies.get()
        message = _to_response_message(reply)
        self._said.append((_identity(message), reply))
        return _to_response(message)

    def _to_message(self, given: object) -> Message:
        record = _record_of(given)
        identity = _identity(given)
        for known, reply in self._said:
            if record["role"] == "assistant" and known == identity:
                return reply
        message: Message = {"role": record["role"], "content": _text(record.get("content"))}
        calls = record.get("tool_calls")
        if calls:
            message["tool_calls"] = [_to_tool_call(call) for call in calls]
        if record.get("tool_call_id"):
            message["tool_call_id"] = record["tool_call_id"]
        return message


@dataclass
class VerifiersGroup(EnvGroupBuilder):
    """One row, several times. It can be pickled: the environment is loaded where it is used."""

    data: VerifiersDatasetBuilder
    held_out: bool
    number: int
    made: list[VerifiersEnv] = field(default_factory=list)

    async def make_envs(self) -> Sequence[Env]:
        """Return new episodes of the row."""
        environment = await asyncio.to_thread(self.data.load)
        rows = environment.get_eval_dataset() if self.held_out else environment.get_dataset()
        row = rows[self.number % len(rows)]
        renderer = self.data.build_renderer()
        new = [
            VerifiersEnv(environment, row, renderer.declare_tools)
            for _ in range(self.data.group_size)
        ]
        self.made += new
        return [EnvFromMessageEnv(renderer, env, failed_parse_reward=0.0) for env in new]

    async def cleanup(self) -> None:
        """Cancel unfinished episodes."""
        while self.made:
            self.made.pop().cancel()

    def logging_tags(self) -> list[str]:
        """Return the name of the environment."""
        return [self.data.env_id]


@chz.chz
class VerifiersDatasetBuilder(RenderedDatasetBuilder):
    """The rows of an installed environment in order; its evaluation rows are held out."""

    env_id: str
    env_args: str = "{}"
    """Arguments of its `load_environment` as a JSON object."""
    num_batches: int
    test_problems: int = 0

    def load(self) -> VerifiersTask:
        """Return the environment, which is loaded once per process.

        Raises:
            ConfigurationError: without the package, or if the environment cannot be loaded.
        """
        return _load(self.env_id, self.env_args)

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return training and held-out rows."""
        await asyncio.to_thread(self.load)
        first = self.seed * self.num_batches * self.groups_per_batch
        trained = NumberedDataset(
            partial(VerifiersGroup, self, False),
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
            first=first,
        )
        if not self.test_problems:
            return trained, None
        held_out = NumberedDataset(
            partial(VerifiersGroup, self, True),
            num_batches=1,
            groups_per_batch=self.test_problems,
        )
        return trained, held_out


@functools.lru_cache(maxsize=4)
def _load(env_id: str, env_args: str) -> VerifiersTask:
    try:
        import verifiers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigurationError(
            f"env_id={env_id} needs the package verifiers; run pip install "
            "'tinker-cookbook[verifiers]'."
        ) from error
    try:
        return verifiers.load_environment(env_id, **json.loads(env_args))
    except Exception as error:  # loading runs code of the environment
        raise ConfigurationError(
            f"env_id={env_id} with env_args={env_args} cannot be loaded "
            f"({type(error).__name__}: {error}); install the environment, and check its arguments."
        ) from error


@functools.cache
def _client_class() -> type:
    """Return a client class of verifiers whose replies come from a function.

    It is defined here because its base class is in a package that takes long to import.
    """
    from verifiers.clients import Client  # pyright: ignore[reportMissingImports]

    class WaitingClient(Client):
        async def get_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any
        ) -> Any:
            return await self.client(prompt, tools)

        async def _unused(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("get_response does not use this method")

        to_native_tool = to_native_prompt = get_native_response = _unused
        raise_from_native_response = from_native_response = _unused

        def setup_client(self, config: Any) -> Any:
            raise NotImplementedError("the client is given")

        async def close(self) -> None:
            """Nothing is open."""

    return WaitingClient


def _to_response_message(reply: Message) -> object:
    """Return a reply as a message of verifiers."""
    from verifiers.types import ResponseMessage  # pyright: ignore[reportMissingImports]
    from verifiers.types import ToolCall as Call  # pyright: ignore[reportMissingImports]

    calls = [
        Call(id=call.id or f"call_{i}", name=call.function.name, arguments=call.function.arguments)
        for i, call in enumerate(reply.get("tool_calls") or ())
    ]
    return ResponseMessage(
        content=get_text_content(reply),
        tool_calls=calls or None,
        finish_reason="tool_calls" if calls else "stop",
        is_truncated=False,
    )


def _to_response(message: object) -> object:
    """Return the whole response that a client of verifiers gives."""
    from verifiers.types import Response  # pyright: ignore[reportMissingImports]

    return Response(id="", created=int(time.time()), model="policy", message=message)


def _record_of(message: object) -> Record:
    """Return a message as a JSON object; verifiers has dicts and pydantic models."""
    dump = getattr(message, "model_dump", None)
    if dump is not None:
        return dump(exclude_none=True)
    assert isinstance(message, dict), "a message is a dict or a pydantic model"
    return message


def _identity(message: object) -> tuple[str, str]:
    """Return text and tool calls, by which a reply is recognized in later prompts."""
    record = _record_of(message)
    calls = [
        {key: call.get(key) for key in ("name", "arguments")}
        for call in record.get("tool_calls") or ()
    ]
    return _text(record.get("content")), json.dumps(calls)


def _to_tool_call(call: Record) -> ToolCall:
    body = call.get("function", call)
    function = ToolCall.FunctionBody(name=body["name"], arguments=body["arguments"])
    return ToolCall(id=call.get("id"), function=function)


def _text(content: str | list[Record] | None) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _problem(episode: asyncio.Task[Record]) -> str:
    if episode.cancelled():
        return "it was cancelled"
    error = episode.exception()
    return str(error or episode.result().get("error"))
