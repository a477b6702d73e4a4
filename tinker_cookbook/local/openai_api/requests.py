"""OpenAI-style request bodies -> what to sample. Every error names its field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated

import numpy as np

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import INT32, SAMPLING, Range
from tinker_cookbook.local.openai_api.messages import (
    MAX_CALLS,
    ChatMessage,
    Picture,
    show_message,
)
from tinker_cookbook.local.openai_api.reply_shape import (
    ReplyShape,
    read_response_format,
    read_tools,
)
from tinker_cookbook.local.service.protocol.bodies import SamplingParams
from tinker_cookbook.local.service.protocol.json_body import JsonObject, show_value
from tinker_cookbook.local.service.protocol.stops import STOP_TEXTS
from tinker_cookbook.local.service.protocol.token_arrays import TOKEN_IDS, read_token_ids
from tinker_cookbook.local.service.protocol.typed_body import AtMost, read_as, refuse_unknown

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "SamplingChoice",
    "decode_chat_request",
    "decode_completion_request",
]

TOP_LOGPROBS = Range(0, 20)
PENALTY = Range(-2, 2)
REPETITION = Range(0, 100, excludes_lowest=True)
SHARE = Range(0, 1)
BIAS = Range(-100, 100)
MAX_BIASES = 4096
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_CHOICES = 1024
"""Maximum number of completions per prompt, fewer than the native API has."""
COMPLETION_TOKENS = 16
_INERT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "modalities", "verbosity", "request_id"),
)
"""Fields that clients send and that have no effect on what is sampled here. `user` identifies one
of the clients that share the engine."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "reasoning": ({},),
    "documents": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "typical_p": (1,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "detokenize": (True,),
    "priority": (0,),
}
"""Fields that are not implemented -> their values that ask for nothing, which are accepted."""
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "include_reasoning": (True,),
    "add_special_tokens": (False,),
}
_SET_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "self")


@dataclass(frozen=True, kw_only=True)
class _StreamOptions:
    include_usage: bool = False


@dataclass(frozen=True, kw_only=True)
class _Body(SamplingParams):
    """The fields that both endpoints share."""

    model: str
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Annotated[int, Range(1, MAX_CHOICES)] = 1
    stop: Annotated[list[str], STOP_TEXTS] = field(default_factory=list)
    stop_token_ids: Annotated[np.ndarray, TOKEN_IDS] | None = None
    return_token_ids: bool = False
    presence_penalty: Annotated[float, PENALTY] = 0.0
    frequency_penalty: Annotated[float, PENALTY] = 0.0
    repetition_penalty: Annotated[float, REPETITION] = 1.0
    min_p: Annotated[float, SHARE] = 0.0
    logit_bias: JsonObject = field(default_factory=dict)
    response_format: object = None


@dataclass(frozen=True, kw_only=True)
class _ChatBody(_Body):
    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES)]
    tools: Annotated[list[object], AtMost(MAX_CALLS)] = field(default_factory=list)
    tool_choice: object = "auto"
    max_completion_tokens: Annotated[int, SAMPLING["max_tokens"]] | None = None
    """The newer name of `max_tokens`, which wins."""
    logprobs: bool = False
    top_logprobs: Annotated[int, TOP_LOGPROBS] = 0
    reasoning_effort: str | None = None
    chat_template_kwargs: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _CompletionBody(_Body):
    prompt: object = None
    echo: bool = False
    max_tokens: Annotated[int, INT32] | None = COMPLETION_TOKENS
    logprobs: Annotated[int, TOP_LOGPROBS] | None = None
    best_of: int | None = None


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
    """End tokens that replace the model's own."""
    top_logprobs: int | None
    """Number of most likely tokens to show; 0: only the sampled tokens' logprobs; None: none."""
    return_token_ids: bool
    shape: ReplyShape
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatRequest:
    """A /chat/completions request."""

    sampling: SamplingChoice
    messages: list[JsonObject]
    """Messages as templates expect them: texts as content, objects as tool arguments."""
    tools: list[JsonObject]
    template_options: JsonObject
    pictures: list[Picture]
    """The images of the messages, in their order."""


@dataclass(frozen=True)
class CompletionRequest:
    """A /completions request."""

    sampling: SamplingChoice
    prompts: list[str | list[int]]
    echo: bool


def decode_chat_request(values: JsonObject) -> ChatRequest:
    """Read a chat request.

    Raises:
        UserError: the message names the field and the value.
    """
    given = _given(values)
    _check_names(given, _ChatBody, _NEUTRAL | _NEUTRAL_CHAT)
    body = read_as(_ChatBody, given)
    if not body.messages:
        raise UserError("messages=[] is empty; give at least one message")
    pictures: list[Picture] = []
    messages = [
        show_message(item, f"messages[{at}]", pictures) for at, item in enumerate(body.messages)
    ]
    tools, must_call = read_tools(body.tools, body.tool_choice)
    options = _template_options(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    if body.top_logprobs and not body.logprobs:
        raise UserError(f"top_logprobs={body.top_logprobs} needs logprobs; set logprobs to true")
    sampling = _sampling(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        must_call=must_call,
    )
    return ChatRequest(sampling, messages, tools, options, pictures)


def decode_completion_request(values: JsonObject) -> CompletionRequest:
    """Read a completion request.

    Raises:
        UserError: the message names the field and the value.
    """
    given = _given(values)
    _check_names(given, _CompletionBody, _NEUTRAL)
    body = read_as(_CompletionBody, given)
    if body.max_tokens == 0 and not body.echo:
        raise UserError("max_tokens=0 is not accepted; expected 1 or greater, or echo=true")
    sampling = _sampling(body, max_tokens=body.max_tokens, top_logprobs=body.logprobs)
    if body.best_of not in (None, body.n):
        raise UserError(
            f"best_of={body.best_of} is not available here; leave it out, or use the value of n"
        )
    if body.echo and body.stream:
        raise UserError("echo=true cannot be streamed; leave out echo or stream")
    prompts = _prompts(body.prompt)
    total = len(prompts) * body.n
    if total not in SAMPLING["num_samples"]:
        raise UserError(
            f"n={body.n} with {len(prompts)} prompts asks for {total} completions; at most "
            f"{SAMPLING['num_samples'].highest} fit a request"
        )
    return CompletionRequest(sampling, prompts, body.echo)


def _given(values: JsonObject) -> JsonObject:
    """Return the fields that are not null: clients send null for what they leave out."""
    return {name: value for name, value in values.items() if value is not None}


def _check_names(
    given: JsonObject, body: type[_Body], neutral: Mapping[str, tuple[object, ...]]
) -> None:
    refuse_unknown(given, [*(item.name for item in fields(body)), *neutral, *_INERT])
    for name, accepted in neutral.items():
        if name in given and given[name] not in accepted:
            raise UserError(
                f"{name}={str(given[name])[:80]} is not available here; leave it out, or use "
                f"{json.dumps(accepted[0])}"
            )


def _sampling(
    body: _Body, *, max_tokens: int | None, top_logprobs: int | None, must_call: bool = False
) -> SamplingChoice:
    stop_ids = body.stop_token_ids
    schema, schema_field = read_response_format(body.response_format)
    return SamplingChoice(
        model=body.model,
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        n=body.n,
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stops=tuple(body.stop),
        stop_token_ids=None if stop_ids is None else tuple(stop_ids.tolist()),
        top_logprobs=top_logprobs,
        return_token_ids=body.return_token_ids,
        shape=ReplyShape(schema, schema_field, must_call),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        min_p=body.min_p,
        logit_bias=_logit_bias(body.logit_bias),
    )


def _logit_bias(given: JsonObject) -> dict[int, float]:
    """Read token ids, which are texts in JSON, and what to add to their logits."""
    if len(given) > MAX_BIASES:
        raise UserError(f"logit_bias has {len(given)} tokens; at most {MAX_BIASES} are accepted")
    biases: dict[int, float] = {}
    for name, value in given.items():
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if not name.isascii() or not name.isdigit() or number is None or number not in BIAS:
            raise UserError(
                f"logit_bias has {name[:40]!r}: {show_value(value)}; expected a token id and a "
                f"number{BIAS}"
            )
        biases[int(name)] = float(number)
    return biases


def _prompts(value: object) -> list[str | list[int]]:
    """Read a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"prompt={show_value(value)} is not accepted; use a text or token ids")
    if all(type(item) is int for item in value):
        return [read_token_ids(value, "prompt").tolist()]
    if len(value) > MAX_PROMPTS:
        raise UserError(f"prompt has {len(value)} entries; at most {MAX_PROMPTS} are accepted")
    prompts: list[str | list[int]] = []
    for index, item in enumerate(value):
        if isinstance(item, list):
            prompts.append(read_token_ids(item, f"prompt[{index}]").tolist())
        elif isinstance(item, str):
            prompts.append(item)
        else:
            raise UserError(f"prompt[{index}]={show_value(item)} is not a text or token ids")
    return prompts


def _template_options(given: JsonObject) -> JsonObject:
    """Return further template variables; refuse those that the request's own fields set."""
    options = dict(given)
    if options.get("add_generation_prompt") in (True, None):
        options.pop("add_generation_prompt", None)
    for name in _SET_VARIABLES:
        if name in options:
            raise UserError(
                f"chat_template_kwargs.{name} is not accepted; the request's own fields set it. "
                "Leave it out"
            )
    return options
