"""OpenAI-style request bodies -> what is to be sampled; every refusal names its field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.reply import split_reasoning
from tinker_cookbook.local.service.protocol.fields import Fields, check_depth, show_value
from tinker_cookbook.local.service.settings import Limits
from tinker_cookbook.replies.json_source import load_json

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "SamplingChoice",
    "decode_chat_request",
    "decode_completion_request",
]

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_INT32 = 2**31 - 1
MAX_TEXT = 16 * 2**20
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
COMPLETION_TOKENS = 16
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OTHER_ROLES = {"developer": "system", "function": "tool"}
"""Read as these, as in files of training data."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONING_LISTS = ("reasoning_details", "thinking_blocks")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the key of it."""

# Accepted because clients send them, and without effect on what is sampled here; `user` tells
# clients apart that share the engine.
_INERT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "modalities", "verbosity", "request_id"),
)
_SAMPLING = (
    *("model", "stream", "stream_options", "temperature", "top_p", "top_k", "n", "seed", "stop"),
    *("stop_token_ids", "max_tokens", "logprobs", "return_token_ids"),
)
# Not implemented; the values that ask for nothing are accepted. So is null for any field at all.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_p": (0, None),
    "logit_bias": ({}, None),
    "suffix": ("", None),
    "response_format": ({"type": "text"}, {}, None),
    "functions": ([], None),
    "function_call": ("auto", "none", None),
    "reasoning": ({}, None),
    "documents": ([], None),
    "bad_words": ([], None),
    "use_beam_search": (False, None),
    "length_penalty": (1, None),
    "min_tokens": (0, None),
    "typical_p": (1, None),
    "ignore_eos": (False, None),
    "skip_special_tokens": (True, None),
    "spaces_between_special_tokens": (True, None),
    "include_stop_str_in_output": (False, None),
    "continue_final_message": (False, None),
    "add_generation_prompt": (True, None),
    "detokenize": (True, None),
    "priority": (0, None),
}
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "include_reasoning": (True,),
    "add_special_tokens": (False,),
}
_CHAT = (
    *("messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs"),
    *("reasoning_effort", "chat_template_kwargs"),
)
_COMPLETION = ("prompt", "echo", "best_of")
_SET_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "self")


@dataclass(frozen=True)
class SamplingChoice:
    """How to sample; the same for both endpoints."""

    model: str
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...] | None
    """Replaces the model's own end tokens."""
    top_logprobs: int | None
    """None: no logprobs; 0: of the sampled tokens alone."""
    return_token_ids: bool


@dataclass(frozen=True)
class ChatRequest:
    """A /chat/completions request."""

    sampling: SamplingChoice
    messages: list[dict[str, Any]]
    """As templates want them: texts as content, tool arguments as objects."""
    tools: list[dict[str, Any]]
    template_options: dict[str, Any]


@dataclass(frozen=True)
class CompletionRequest:
    """A /completions request."""

    sampling: SamplingChoice
    prompts: list[str | list[int]]
    echo: bool


def decode_chat_request(body: dict[str, Any], limits: Limits) -> ChatRequest:
    """Read a chat request.

    Raises:
        UserError: names the field and the value.
    """
    fields = Fields(body)
    _check_names(fields, _CHAT, _NEUTRAL | _NEUTRAL_CHAT)
    raw = fields.array("messages", max_items=MAX_MESSAGES)
    if not raw:
        raise UserError("messages=[] is empty; give at least one message")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(raw)]
    options = _template_options(fields)
    effort = fields.text("reasoning_effort", None)
    if effort is not None:
        options["reasoning_effort"] = effort
    wants_logprobs = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", 0, minimum=0, maximum=MAX_TOP_LOGPROBS)
    if top and not wants_logprobs:
        raise UserError(f"top_logprobs={top} needs logprobs; set logprobs to true")
    max_tokens = fields.integer("max_tokens", None, minimum=1, maximum=MAX_INT32)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, minimum=1, maximum=MAX_INT32)
    sampling = _sampling(fields, limits, max_tokens, top if wants_logprobs else None)
    return ChatRequest(sampling, messages, _tools(fields), options)


def decode_completion_request(body: dict[str, Any], limits: Limits) -> CompletionRequest:
    """Read a completion request.

    Raises:
        UserError: names the field and the value.
    """
    fields = Fields(body)
    _check_names(fields, _COMPLETION, _NEUTRAL)
    echo = fields.flag("echo", False)
    lowest = 0 if echo else 1
    max_tokens = fields.integer("max_tokens", COMPLETION_TOKENS, minimum=lowest, maximum=MAX_INT32)
    top = fields.integer("logprobs", None, minimum=0, maximum=MAX_TOP_LOGPROBS)
    sampling = _sampling(fields, limits, max_tokens, top)
    best_of = fields.integer("best_of", sampling.n, minimum=1)
    if best_of != sampling.n:
        raise UserError(f"best_of={best_of} is not available here; leave it out, or equal to n")
    if echo and sampling.stream:
        raise UserError("echo=true cannot be streamed; leave out echo or stream")
    prompts = _prompts(fields.values.get("prompt"))
    if len(prompts) * sampling.n > limits.max_num_samples:
        raise UserError(
            f"n={sampling.n} with {len(prompts)} prompts asks for {len(prompts) * sampling.n} "
            f"completions; at most {limits.max_num_samples} fit a request"
        )
    return CompletionRequest(sampling, prompts, echo)


def _check_names(
    fields: Fields, names: tuple[str, ...], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    given = Fields({name: value for name, value in fields.values.items() if value is not None})
    given.only(*names, *_SAMPLING, *neutral, *_INERT)
    for name, accepted in neutral.items():
        value = given.values.get(name)
        if value is not None and value not in accepted:
            raise UserError(
                f"{name}={str(value)[:80]} is not available here; leave it out, "
                f"or use {json.dumps(accepted[0])}"
            )


def _sampling(
    fields: Fields, limits: Limits, max_tokens: int | None, top_logprobs: int | None
) -> SamplingChoice:
    options = Fields(fields.object("stream_options", {}), prefix="stream_options.")
    top_p = (
        fields.number("top_p", 1.0, minimum=0.0, maximum=1.0) if _given(fields, "top_p") else 1.0
    )
    if top_p == 0.0:
        raise UserError("top_p=0 keeps no token; use more than 0, up to 1 (off)")
    top_k = fields.integer("top_k", -1, minimum=-1, maximum=MAX_INT32)
    temperature = 1.0
    if _given(fields, "temperature"):
        temperature = fields.number("temperature", minimum=0.0, maximum=1e6)
    return SamplingChoice(
        model=fields.text("model"),
        stream=fields.flag("stream", False),
        include_usage=options.flag("include_usage", False),
        n=fields.integer("n", 1, minimum=1, maximum=min(limits.max_num_samples, 1024)),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=-1 if top_k == 0 else top_k,
        seed=fields.integer("seed", None),
        stops=_stops(fields.values.get("stop")),
        stop_token_ids=_stop_ids(fields),
        top_logprobs=top_logprobs,
        return_token_ids=fields.flag("return_token_ids", False),
    )


def _given(fields: Fields, name: str) -> bool:
    """Clients send null for numbers that they leave out."""
    return fields.values.get(name) is not None


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        raise UserError(f"stop={str(value)[:80]} is not accepted; use up to {MAX_STOPS} texts")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise UserError(
                f"stop={str(text)[:80]!r} is not accepted; use texts of 1 to "
                f"{MAX_STOP_CHARACTERS} characters"
            )
    return tuple(texts)


def _stop_ids(fields: Fields) -> tuple[int, ...] | None:
    values = fields.array("stop_token_ids", None, max_items=256)
    if values is None:
        return None
    return tuple(_token_ids(values, "stop_token_ids"))


def _token_ids(values: list[Any], where: str) -> list[int]:
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= MAX_INT32:
            raise UserError(f"{where}[{index}]={str(value)[:40]} is not a token id")
    return values


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"prompt={str(value)[:80]!r} is not accepted; use a text or token ids")
    if all(type(item) is int for item in value):
        return [_token_ids(value, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise UserError(f"prompt has {len(value)} entries; at most {MAX_PROMPTS} are accepted")
    prompts: list[str | list[int]] = []
    for index, item in enumerate(value):
        if isinstance(item, list):
            prompts.append(_token_ids(item, f"prompt[{index}]"))
        elif isinstance(item, str):
            prompts.append(item)
        else:
            raise UserError(f"prompt[{index}]={str(item)[:80]} is not a text or token ids")
    return prompts


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}={str(value)[:80]} is not a message; expected an object")
    fields = Fields(value, prefix=f"{where}.")
    role = fields.text("role", choices=ROLES)
    text = _content(value.get("content"), f"{where}.content", optional=role == "assistant")
    message: dict[str, Any] = {
        "role": _OTHER_ROLES.get(role, role),
        "content": text,
    }
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            message[name] = fields.text(name)
    if role == "assistant":
        reasoning, message["content"] = _reasoning(value, text, where)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        calls = fields.array("tool_calls", [], max_items=1024)
        if not calls and value.get("function_call") is not None:
            message["tool_calls"] = [
                _tool_call({"function": value["function_call"]}, f"{where}.function_call")
            ]
        if calls:
            message["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
            ]
    return message


def _reasoning(value: dict[str, Any], text: str, where: str) -> tuple[str | None, str]:
    """Return a reply's reasoning, by whichever name clients send it, and its text without it."""
    for name in _REASONING:
        if value.get(name) is not None:
            return _content(value[name], f"{where}.{name}"), text
    for name in _REASONING_LISTS:
        if value.get(name):
            raise UserError(
                f"{where}.{name}={json.dumps(value[name])[:80]} is not read here; send the "
                "reasoning as reasoning_content, a text"
            )
    return split_reasoning(text)


def _content(value: Any, where: str, *, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):
        return "".join(_part(item, f"{where}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        shown = json.dumps(value)[:80]
        raise UserError(f"{where}={shown} is not accepted; expected a text or parts")
    return value


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise UserError(f"{where}.type={str(kind)[:40]!r} is not supported here; use text")
    return _content(value.get(key), f"{where}.{key}")


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}.function is missing or has no name; expected a function call")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Return arguments as an object; what clients send for none is an empty one."""
    if isinstance(value, str):
        try:
            value = load_json(value) if value.strip() else None
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}={show_value(value)} is not accepted; expected a JSON object")
    check_depth(value, where)
    return value


def _template_options(fields: Fields) -> dict[str, Any]:
    """Further variables of the template; those that the request sets otherwise are refused."""
    options = dict(fields.object("chat_template_kwargs", {}))
    if options.get("add_generation_prompt") in (True, None):
        options.pop("add_generation_prompt", None)
    for name in _SET_VARIABLES:
        if name in options:
            raise UserError(
                f"chat_template_kwargs.{name} is not accepted; the request's own fields set it. "
                "Leave it out"
            )
    return options


def _tools(fields: Fields) -> list[dict[str, Any]]:
    tools = fields.array("tools", [], max_items=1024)
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"tools[{index}] is not a function declaration; expected "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            )
    choice = fields.values.get("tool_choice", "auto")
    if choice == "none":
        return []
    if choice not in ("auto", None):
        raise UserError(
            f"tool_choice={str(choice)[:80]} cannot be enforced here; use 'auto' or 'none'"
        )
    return tools
