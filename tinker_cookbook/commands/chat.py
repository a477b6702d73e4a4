"""Chat with a model or a checkpoint in the terminal; answers appear as they are sampled."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.sampler_target import (
    OpenSampler,
    add_sampler_arguments,
    open_sampler,
)
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.runs import interrupts

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Message
    from tinker_cookbook.renderers.types import MessageDelta
    from tinker_cookbook.service import Connection

__all__ = ["add_arguments", "run"]

HELP = """\
/reset            forget the conversation
/system TEXT      start a new conversation with this system message (no TEXT: without one)
/retry            answer the last message again
/help             show this list
Ctrl-C            stop the answer; the part already sampled stays in the conversation
Ctrl-D, /exit     exit
A line that ends with a backslash continues on the next line."""
DIM, PLAIN = "\033[2m", "\033[0m"
STREAM_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_sampler_arguments(parser, max_tokens=512)
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    with open_sampler(args) as opened:
        interrupts.leave_to_program()  # Ctrl-C only stops the current answer
        print("Write a message; /help lists the commands, Ctrl-D exits.", flush=True)
        _Chat(opened, args).run()
    return 0


class _Chat:
    """A conversation on the terminal."""

    def __init__(self, opened: OpenSampler, args: argparse.Namespace) -> None:
        self._opened = opened
        self._args = args
        self._system = args.system
        self._messages: list[Message] = []
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._stream = _find_stream(opened.connection, opened.target)

    def run(self) -> None:
        """Read and answer until the input ends."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lets input() edit lines and remember them)
        while True:
            try:
                text = self._read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D exits)")
                continue
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._run_command(text)
            elif text:
                self._messages.append({"role": "user", "content": text})
                self._answer()

    def _read(self) -> str:
        prompt = "\n> " if self._is_terminal else ""
        lines = [input(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input("  " if self._is_terminal else ""))
        return "\n".join(lines).strip()

    def _run_command(self, command: str) -> None:
        word, _, rest = command.partition(" ")
        if word == "/reset":
            self._messages = []
            print("(conversation forgotten)")
        elif word == "/system":
            self._system, self._messages = rest.strip() or None, []
            print("(new conversation)")
        elif word == "/retry" and self._messages:
            if self._messages[-1]["role"] == "assistant":
                self._messages.pop()
            self._answer()
        elif word == "/retry":
            print("(there is nothing to answer yet)")
        else:
            print(
                HELP if word == "/help" else f"{word} is not a command; use one of these.\n{HELP}"
            )

    def _answer(self) -> None:
        """Sample and show the next answer; Ctrl-C ends it early."""
        tokens: list[int] = []
        renderer = self._opened.renderer
        head: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        prompt = renderer.build_generation_prompt([*head, *self._messages])
        parser = renderer.response_parser()
        screen = _Screen(self._is_terminal)
        try:
            with contextlib.closing(self._sample(prompt)) as parts:
                for part in parts:
                    tokens += part
                    for delta in parser.feed(part):
                        screen.show(delta)
        except KeyboardInterrupt:
            screen.note("(stopped)")
        except ConfigurationError as error:
            screen.note(f"(refused: {error})")
        for delta in parser.finish():
            screen.show(delta)
        screen.end()
        if tokens:
            self._messages.append(parser.result()[0])
        else:
            self._messages.pop()

    def _sample(self, prompt: tinker.ModelInput) -> Generator[list[int], None, None]:
        """Yield the tokens of one answer as they arrive."""
        args, stop = self._args, self._opened.renderer.get_stop_sequences()
        if self._stream is not None:
            yield from self._stream.sample(
                prompt.to_ints(), stop, max_tokens=args.max_tokens, temperature=args.temperature
            )
            return
        import tinker

        from tinker_cookbook.utils.sdk_compat import service_message

        params = tinker.SamplingParams(
            max_tokens=args.max_tokens, temperature=args.temperature, stop=stop
        )
        try:
            result = self._opened.client.sample(prompt, 1, params).result()
        except (tinker.TinkerError, ValueError) as error:
            raise TrainingError(
                f"the service could not sample an answer: {service_message(error)}"
            ) from error
        yield list(result.sequences[0].tokens)


class _Screen:
    """Shows an answer; reasoning is dim on a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._is_dim = False

    def show(self, delta: MessageDelta) -> None:
        from tinker_cookbook.renderers.types import StreamingTextDelta, StreamingThinkingDelta

        if isinstance(delta, StreamingThinkingDelta):
            self._write(delta.thinking, dim=True)
        elif isinstance(delta, StreamingTextDelta):
            self._write(delta.text, dim=False)
        elif isinstance(delta, dict):
            for call in delta.get("tool_calls", ()):
                self._write(f"\n[{call.function.name} {call.function.arguments}]", dim=True)

    def note(self, text: str) -> None:
        self._write(f" {text}", dim=True)

    def end(self) -> None:
        self._write("\n", dim=False)

    def _write(self, text: str, *, dim: bool) -> None:
        if dim != self._is_dim:
            # without colours, a new line separates reasoning from the answer
            text = (DIM if dim else PLAIN) + text if self._is_terminal else text
            self._is_dim = dim
        print(text, end="", flush=True)


class _TokenStream:
    """The streaming OpenAI-compatible endpoint of this package's service."""

    def __init__(self, base_url: str, headers: dict[str, str], target: str) -> None:
        self._url = f"{base_url}/oai/api/v1/completions"
        self._headers = headers
        self._target = target

    def sample(
        self, prompt: list[int], stop: list[int] | list[str], *, max_tokens: int, temperature: float
    ) -> Iterator[list[int]]:
        """Yield the tokens of one completion. Closing the iterator cancels the request."""
        import httpx

        name = "stop" if stop and isinstance(stop[0], str) else "stop_token_ids"
        body = {
            "model": self._target,
            "prompt": prompt,
            "stream": True,
            name: stop,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "return_token_ids": True,
        }
        timeout = httpx.Timeout(STREAM_SECONDS, connect=10.0)
        try:
            with httpx.stream(
                "POST", self._url, headers=self._headers, json=body, timeout=timeout
            ) as answer:
                if answer.status_code != 200:
                    raise ConfigurationError(_error_text(answer.read()))
                for line in answer.iter_lines():
                    yield from _tokens_of(line)
        except httpx.HTTPError as error:
            raise TrainingError(f"the connection to the service was lost: {error}") from error


def _find_stream(connection: Connection, target: str) -> _TokenStream | None:
    """Return the endpoint that streams token ids; None if the service does not have one."""
    import httpx

    key = connection.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{connection.base_url}/oai/api/v1/models", headers=headers, timeout=10)
        listed = answer.json()["data"] if answer.status_code == 200 else []
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    # other services stream text without token ids, which the renderer must parse
    is_ours = any(model.get("owned_by") == "tinker-cookbook" for model in listed)
    return _TokenStream(connection.base_url, headers, target) if is_ours else None


def _tokens_of(line: str) -> Iterator[list[int]]:
    """Yield the token ids in one line of an event stream."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        raise ConfigurationError(event["error"]["message"])
    for choice in event["choices"]:
        if choice.get("token_ids"):
            yield choice["token_ids"]


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
