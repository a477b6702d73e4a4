"""A provider through which LiteLLM calls sampling clients; extra `litellm`.

    register_litellm_provider()
    litellm.completion("tinker/HuggingFaceTB/SmolLM2-135M-Instruct", messages=[...])
    litellm.completion("tinker/tinker://RUN/sampler_weights/NAME", messages=[...])

Each choice has the tokens in `provider_specific_fields`: `prompt_tokens`, `tokens` and `logprobs`.
They are those that were sampled, not encoded again.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import litellm  # pyright: ignore[reportMissingImports]
from litellm.llms.custom_llm import (  # pyright: ignore[reportMissingImports]
    CustomLLM,
    CustomLLMError,
)

from tinker_cookbook.capture.calls import RecordedCall
from tinker_cookbook.capture.chat import ChatRequest, read_chat_request, reply_pieces
from tinker_cookbook.capture.rollout import Reply, stop_condition
from tinker_cookbook.capture.samplers import ClientSampler
from tinker_cookbook.dialects.chat import ChatWriter
from tinker_cookbook.dialects.pieces import new_id
from tinker_cookbook.exceptions import (
    ConfigurationError,
    DataError,
    RendererError,
    TinkerCookbookError,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.completers import TokensWithLogprobs
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["PROVIDER", "TinkerLiteLLMProvider", "register_litellm_provider"]

PROVIDER = "tinker"
"""What a model's name begins with."""
_OWN_OPTIONS = ("renderer_name", "base_model")
_T = TypeVar("_T")


class _Model(NamedTuple):
    client: tinker.SamplingClient
    renderer: Renderer


class TinkerLiteLLMProvider(CustomLLM):
    """Answers LiteLLM's completions, also as a stream, with samples of a Tinker service."""

    def __init__(self, service_client: tinker.ServiceClient | None = None) -> None:
        """Set the service.

        Args:
            service_client: The service; None: the one that the SDK finds in the environment.
        """
        super().__init__()
        self._service_client = service_client
        self._given: tinker.SamplingClient | None = None
        self._models: dict[tuple[str, str, str], _Model] = {}
        self._lock = threading.Lock()

    def set_client(self, sampling_client: tinker.SamplingClient) -> None:
        """Sample from this client, whatever model a call names."""
        with self._lock:
            self._given = sampling_client
            self._models.clear()

    def completion(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reply to a conversation."""
        return _run_in_thread(lambda: self.acompletion(*args, **kwargs))

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reply to a conversation.

        Raises:
            CustomLLMError: status 400 for a request that cannot be used, else 500.
        """
        call = _arguments(args, kwargs)
        shown = await self._answer(call)
        return litellm.ModelResponse(**shown)  # pyright: ignore[reportAttributeAccessIssue]

    def streaming(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield the reply when it is complete."""
        yield from _chunks(_run_in_thread(lambda: self._answer(_arguments(args, kwargs))))

    async def astreaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Yield the reply when it is complete."""
        for chunk in _chunks(await self._answer(_arguments(args, kwargs))):
            yield chunk

    async def _answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(call.get("optional_params") or {})
        own = {name: str(options.pop(name, None) or "") for name in _OWN_OPTIONS}
        # LiteLLM passes options that it does not know in `extra_body`.
        extra = options.pop("extra_body", None) or {}
        own |= {name: str(extra[name]) for name in _OWN_OPTIONS if extra.get(name)}
        options |= {name: value for name, value in extra.items() if name not in _OWN_OPTIONS}
        options.pop("stream", None)
        try:
            asked = read_chat_request({"messages": call["messages"], **options})
            model = await asyncio.to_thread(self._model, call["model"], **own)
            return await _complete(model, asked, call["model"])
        except (DataError, RendererError, ConfigurationError) as error:
            raise CustomLLMError(400, str(error)) from error
        except TinkerCookbookError as error:
            raise CustomLLMError(500, str(error)) from error

    def _model(self, name: str, *, renderer_name: str, base_model: str) -> _Model:
        """Return client and chat format of a model, made at its first call."""
        from tinker_cookbook import model_info
        from tinker_cookbook.renderers import load_renderer

        key = (name, renderer_name, base_model)
        with self._lock:
            if key not in self._models:
                client = self._given or self._sampling_client(name)
                known = base_model or client.get_base_model()
                chosen = renderer_name or model_info.get_recommended_renderer_name(known)
                # The client's own tokenizer would be fetched from a hub.
                renderer = load_renderer(chosen, known)
                self._models[key] = _Model(client, renderer)
            return self._models[key]

    def _sampling_client(self, name: str) -> tinker.SamplingClient:
        import tinker

        if self._service_client is None:
            self._service_client = tinker.ServiceClient()
        try:
            if name.startswith("tinker://"):
                return self._service_client.create_sampling_client(model_path=name)
            return self._service_client.create_sampling_client(base_model=name)
        except (tinker.TinkerError, ValueError) as error:
            raise ConfigurationError(
                f"model={PROVIDER}/{name} cannot be opened ({error}); name a base model of the "
                "service or a tinker:// path of sampler weights."
            ) from error


def register_litellm_provider(
    *, service_client: tinker.ServiceClient | None = None
) -> TinkerLiteLLMProvider:
    """Let LiteLLM call models named `tinker/...`; a later registration replaces an earlier one.

    Args:
        service_client: The service; None: the one that the SDK finds in the environment.
    """
    provider = TinkerLiteLLMProvider(service_client)
    known = litellm.custom_provider_map  # pyright: ignore[reportAttributeAccessIssue]
    others = [entry for entry in known if entry["provider"] != PROVIDER]
    litellm.custom_provider_map = [  # pyright: ignore[reportAttributeAccessIssue]
        *others,
        {"provider": PROVIDER, "custom_handler": provider},
    ]
    return provider


async def _complete(model: _Model, asked: ChatRequest, name: str) -> dict[str, Any]:
    renderer = model.renderer
    declared = renderer.declare_tools(asked.messages, asked.tools)
    prompt = renderer.build_generation_prompt(declared)
    sampler = ClientSampler(model.client)
    sampled = await sampler(prompt, stop_condition(renderer, asked.stops), asked.wishes)
    message = renderer.fit_tool_calls(renderer.parse_response(sampled.tokens)[0], asked.tools)
    pieces, ending = reply_pieces(Reply(_as_call(sampled), message, prompt.length), asked, renderer)
    shown = ChatWriter(name, include_usage=True).whole(pieces, ending)
    fields = {
        "prompt_tokens": prompt.to_ints(),
        "tokens": sampled.tokens,
        "logprobs": sampled.maybe_logprobs,
    }
    shown["choices"][0]["provider_specific_fields"] = fields
    return shown


def _as_call(sampled: TokensWithLogprobs) -> RecordedCall:
    """Return a sample as a call that belongs to no rollout."""
    logprobs = sampled.maybe_logprobs or []
    return RecordedCall("", 0, None, [], sampled.tokens, logprobs, sampled.stop_reason)


def _chunks(shown: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a completion as LiteLLM's generic chunks."""
    choice, usage = shown["choices"][0], shown["usage"]
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    calls = choice["message"].get("tool_calls") or []
    texts = [choice["message"]["content"] or ""]
    yield _chunk(text=texts[0])
    for index, call in enumerate(calls):
        call = {"id": call.get("id") or new_id("call"), **call, "index": index}
        yield _chunk(tool_use=call)
    yield _chunk(is_finished=True, finish_reason=choice["finish_reason"], usage=counts)


def _chunk(**fields: Any) -> dict[str, Any]:
    empty = {"text": "", "tool_use": None, "is_finished": False, "finish_reason": "", "index": 0}
    return empty | {"usage": None} | fields


_PARAMETERS = tuple(inspect.signature(CustomLLM.completion).parameters)[1:]


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return LiteLLM's arguments by name; it passes them by name, other callers may not."""
    return dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)


def _run_in_thread(make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine to its end, also where an event loop already runs."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(asyncio.run(make()))
        except BaseException as error:  # raised again where the result is read
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()
