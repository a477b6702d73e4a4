"""Data types shared by all renderers: messages, tool calls, training modes, parse results.

A message is a plain dict (`Message`), so conversations read from JSON can be used directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NotRequired, Protocol, TypedDict

import pydantic

from tinker_cookbook.replies.json_source import JsonObject

if TYPE_CHECKING:
    from PIL import Image

Role = str


class StrictBase(pydantic.BaseModel):
    """Immutable record that refuses unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ToolCall(StrictBase):
    """One call of a tool, in the shape of the OpenAI API."""

    class FunctionBody(pydantic.BaseModel):
        """The called tool's name, and its arguments as JSON text."""

        name: str
        arguments: str
        """A JSON object as text, exactly as it was written by the model."""

    type: Literal["function"] = "function"
    id: str | None = None
    function: FunctionBody


class UnparsedToolCall(StrictBase):
    """Text that looks like a tool call but is not a valid one."""

    raw_text: str
    """The whole call with its markers, so that no sampled text is lost."""
    error: str


class ToolSpec(TypedDict):
    """Declaration of a tool; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: JsonObject


class ToolDeclaration(TypedDict):
    """A tool in the shape in which chat templates and the OpenAI API take it."""

    type: Literal["function"]
    function: ToolSpec


class TextPart(TypedDict):
    """Text within a message."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """An image: a PIL image, a URL, or a data URI."""

    type: Literal["image"]
    image: str | Image.Image


class AudioPart(TypedDict):
    """An audio clip: a path or URL, or encoded bytes."""

    type: Literal["audio"]
    audio: str | bytes
    format: NotRequired[Literal["wav", "mp3", "flac"]]
    num_frames: NotRequired[int]
    sample_rate: NotRequired[int]


class ThinkingPart(TypedDict):
    """Reasoning that precedes the answer."""

    type: Literal["thinking"]
    thinking: str


ContentPart = TextPart | ImagePart | AudioPart | ThinkingPart
Content = str | list[ContentPart]


class OpenAIFunction(TypedDict):
    """The called function of a call in the OpenAI API."""

    name: str
    arguments: str | JsonObject
    """JSON text, or an object where the chat template wants one."""


class OpenAIToolCall(TypedDict):
    """A tool call as a dict, in the shape of the OpenAI API."""

    id: NotRequired[str]
    type: Literal["function"]
    function: OpenAIFunction


CallLike = ToolCall | OpenAIToolCall | Mapping[str, object]
"""A call in a message; datasets have dicts."""


class OpenAIMessage(TypedDict):
    """A message as chat templates and the OpenAI API take it."""

    role: Role
    content: str | list[JsonObject]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[OpenAIToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Message(TypedDict):
    """One message of a conversation."""

    role: Role
    content: Content
    tool_calls: NotRequired[list[ToolCall]]
    unparsed_tool_calls: NotRequired[list[UnparsedToolCall]]
    trainable: NotRequired[bool]
    """Read (and then required on every message) with `TrainOnWhat.CUSTOMIZED` only."""
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    tools: NotRequired[list[ToolSpec]]
    """Tools declared by a system message; see `create_conversation_prefix_with_tools`."""
    reasoning_content: NotRequired[str]
    """Reasoning as OpenAI-compatible servers return it; same as a leading thinking part."""
    trailing_text: NotRequired[str]
    """Set by `parse_response`: text sampled after the end of the message."""


class TrainOnWhat(StrEnum):
    """Which tokens of a conversation have weight 1."""

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    """The last message, if the assistant wrote it."""
    LAST_ASSISTANT_TURN = "last_assistant_turn"
    """All assistant messages after the last user message (a run of tool calls and the answer)."""
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_MESSAGES = "all_messages"
    """Bodies and end-of-turn tokens of all roles; no headers."""
    ALL_TOKENS = "all_tokens"
    """All tokens including headers, except a begin-of-sequence token."""
    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    CUSTOMIZED = "customized"
    """Messages with `trainable: True`; every message must say True or False."""


class ParseTermination(StrEnum):
    """How a sampled response ended."""

    STOP_SEQUENCE = "stop_sequence"
    EOS = "eos"
    """Another token that ends generation, such as the end of a document."""
    MALFORMED = "malformed"
    """No end was found (usually the token limit), or text follows the end."""

    @property
    def is_clean(self) -> bool:
        """Whether the model itself ended the response."""
        return self is not ParseTermination.MALFORMED

    @property
    def is_stop_sequence(self) -> bool:
        """Whether the response ended with the format's own stop sequence."""
        return self is ParseTermination.STOP_SEQUENCE


class ParseFailureKind(StrEnum):
    """What was wrong with a response."""

    STRUCTURAL = "structural"
    """It did not end, or a block in it did not."""
    CONTENT = "content"
    """It ended properly, and a tool call in it is invalid."""


@dataclass(frozen=True)
class StreamingMessageHeader:
    """First item of a streamed parse."""

    role: str
    name: str | None = None


@dataclass(frozen=True)
class StreamingTextDelta:
    """More text of content part `content_index`."""

    text: str
    content_index: int = 0


@dataclass(frozen=True)
class StreamingThinkingDelta:
    """More reasoning of content part `content_index`."""

    thinking: str
    content_index: int = 0


MessageDelta = StreamingMessageHeader | StreamingTextDelta | StreamingThinkingDelta | Message


@dataclass(frozen=True)
class RenderContext:
    """The place of a message in its conversation."""

    idx: int
    is_last: bool
    prev_message: Message | None = None
    next_message: Message | None = None
    last_user_index: int = -1
    """-1 without a user message."""
    in_last_assistant_turn: bool = False


class ImageProcessorProtocol(Protocol):
    """What renderers need of a model's image processor; those of transformers have it."""

    @property
    def merge_size(self) -> int:
        """Number of patches per side that become one position of the model's input."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        ...

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, object] | None = None
    ) -> int:
        """Return the number of patches of an image of this size in pixels, after resizing."""
        ...
