"""Planning: from a request to what the engine samples, and to the answer that is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.local.engine.types import ImageInput, LogitRule
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.answers import (
    Answer,
    ChatAnswer,
    ChatContext,
    CompletionAnswer,
)
from tinker_cookbook.local.openai_api.call_notation import find_notation, grammar_of
from tinker_cookbook.local.openai_api.chat_template import ChatTemplate
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.messages import Picture
from tinker_cookbook.local.openai_api.reply_shape import tool_name
from tinker_cookbook.local.openai_api.requests import (
    ChatRequest,
    CompletionRequest,
    SamplingChoice,
)
from tinker_cookbook.local.openai_api.sampling import (
    Target,
    build_spec,
    codecs_of,
    end_token_ids,
    with_prompt_scores,
)
from tinker_cookbook.local.openai_api.structured import json_term
from tinker_cookbook.local.service.threads import TEXTS
from tinker_cookbook.replies.loose import END_THINK

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.types import ModelInfo, SampleSpec
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["Job", "plan_chat", "plan_completion"]


@dataclass(frozen=True)
class Job:
    """A request that is ready to be sampled."""

    target: Target
    choice: SamplingChoice
    specs: list[SampleSpec]
    answer: Answer


async def _load(service: Service, target: Target) -> tuple[ModelInfo, TextCodec]:
    info = await service.engine.load(target.base_model)
    return info, await codecs_of(service).get(info.folder, info.vocab_size)


async def plan_chat(
    service: Service,
    chat: ChatRequest,
    target: Target,
    make_answer: Callable[[ChatContext], Answer] = ChatAnswer,
) -> Job:
    """Render the messages of a chat and return what to sample.

    Raises:
        UserError: the model cannot do what the request asks for.
    """
    info, codec = await _load(service, target)
    template = codec.tool_template if chat.tools else codec.template
    if template is None:
        raise UserError(
            f"model={target.base_model!r} has no chat template; use /completions with a "
            "complete prompt"
        )
    if chat.pictures and not info.supports_images:
        raise UserError(
            f"messages have {len(chat.pictures)} images; {info.name} reads text only. Use a vision "
            "model or leave the images out"
        )
    _check_bias(chat.sampling, info)
    ends = end_token_ids(chat.sampling, info.eos_token_ids, template.turn_end_ids)

    def prepare() -> tuple[bool, SampleSpec]:
        given = (chat.messages, chat.tools, chat.template_options)
        codec.check_length(_count_characters(given), info.max_context_length, "messages")
        text = template.render(chat.messages, tools=chat.tools, options=chat.template_options)
        codec.check_length(len(template.reveal(text)), info.max_context_length, "messages")
        prompt, images = _place_pictures(template.encode(text), chat.pictures, codec.image_token)
        starts_in_thinking = text.rstrip().endswith("<think>")
        rule = _chat_rule(chat, codec, template, ends, starts_in_thinking=starts_in_thinking)
        spec = build_spec(chat.sampling, prompt, ends, codec, images=images, new_grammar_rule=rule)
        return starts_in_thinking, spec

    starts_in_thinking, spec = await TEXTS.run(prepare)
    answer = make_answer(ChatContext(target.name, codec, chat, ends, starts_in_thinking))
    return Job(target, chat.sampling, [spec], answer)


def _chat_rule(
    chat: ChatRequest,
    codec: TextCodec,
    template: ChatTemplate,
    ends: frozenset[int],
    *,
    starts_in_thinking: bool,
) -> Callable[[], LogitRule] | None:
    """Return what makes the rule that the reply's required shape needs."""
    shape = chat.sampling.shape
    if not shape:
        return None
    field = shape.schema_field
    if shape.must_call:
        field = f"tool_choice for the tools {', '.join(map(tool_name, chat.tools))[:200]}"
    notation = find_notation(codec, template).fit(
        after_thinking=starts_in_thinking,
        end_names=[name for name, token in codec.control_ids.items() if token in ends],
    )
    grammar = grammar_of(shape, chat.tools, notation, codec.control_ids)
    # reasoning is free text; the shape is that of what follows it
    free_until = codec.control_ids.get(END_THINK) if starts_in_thinking else None
    if starts_in_thinking and free_until is None:
        raise UserError(
            f"{field} cannot be enforced after reasoning: the model has no token for {END_THINK}; "
            "turn reasoning off"
        )
    return codec.grammars.compile(grammar, end_ids=ends, free_until=free_until, field=field)


def _place_pictures(
    prompt: list[int], pictures: Sequence[Picture], image_token: int | None
) -> tuple[list[int], list[ImageInput]]:
    """Return a prompt without the template's tokens for images, and the images in their places.

    The engine writes as many tokens for an image as the model uses.
    """
    if not pictures:
        return prompt, []
    found = [at for at, token in enumerate(prompt) if token == image_token]
    if len(found) != len(pictures):
        raise UserError(
            f"messages have {len(pictures)} images, but the model's chat template writes "
            f"{len(found)} image tokens; images in chats are not supported for this model"
        )
    images = [
        ImageInput(at - number, picture.data, picture.format, None)
        for number, (at, picture) in enumerate(zip(found, pictures, strict=True))
    ]
    return [token for token in prompt if token != image_token], images


def _check_bias(choice: SamplingChoice, info: ModelInfo) -> None:
    highest = max(choice.logit_bias, default=0)
    if highest >= info.vocab_size:
        raise UserError(
            f"logit_bias has token {highest}; ids of {info.name} are 0 to {info.vocab_size - 1}"
        )


def _count_characters(value: object) -> int:
    """Return the number of characters of all texts in objects and lists."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _count_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_count_characters, value))
    return 0


async def plan_completion(service: Service, asked: CompletionRequest, target: Target) -> Job:
    """Encode the prompts of a completion request and return what to sample.

    Raises:
        UserError: the model cannot do what the request asks for.
    """
    info, codec = await _load(service, target)
    _check_bias(asked.sampling, info)
    ends = end_token_ids(asked.sampling, info.eos_token_ids, ())

    def encode(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        codec.check_length(len(prompt), info.max_context_length, "prompt")
        return codec.encode_text(prompt)

    def prepare() -> list[SampleSpec]:
        shape, rule = asked.sampling.shape, None
        if shape.schema is not None:
            grammar = f"start: {json_term(shape.schema)}"
            rule = codec.grammars.compile(
                grammar, end_ids=ends, free_until=None, field=shape.schema_field
            )
        return [
            build_spec(asked.sampling, encode(prompt), ends, codec, new_grammar_rule=rule)
            for prompt in asked.prompts
        ]

    specs = await TEXTS.run(prepare)
    if asked.echo and asked.sampling.top_logprobs is not None:
        specs = [with_prompt_scores(spec, asked.sampling.top_logprobs) for spec in specs]
    answer = CompletionAnswer(
        target.name,
        codec,
        choice=asked.sampling,
        end_ids=ends,
        prompts=[spec.prompt.tolist() for spec in specs],
        echo=asked.echo,
    )
    return Job(target, asked.sampling, specs, answer)
