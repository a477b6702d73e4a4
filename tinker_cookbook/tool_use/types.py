"""The interface of a tool: a name, a schema, and a method that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tinker_cookbook.renderers.types import Message, ToolSpec

__all__ = ["Tool", "ToolInput", "ToolResult"]


@dataclass
class ToolInput:
    """The arguments of one call."""

    arguments: dict[str, Any]
    call_id: str | None = None


@dataclass
class ToolResult:
    """The result of one call, for the model and for the environment."""

    messages: list[Message]
    """Messages for the model; usually one of role `tool`."""
    should_stop: bool = False
    """Whether the episode ends after this call."""
    metrics: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Tool(Protocol):
    """Anything that the model may call."""

    @property
    def name(self) -> str:
        """The name as the model writes it."""
        ...

    @property
    def description(self) -> str:
        """What the tool does, for the model to read."""
        ...

    @property
    def parameters_schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        ...

    async def run(self, input: ToolInput) -> ToolResult:
        """Run the tool. Return errors that the model can correct; do not raise them."""
        ...

    def to_spec(self) -> ToolSpec:
        """Return name, description and schema together."""
        ...
