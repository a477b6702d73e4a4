"""The base class of all renderers, and the names that programs import from here.

What a new format defines is in format.py. What follows from it is here: rendering whole
conversations, prompts and training examples, and parsing replies.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.content import (
    PARSE_FAILURE_DETAIL_MAX_CHARS,
    UNTERMINATED_TOOL_BLOCK_ERROR,
    classify_parse_failure,
    content_to_jsonable,
    detect_unterminated_tool_block,
    ensure_list,
    ensure_text,
    format_content_as_string,
    get_text_content,
    has_thinking,
    message_to_jsonable,
    parse_content_blocks,
    parse_think_blocks,
    remove_thinking,
    split_reasoning,
)
from tinker_cookbook.renderers.encoding.encoder import Utf8TokenDecoder
from tinker_cookbook.renderers.examples import find_trained, plan_examples, refuse_rewritten_turn
from tinker_cookbook.renderers.format import Format
from tinker_cookbook.renderers.images import image_to_chunk
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.rendering import Rendering, encode_layouts
from tinker_cookbook.renderers.single_messages import (
    RenderedMessage,
    parse_response_for_stop_token,
    tokens_weights_from_strings_weights,
)
from tinker_cookbook.renderers.tool_calls import openai_call
from tinker_cookbook.renderers.types import (
    AudioPart,
    Content,
    ContentPart,
    ImagePart,
    ImageProcessorProtocol,
    Message,
    MessageDelta,
    OpenAIMessage,
    ParseFailureKind,
    ParseTermination,
    RenderContext,
    Role,
    StreamingMessageHeader,
    StreamingTextDelta,
    StreamingThinkingDelta,
    StrictBase,
    TextPart,
    ThinkingPart,
    ToolCall,
    ToolSpec,
    TrainOnWhat,
    UnparsedToolCall,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "PARSE_FAILURE_DETAIL_MAX_CHARS",
    "UNTERMINATED_TOOL_BLOCK_ERROR",
    "AudioPart",
    "Content",
    "ContentPart",
    "ImagePart",
    "ImageProcessorProtocol",
    "Message",
    "MessageDelta",
    "NamedRenderer",
    "ParseFailureKind",
    "ParseTermination",
    "RenderContext",
    "RenderedMessage",
    "Renderer",
    "RendererFactory",
    "Role",
    "StreamingMessageHeader",
    "StreamingTextDelta",
    "StreamingThinkingDelta",
    "StrictBase",
    "TextPart",
    "ThinkingPart",
    "ToolCall",
    "ToolSpec",
    "TrainOnWhat",
    "UnparsedToolCall",
    "Utf8TokenDecoder",
    "classify_parse_failure",
    "content_to_jsonable",
    "detect_unterminated_tool_block",
    "ensure_list",
    "ensure_text",
    "format_content_as_string",
    "get_text_content",
    "has_thinking",
    "image_to_chunk",
    "message_to_jsonable",
    "parse_content_blocks",
    "parse_response_for_stop_token",
    "parse_think_blocks",
    "remove_thinking",
    "split_reasoning",
    "tokens_weights_from_strings_weights",
]

Example = tuple["tinker.ModelInput", np.ndarray]
# With more at once, the garbage collector walks all their pieces while they wait.
_CONVERSATIONS_AT_ONCE = 16


class Renderer(Format):
    """Turns messages into tokens and sampled tokens back into a message.

    A new format is a subclass that defines what `Format` (format.py) asks for, and nothing below.
    """

    _renderer_name: str | None = None
    """Set by `get_renderer` for pickling, with the next three; programs read them too."""
    _model_name: str | None = None
    _has_image_processor: bool = False
    _rebuild: Callable[[str, str, bool], Renderer] | None = None

    # ---- rendering ----

    def render(self, messages: Sequence[Message]) -> Rendering:
        """Render a whole conversation, like the model's own template without a generation
        prompt."""
        return self.render_batch([messages])[0]

    def render_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Rendering]:
        """Render conversations, encoding all their texts in one call."""
        for messages in conversations:
            self._check_messages(messages)
        layouts = [self._layout(m, self.turn_forms(m)) for m in conversations]
        return encode_layouts(layouts, self.encoder)

    def _layout(self, messages: Sequence[Message], forms: Sequence[Hashable]) -> Layout:
        layout = Layout()
        self.lay_out(layout, messages, forms)
        return layout

    def _prompt_layout(self, messages: Sequence[Message], role: Role) -> Layout:
        layout = self._layout(messages, self.prompt_forms(messages))
        self.open_turn(layout, messages, role)
        return layout

    def render_prompt(
        self, messages: Sequence[Message], role: Role = "assistant", prefill: str | None = None
    ) -> Rendering:
        """Render the prompt from which the next message of `role` is sampled.

        Args:
            messages: the conversation so far; may be empty.
            role: who speaks next.
            prefill: text that the reply starts with. It is not a message, so control tokens written
                in it (for example `<think>`) become control tokens.
        """
        self._check_messages(messages)
        self._check_role(role, len(messages))
        layout = self._prompt_layout(messages, role)
        if prefill:
            tokens = self.encoder.encode_markup(prefill)
            layout.ids(tokens, SegmentKind.FRAME, len(messages))
        return encode_layouts([layout], self.encoder)[0]

    def build_generation_prompt(
        self, messages: list[Message], role: Role = "assistant", prefill: str | None = None
    ) -> tinker.ModelInput:
        """Return the prompt from which the next message of `role` is sampled."""
        return self.render_prompt(messages, role, prefill).model_input()

    def build_supervised_example(
        self,
        messages: list[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    ) -> Example:
        """Return the conversation's input and its weights, float32 [length].

        Raises:
            RendererError: if a trained reply, or its prompt, is written differently than when it is
                sampled. `build_supervised_examples` splits such conversations.
        """
        self._check_messages(messages)
        trained = find_trained(self, messages, train_on_what)
        last = len(messages) - 1
        if trained == [last] and messages[last]["role"] == "assistant":
            return self.build_supervised_examples(messages, train_on_what)[0]
        if train_on_what != TrainOnWhat.ALL_TOKENS:
            refuse_rewritten_turn(self.rewritten_turn(messages, trained))
        layout = self._layout(messages, self.turn_forms(messages))
        rendering = encode_layouts([layout], self.encoder)[0]
        return rendering.model_input(), self._weights(rendering, trained, train_on_what)

    def build_supervised_examples(
        self,
        messages: list[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_TURN,
    ) -> list[Example]:
        """Return one example, or several if the format rewrites earlier messages.

        Formats that drop old thinking get one example per trained reply, cut after it, so every
        trained token follows the prompt that it would be sampled from. Trained messages of other
        roles are in the example of the next trained reply.
        """
        return self.build_supervised_batch([messages], train_on_what)[0]

    def build_supervised_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_TURN,
    ) -> list[list[Example]]:
        """Return `build_supervised_examples` of each conversation; several are encoded at once."""
        starts = range(0, len(conversations), _CONVERSATIONS_AT_ONCE)
        return [
            [(rendering.model_input(), weights) for rendering, weights in examples]
            for start in starts
            for examples in self.render_examples(
                conversations[start : start + _CONVERSATIONS_AT_ONCE], train_on_what
            )
        ]

    def render_examples(
        self, conversations: Sequence[Sequence[Message]], train_on_what: TrainOnWhat
    ) -> list[list[tuple[Rendering, np.ndarray]]]:
        """Return `build_supervised_examples` as segments with their origin, not yet as model
        inputs."""
        for messages in conversations:
            self._check_messages(messages)
        planned = [plan_examples(self, messages, train_on_what) for messages in conversations]
        layouts = [self._layout(plan.messages, plan.forms) for plans in planned for plan in plans]
        renderings = iter(encode_layouts(layouts, self.encoder))
        results: list[list[tuple[Rendering, np.ndarray]]] = []
        for plans in planned:
            pairs = zip(plans, renderings, strict=False)
            results.append([(r, self._weights(r, p.trained, train_on_what)) for p, r in pairs])
        return results

    def rewritten_turn(self, messages: Sequence[Message], trained: Sequence[int]) -> int | None:
        """Return the first trained reply that sampling would not see as it is written here.

        None if all of them, and what precedes them, are written as they are sampled.
        """
        if self.has_extension_property:
            return None
        forms = list(self.turn_forms(messages))
        for index in trained:
            if messages[index]["role"] != "assistant":
                continue
            as_sampled = self.turn_forms(messages[: index + 1])[index]
            in_prompt = list(self.prompt_forms(messages[:index]))
            if forms[index] != as_sampled or forms[:index] != in_prompt:
                return index
        return None

    def _weights(
        self, rendering: Rendering, trained: Sequence[int], train_on_what: TrainOnWhat
    ) -> np.ndarray:
        if train_on_what != TrainOnWhat.ALL_TOKENS:
            return rendering.weights(trained)
        weights = np.ones(rendering.length, dtype=np.float32)
        weights[: len(self.bos_ids)] = 0
        return weights

    # ---- checks ----

    def _check_messages(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in self.roles:
                self._check_role(role, index)

    def _check_role(self, role: object, index: int) -> None:
        if role not in self.roles:
            raise RendererError(
                f"messages[{index}]: role {role!r} is unknown in this format; use one of "
                f"{', '.join(self.roles)}."
            )

    # ---- parsing ----

    def parse_response(self, response: Sequence[int]) -> tuple[Message, ParseTermination]:
        """Parse the tokens of a sampled reply. Any tokens are accepted; this never raises."""
        parser = self.response_parser()
        for _ in parser.feed(response):
            pass
        for _ in parser.finish():
            pass
        return parser.result()

    def parse_response_streaming(self, response: Sequence[int]) -> Iterator[MessageDelta]:
        """Yield the header, text and thinking as the tokens complete them, then the message.

        The deltas add up to the parts of the final message.
        """
        parser = self.response_parser()
        yield StreamingMessageHeader(role="assistant")
        for token in response:
            yield from parser.feed((token,))
        yield from parser.finish()
        yield parser.result()[0]

    def to_openai_message(self, message: Message) -> OpenAIMessage:
        """Return the message in the form that the model's chat template takes.

        Arguments of calls are JSON text, as in the OpenAI API, if the template accepts it. Other
        templates (Qwen2.5, 3.5 and later, Nemotron, GLM, Gemma 4, Llama, Mistral, gpt-oss) raise on
        text, or would quote it again, and get objects.
        """
        reasoning, text = split_reasoning(message)
        result = OpenAIMessage(role=message["role"], content=text)
        if reasoning:
            result["reasoning_content"] = reasoning
        calls, as_text = message.get("tool_calls"), self.takes_text_arguments
        if calls:
            result["tool_calls"] = [openai_call(call, as_text=as_text) for call in calls]
        if "tool_call_id" in message:
            result["tool_call_id"] = message["tool_call_id"]
        if "name" in message:
            result["name"] = message["name"]
        return result

    def declare_tools(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> list[Message]:
        """Return the messages with tools declared, in the first system message or a new one."""
        if not tools:
            return list(messages)
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        system_prompt = "" if first is None else split_reasoning(first)[1]
        prefix = self.create_conversation_prefix_with_tools(list(tools), system_prompt)
        if any("trainable" in message for message in messages):
            trainable = False if first is None else first.get("trainable", False)
            for message in prefix:
                message["trainable"] = trainable
        return [*prefix, *messages[first is not None :]]

    # ---- pickling ----

    def __reduce__(self) -> tuple[Callable[[str, str, bool], Renderer], tuple[str, str, bool]]:
        """Pickle as a name: a few hundred bytes instead of megabytes of tokenizer."""
        if not self._renderer_name or not self._model_name or self._rebuild is None:
            raise pickle.PicklingError(
                f"{type(self).__name__} was not made by name, so it cannot be pickled; make it "
                "with get_renderer(name, tokenizer, model_name=...)."
            )
        key = (self._renderer_name, self._model_name, self._has_image_processor)
        return self._rebuild, key


RendererFactory = Callable[["Tokenizer", ImageProcessorProtocol | None], Renderer]


@dataclass(frozen=True)
class NamedRenderer:
    """One name that `get_renderer` knows, and its row of the table in docs/renderers.md."""

    name: str
    make: RendererFactory
    models: str
    """The models trained with this format."""
    notes: str
    """What sets it apart from the other formats."""
