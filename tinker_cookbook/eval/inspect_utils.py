"""A Tinker sampling client as a model of inspect-ai (extra `inspect`)."""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from inspect_ai._util.content import Content as InspectContent  # pyright: ignore[reportMissingImports]
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatCompletionChoice,
    ContentReasoning,
    ContentText,
    Logprob,
    Logprobs,
    StopReason,
    modelapi,
)
from inspect_ai.model import ChatMessage as InspectAIChatMessage  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ChatMessageAssistant as InspectAIChatMessageAssistant  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ChatMessageTool as InspectAIChatMessageTool  # pyright: ignore[reportMissingImports]
from inspect_ai.model import GenerateConfig as InspectAIGenerateConfig  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ModelAPI as InspectAIModelAPI  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ModelOutput as InspectAIModelOutput  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ModelUsage as InspectAIModelUsage  # pyright: ignore[reportMissingImports]
from inspect_ai.tool import ToolCall as InspectAIToolCall  # pyright: ignore[reportMissingImports]
from inspect_ai.tool import ToolChoice as InspectAIToolChoice  # pyright: ignore[reportMissingImports]
from inspect_ai.tool import ToolFunction  # pyright: ignore[reportMissingImports]
from inspect_ai.tool import ToolInfo as InspectAIToolInfo  # pyright: ignore[reportMissingImports]

from tinker_cookbook.completers import StopCondition
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import ensure_list, get_text_content
from tinker_cookbook.renderers.types import (
    Content,
    ContentPart,
    Message,
    ToolCall,
    ToolSpec,
)
from tinker_cookbook.utils.sdk_compat import call, wait_for_client

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "InspectAPIFromTinkerSampling",
    "convert_inspect_messages",
    "get_model_usage",
]

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 2048
"""Maximum tokens per reply if a task does not set it."""


def get_model_usage(
    tokenized_prompt: Sequence[int], responses: Sequence[tinker.SampledSequence]
) -> InspectAIModelUsage:
    """Return the numbers of tokens of a prompt and its replies."""
    return _usage(len(tokenized_prompt), responses)


def convert_inspect_messages(messages: list[InspectAIChatMessage]) -> list[Message]:
    """Return messages of inspect-ai, with tool calls and images, in this package's form.

    Raises:
        ConfigurationError: if a message holds video, a document, or other unknown content.
    """
    return [_convert_message(message) for message in messages]


@modelapi(name="tinker-sampling")
class InspectAPIFromTinkerSampling(InspectAIModelAPI):
    """Samples from a Tinker sampling client, in the chat format of a renderer."""

    def __init__(
        self,
        renderer_name: str,
        model_name: str,
        model_path: str | None = None,
        sampling_client: tinker.SamplingClient | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        api_key_vars: list[str] | None = None,
        config: InspectAIGenerateConfig = InspectAIGenerateConfig(),  # noqa: B008
        verbose: bool = False,
        include_reasoning: bool = False,
    ) -> None:
        """Set the model.

        Args:
            renderer_name: Name of the chat format.
            model_name: Name of the base model.
            model_path: A checkpoint, `tinker://RUN/sampler_weights/NAME`.
            sampling_client: An open client; without it, one is opened for `model_path`, or for
                the base model.
            base_url: Address of the Tinker service for a client that is opened here.
            api_key: Key of that service.
            api_key_vars: Environment variables of the key, which Inspect's hooks may replace.
            config: Default sampling settings.
            verbose: Whether prompts and replies are logged.
            include_reasoning: Whether replies include the reasoning before the answer.
        """
        super().__init__(model_name, base_url, api_key, list(api_key_vars or ()), config)
        from tinker_cookbook.renderers import load_renderer

        self.renderer: Renderer = load_renderer(renderer_name, model_name)
        self.sampling_client = sampling_client or self._open(model_path)
        self.verbose = verbose
        self.include_reasoning = include_reasoning

    def _open(self, model_path: str | None) -> tinker.SamplingClient:
        import tinker

        client = tinker.ServiceClient(base_url=self.base_url, api_key=self.api_key)
        base_model = None if model_path else self.model_name
        return wait_for_client(
            client.create_sampling_client(model_path=model_path, base_model=base_model)
        )

    async def generate(
        self,
        input: list[InspectAIChatMessage],
        tools: list[InspectAIToolInfo],
        tool_choice: InspectAIToolChoice,
        config: InspectAIGenerateConfig,
    ) -> InspectAIModelOutput:
        """Return the replies to a conversation, with the reason why each of them ended."""
        specs = _tool_specs(tools, tool_choice)
        messages = self.renderer.declare_tools(convert_inspect_messages(input), specs)
        prompt = self.renderer.build_generation_prompt(messages)
        response = await call(
            self.sampling_client,
            "sample",
            prompt=prompt,
            num_samples=config.num_choices or 1,
            sampling_params=self._params(config),
        )
        stops = config.stop_seqs or []
        choices = [self._choice(each, specs, stops, config) for each in response.sequences]
        if self.verbose:
            logger.info("%s\n-> %s", messages, [choice.message.text for choice in choices])
        return InspectAIModelOutput(
            model=self.model_name,
            choices=choices,
            usage=_usage(prompt.length, response.sequences),
        )

    def _params(self, config: InspectAIGenerateConfig) -> tinker.SamplingParams:
        import tinker

        return tinker.SamplingParams(
            max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=-1 if config.top_k is None else config.top_k,
            seed=config.seed,
            stop=_merged_stops(self.renderer.get_stop_sequences(), config.stop_seqs or []),
        )

    def _choice(
        self,
        sequence: tinker.SampledSequence,
        tools: Sequence[ToolSpec],
        stops: Sequence[str],
        config: InspectAIGenerateConfig,
    ) -> ChatCompletionChoice:
        parsed, _ = self.renderer.parse_response(sequence.tokens)
        parsed = self.renderer.fit_tool_calls(parsed, list(tools))
        text, stopped = _cut_at(get_text_content(parsed), stops)
        calls = [] if stopped else _inspect_calls(parsed)
        reason: StopReason = "stop"
        if sequence.stop_reason == "length" and not stopped:
            reason = "max_tokens"
        elif calls:
            reason = "tool_calls"
        message = InspectAIChatMessageAssistant(
            content=self._content(parsed, text),
            tool_calls=calls or None,
            model=self.model_name,
            source="generate",
        )
        logprobs = self._logprobs(sequence) if config.logprobs else None
        return ChatCompletionChoice(message=message, stop_reason=reason, logprobs=logprobs)

    def _content(self, parsed: Message, text: str) -> str | list[InspectContent]:
        thinking = [
            part["thinking"]
            for part in ensure_list(parsed["content"])
            if part["type"] == "thinking"
        ]
        if not thinking or not self.include_reasoning:
            return text
        return [ContentReasoning(reasoning="".join(thinking)), ContentText(text=text)]

    def _logprobs(self, sequence: tinker.SampledSequence) -> Logprobs | None:
        if sequence.logprobs is None:
            return None
        return Logprobs(
            content=[
                Logprob(token=self.renderer.encoder.decode([token]), logprob=value)
                for token, value in zip(sequence.tokens, sequence.logprobs, strict=True)
            ]
        )


def _usage(prompt_length: int, responses: Sequence[tinker.SampledSequence]) -> InspectAIModelUsage:
    sampled = sum(len(response.tokens) for response in responses)
    return InspectAIModelUsage(
        input_tokens=prompt_length,
        output_tokens=sampled,
        total_tokens=prompt_length + sampled,
    )


def _merged_stops(of_format: StopCondition, of_task: Sequence[str]) -> StopCondition:
    """Return what ends the sampling.

    A request takes texts or tokens, not both. If the chat format ends with tokens, the reply is
    cut at the task's stop texts after it was sampled, which gives the same text.
    """
    if of_task and all(isinstance(stop, str) for stop in of_format):
        return [*cast("list[str]", of_format), *of_task]
    return of_format


def _cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop text, and whether there is one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _tool_specs(tools: Sequence[InspectAIToolInfo], choice: InspectAIToolChoice) -> list[ToolSpec]:
    """Return the tools to declare. The model can be offered one tool, but not forced to call it."""
    if choice == "none":
        return []
    wanted = choice.name if isinstance(choice, ToolFunction) else None
    return [
        ToolSpec(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters.model_dump(exclude_none=True),
        )
        for tool in tools
        if wanted is None or tool.name == wanted
    ]


def _inspect_calls(parsed: Message) -> list[InspectAIToolCall]:
    calls = [
        InspectAIToolCall(
            id=found.id or f"call_{number}",
            function=found.function.name,
            arguments=json.loads(found.function.arguments),
        )
        for number, found in enumerate(parsed.get("tool_calls") or ())
    ]
    return calls + [
        InspectAIToolCall(
            id=f"unreadable_{number}", function="unreadable", arguments={}, parse_error=bad.error
        )
        for number, bad in enumerate(parsed.get("unparsed_tool_calls") or ())
    ]


def _convert_message(message: InspectAIChatMessage) -> Message:
    found: Message = {"role": message.role, "content": _convert_content(message.content)}
    if isinstance(message, InspectAIChatMessageAssistant) and message.tool_calls:
        found["tool_calls"] = [
            ToolCall(
                id=each.id,
                function=ToolCall.FunctionBody(
                    name=each.function, arguments=json.dumps(each.arguments, ensure_ascii=False)
                ),
            )
            for each in message.tool_calls
        ]
    if isinstance(message, InspectAIChatMessageTool):
        if message.tool_call_id is not None:
            found["tool_call_id"] = message.tool_call_id
        if message.function is not None:
            found["name"] = message.function
        if message.error is not None:
            found["content"] = message.error.message
    return found


def _convert_content(content: str | list[InspectContent]) -> Content:
    if isinstance(content, str):
        return content
    parts = [_convert_part(part) for part in content]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def _convert_part(part: InspectContent) -> ContentPart:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "reasoning":
        return {"type": "thinking", "thinking": part.reasoning}
    if part.type == "image":
        return {"type": "image", "image": _image_address(part.image)}
    if part.type == "audio":
        return {"type": "audio", "audio": part.audio, "format": part.format}
    raise ConfigurationError(
        f"content of type {part.type!r} cannot be sent to the model; use text, images, or audio."
    )


def _image_address(image: str) -> str:
    """Return an image's URL or data URI; a file is read."""
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "image/png"
    data = base64.b64encode(Path(image).expanduser().read_bytes()).decode()
    return f"data:{kind};base64,{data}"
