"""The base of all renderers: one layout per format, everything else derived from it."""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
from tinker_cookbook.renderers.encoding import Utf8TokenDecoder, build_text_encoder
from tinker_cookbook.renderers.images import ImageProcessorProtocol, image_to_chunk
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser, ResponseParser
from tinker_cookbook.renderers.rendering import (
    Frame,
    Layout,
    Rendering,
    SegmentKind,
    encode_layouts,
)
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments
from tinker_cookbook.renderers.train_on_what import last_user_index, trained_messages
from tinker_cookbook.renderers.types import (
    AudioPart,
    Content,
    ContentPart,
    ImagePart,
    Message,
    MessageDelta,
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
    "ParseFailureKind",
    "ParseTermination",
    "RenderContext",
    "RenderedMessage",
    "Renderer",
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
    "parse_think_blocks",
    "remove_thinking",
    "split_reasoning",
]


@dataclass(frozen=True)
class RenderedMessage:
    """Tokens of one message: the header is context, the output is what can be trained."""

    output: list[tinker.ModelInputChunk]
    header: tinker.EncodedTextChunk | None = None
    stop_overlap: tinker.EncodedTextChunk | None = None
    """Trained after the last message: the start of a next header that ends sampling."""


class _Job(NamedTuple):
    """One example to make."""

    messages: Sequence[Message]
    forms: Sequence[Hashable]
    trained: list[int]


Example = tuple["tinker.ModelInput", np.ndarray]
# With more, the garbage collector walks all their pieces while they wait.
_CONVERSATIONS_AT_ONCE = 16


class Renderer(ABC):
    """Turns messages into tokens and sampled tokens back into a message.

    A format implements `lay_out`, `open_turn`, `get_stop_sequences` and `grammar` (or, simpler,
    `render_message` and `get_stop_sequences`). All methods are safe to call from several threads.
    """

    tokenizer: Tokenizer
    roles: tuple[str, ...] = ("system", "user", "assistant", "tool")
    """Roles the format can write; others are refused."""
    bos_ids: tuple[int, ...] = ()
    """What the format writes before the first message, never trained."""
    disables_thinking: bool = False
    supports_streaming: bool = True
    takes_text_arguments: bool = True
    """Whether the model's own chat template takes the arguments of a call as JSON text."""
    registry_key: tuple[str, str | None, bool] | None = None
    """(renderer name, model name, has image processor), set by `get_renderer` for pickling."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encoder = build_text_encoder(tokenizer)

    @abstractmethod
    def get_stop_sequences(self) -> list[int] | list[str]:
        """Return what ends a sampled turn: token ids, or strings for formats without such."""

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        """Append all pieces of a conversation, from begin-of-sequence to the last separator.

        Args:
            layout: where the pieces go.
            messages: the conversation; may be empty.
            forms: how each message is to be written; one of the values of `turn_forms` each.
        """
        del forms
        for index, message in enumerate(messages):
            rendered = self.render_message(message, context_of(messages, index))
            sampled = message["role"] == "assistant"
            _lay_out_chunk(layout, rendered.header, SegmentKind.FRAME, index)
            for chunk in rendered.output:
                _lay_out_chunk(layout, chunk, SegmentKind.CONTENT, index, sampled=sampled)
            if index == len(messages) - 1:
                overlap = rendered.stop_overlap
                _lay_out_chunk(layout, overlap, SegmentKind.STOP, index, sampled=sampled)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        """Append what the generation prompt has after the messages: the header of `role`."""
        opened = [*messages, Message(role=role, content="")]
        rendered = self.render_message(opened[-1], context_of(opened, len(messages)))
        _lay_out_chunk(layout, rendered.header, SegmentKind.FRAME, len(messages))

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        """Return the tokens of one message: for formats that do not implement `lay_out`."""
        raise RendererError(
            f"{type(self).__name__} writes no single messages; use render or render_prompt. "
            "A new format implements lay_out and open_turn, or render_message."
        )

    def response_parser(self) -> ReplyParser:
        """Return a parser to feed with sampled tokens as they come."""
        return ResponseParser(self.encoder, self.grammar())

    def grammar(self) -> Grammar:
        """Return which tokens structure a reply; unless overridden, only the stop tokens do."""
        stops = self.get_stop_sequences()
        return Grammar(stop=frozenset(stop for stop in stops if isinstance(stop, int)))

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return how the format writes each message of this conversation.

        For formats that write one message in several ways, depending on what follows: `lay_out`
        obeys the forms, and where they change as the conversation goes on, replies cannot be
        trained together in one example.
        """
        return [None] * len(messages)

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return the forms where a new reply follows; unless overridden, `turn_forms`."""
        return self.turn_forms(messages)

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        """Raise RendererError if sampling could never produce this assistant message."""
        del messages, index

    @property
    def has_extension_property(self) -> bool:
        """Whether each prompt starts with the previous prompt and the reply sampled from it."""
        return True

    # ---- rendering ----

    def render(self, messages: Sequence[Message]) -> Rendering:
        """Render a whole conversation, equal to the model's own template without a new prompt."""
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
            prefill: text the reply starts with. It is the caller's own, not a message, so control
                tokens written in it count as such (for example `<think>`).
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
            RendererError: if a trained reply, or what stands before it, is written otherwise than
                when it is sampled. `build_supervised_examples` splits such conversations.
        """
        trained = self._trained(messages, train_on_what)
        last = len(messages) - 1
        if trained == [last] and messages[last]["role"] == "assistant":
            return self.build_supervised_examples(messages, train_on_what)[0]
        if train_on_what != TrainOnWhat.ALL_TOKENS:
            self._refuse_unfaithful_turns(messages, trained)
        layout = self._layout(messages, self.turn_forms(messages))
        rendering = encode_layouts([layout], self.encoder)[0]
        return rendering.model_input(), self._weights(rendering, trained, train_on_what)

    def build_supervised_examples(
        self,
        messages: list[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_TURN,
    ) -> list[Example]:
        """Return one example, or several where the format rewrites what it wrote before.

        Formats that strip old thinking get one example per trained assistant message, cut after
        it, so every trained token follows the very prompt it would be sampled from. Trained
        messages of other roles go with the next trained reply.
        """
        return self.build_supervised_batch([messages], train_on_what)[0]

    def build_supervised_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_TURN,
    ) -> list[list[Example]]:
        """Return `build_supervised_examples` of each conversation, some encoded at once."""
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
        """Return `build_supervised_examples` as segments with their origin, before the service."""
        plans = [self._split(messages, train_on_what) for messages in conversations]
        layouts = [self._layout(job.messages, job.forms) for plan in plans for job in plan]
        renderings = iter(encode_layouts(layouts, self.encoder))
        results: list[list[tuple[Rendering, np.ndarray]]] = []
        for plan in plans:
            pairs = zip(plan, renderings, strict=False)
            results.append([(r, self._weights(r, job.trained, train_on_what)) for job, r in pairs])
        return results

    def _trained(self, messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
        self._check_messages(messages)
        if not messages:
            raise RendererError("messages=[] has nothing to train on; give at least one message.")
        trained = trained_messages(messages, train_on_what)
        for index in trained:
            if messages[index]["role"] == "assistant":
                self.check_trained_turn(messages, index)
        return trained

    def _weights(
        self, rendering: Rendering, trained: Sequence[int], train_on_what: TrainOnWhat
    ) -> np.ndarray:
        if train_on_what != TrainOnWhat.ALL_TOKENS:
            return rendering.weights(trained)
        weights = np.ones(rendering.length, dtype=np.float32)
        weights[: len(self.bos_ids)] = 0
        return weights

    def _split(self, messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[_Job]:
        trained = self._trained(messages, train_on_what)
        if train_on_what == TrainOnWhat.ALL_TOKENS or self._trains_in_one(messages, trained):
            return [_Job(messages, self.turn_forms(messages), trained)]
        jobs: list[_Job] = []
        pending: list[int] = []
        for index in trained:
            pending.append(index)
            if messages[index]["role"] == "assistant":
                part = messages[: index + 1]
                # History as the prompt has it, then the reply as it is sampled.
                forms = [*self.prompt_forms(part[:-1]), self.turn_forms(part)[-1]]
                jobs.append(_Job(part, forms, pending))
                pending = []
        if pending or not jobs:
            jobs.append(_Job(messages, self.turn_forms(messages), pending))
        return jobs

    def _trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        """Whether all trained replies go into one example."""
        del messages, trained
        return self.has_extension_property

    def _rewritten_turn(self, messages: Sequence[Message], trained: Sequence[int]) -> int | None:
        """Return a trained reply that is not written as when it is sampled, after its prompt."""
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

    def _refuse_unfaithful_turns(self, messages: Sequence[Message], trained: Sequence[int]) -> None:
        index = self._rewritten_turn(messages, trained)
        if index is not None:
            raise RendererError(
                f"messages[{index}]: this format rewrites earlier turns (it drops their "
                "thinking), so in one example this reply would be trained on tokens that "
                "sampling never sees there. Use build_supervised_examples, which makes one "
                "example per trained reply, or train_on_what=last_assistant_message."
            )

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
        """Parse the tokens of a sampled reply; accepts any tokens and never raises."""
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

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        """Return a parsed reply whose arguments have the types that the tools declare.

        Changes something only in formats that write arguments without types (`<parameter=zip>`
        8001), and there only what is still written by the same tokens: text that was read as a
        number, truth value, null, list or object. Wrong types stay for the tool to refuse.
        """
        del tools
        return message

    def to_openai_message(self, message: Message) -> dict[str, Any]:
        """Return the message as the model's chat template takes it.

        Arguments of calls are JSON text, as in the OpenAI API, where the template takes that;
        others (Qwen2.5, 3.5 and later, Nemotron, GLM, Gemma 4, Llama, Mistral, gpt-oss) raise on
        text, or would quote it again, and get objects.
        """
        reasoning, text = split_reasoning(message)
        result: dict[str, Any] = {"role": message["role"], "content": text}
        if reasoning:
            result["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            as_text = self.takes_text_arguments
            result["tool_calls"] = [
                _openai_call(call, as_text=as_text) for call in message.get("tool_calls", [])
            ]
        for key in ("tool_call_id", "name"):
            if key in message:
                result[key] = message.get(key)
        return result

    def create_conversation_prefix_with_tools(
        self, tools: list[ToolSpec], system_prompt: str = ""
    ) -> list[Message]:
        """Return the messages that declare tools: one system message that carries them."""
        raise RendererError(f"{type(self).__name__} has no tool format; use a model that has one.")

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

    # ---- building blocks for formats ----

    def control_token(self, name: str) -> int:
        """Return the id of a control token that the format needs."""
        token = self.encoder.control_id(name)
        if token is None:
            model = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise RendererError(
                f"tokenizer={model!r} has no token {name!r}, which {type(self).__name__} needs; "
                "choose the renderer made for this model."
            )
        return token

    def build_frame(self, control: Sequence[int], tail: str) -> Frame:
        """Return the opening of a message: control tokens, then text touching the content."""
        encoder = self.encoder
        tail_ids = encoder.encode_batch([tail])[0] if tail else []
        is_separate = not tail or (tail.endswith("\n") and encoder.newline_is_boundary)
        return Frame((*control, *tail_ids), tuple(control), tail, is_separate)

    # ---- pickling ----

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a name: some hundred bytes instead of megabytes of tokenizer."""
        if self.registry_key is None or not self.registry_key[1]:
            raise pickle.PicklingError(
                f"{type(self).__name__} was not made by name, so it cannot be pickled; make it "
                "with get_renderer(name, tokenizer, model_name=...)."
            )
        from tinker_cookbook.renderers import _rebuild_renderer

        return _rebuild_renderer, self.registry_key


def context_of(messages: Sequence[Message], index: int) -> RenderContext:
    """Return where message number `index` stands."""
    user = last_user_index(messages)
    return RenderContext(
        idx=index,
        is_last=index == len(messages) - 1,
        prev_message=messages[index - 1] if index else None,
        next_message=messages[index + 1] if index + 1 < len(messages) else None,
        last_user_index=user,
        in_last_assistant_turn=messages[index]["role"] == "assistant" and index > user,
    )


def _lay_out_chunk(
    layout: Layout,
    chunk: tinker.ModelInputChunk | None,
    kind: SegmentKind,
    message: int,
    *,
    sampled: bool = False,
) -> None:
    if chunk is None:
        return
    if chunk.type == "encoded_text":
        layout.ids(list(chunk.tokens), kind, message, sampled=sampled)
    else:
        layout.media(chunk, message)


def _openai_call(call: Any, *, as_text: bool) -> dict[str, Any]:
    name, arguments = call_name_and_arguments(call)
    given = arguments if as_text else json.loads(arguments)
    record: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": given}}
    call_id = call.id if isinstance(call, ToolCall) else call.get("id")
    return record if call_id is None else {"id": call_id, **record}
