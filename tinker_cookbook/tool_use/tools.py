"""Python functions as tools.

    @tool
    async def look_up(word: str, limit: int = 3) -> str:
        "Find a word in the dictionary."

The schema is made from the type hints and the description from the docstring. Mistakes of the model
(bad JSON, missing arguments, wrong types) and exceptions in the function are returned to the model
as JSON with an `error`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pydantic

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.types import ContentPart, Message, ToolCall, ToolSpec
from tinker_cookbook.tool_use.types import Tool, ToolInput, ToolResult

__all__ = [
    "FunctionTool",
    "error_tool_result",
    "handle_tool_call",
    "simple_tool_result",
    "tool",
]

NO_PARAMETERS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def simple_tool_result(
    content: str | list[ContentPart],
    *,
    call_id: str = "",
    name: str = "",
    should_stop: bool = False,
    metrics: dict[str, float] | None = None,
    metadata: dict[str, Any] | None = None,
) -> ToolResult:
    """Return a tool result of one message."""
    message: Message = {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}
    return ToolResult([message], should_stop, metrics or {}, metadata or {})


def error_tool_result(
    error_msg: str,
    *,
    call_id: str = "",
    name: str = "",
    error_type: str = "execution_error",
    should_stop: bool = False,
) -> ToolResult:
    """Return an error as JSON for the model; the metric `tool_error` counts it."""
    content = json.dumps({"error": error_msg, "error_type": error_type}, ensure_ascii=False)
    return simple_tool_result(
        content,
        call_id=call_id,
        name=name,
        should_stop=should_stop,
        metrics={"tool_error": 1.0},
        metadata={"error_type": error_type},
    )


class FunctionTool:
    """A function, or an async function, that the model may call.

    A method decorated with `@tool` is bound to its object on access, as any method is.
    """

    def __init__(self, fn: Callable[..., object]) -> None:
        """Read the function's signature.

        Raises:
            ConfigurationError: if a parameter has no type hint or cannot be named in a call.
        """
        self._fn = fn
        self._model = _arguments_model(fn)
        self.name: str = fn.__name__
        self.description: str = inspect.getdoc(fn) or ""
        self.parameters_schema: dict[str, Any] = _schema(self._model)

    def __get__(self, instance: object, owner: type) -> FunctionTool:
        if instance is None:
            return self
        return FunctionTool(self._fn.__get__(instance, owner))

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function itself."""
        return self._fn(*args, **kwargs)

    def to_spec(self) -> ToolSpec:
        """Return name, description and schema."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters_schema,
        }

    async def run(self, input: ToolInput) -> ToolResult:
        """Check the arguments and call the function; a plain function runs in a thread."""
        call_id = input.call_id or ""
        try:
            arguments = self._model.model_validate(input.arguments)
        except pydantic.ValidationError as error:
            return error_tool_result(
                _readable(error), call_id=call_id, name=self.name, error_type="validation_error"
            )
        given = {name: getattr(arguments, name) for name in type(arguments).model_fields}
        try:
            if inspect.iscoroutinefunction(self._fn):
                result = await self._fn(**given)
            else:
                result = await asyncio.to_thread(self._fn, **given)
        except Exception as error:  # whatever the function raises goes back to the model
            return error_tool_result(
                f"{type(error).__name__}: {error}", call_id=call_id, name=self.name
            )
        return self._to_result(result, call_id)

    def _to_result(self, result: object, call_id: str) -> ToolResult:
        if isinstance(result, ToolResult):
            for message in result.messages:
                message["tool_call_id"] = message.get("tool_call_id") or call_id
                message["name"] = message.get("name") or self.name
            return result
        text = result if isinstance(result, str) else json.dumps(result, default=str)
        return simple_tool_result(text, call_id=call_id, name=self.name)


def tool(fn: Callable[..., object]) -> FunctionTool:
    """Make a tool of a function or method; see the docstring of the module."""
    return FunctionTool(fn)


async def handle_tool_call(tools: dict[str, Tool], tool_call: ToolCall) -> ToolResult:
    """Run a tool call of the model; mistakes of the model become error results.

    Args:
        tools: The tools by name.
        tool_call: The call as the renderer parsed it.
    """
    name, call_id = tool_call.function.name, tool_call.id or ""
    if name not in tools:
        known = ", ".join(tools) or "none"
        return error_tool_result(
            f"tool {name!r} does not exist; the tools are: {known}",
            call_id=call_id,
            name=name,
            error_type="tool_not_found",
        )
    try:
        arguments = json.loads(tool_call.function.arguments or "{}")
    except ValueError as error:
        return error_tool_result(
            f"the arguments are not JSON: {error}",
            call_id=call_id,
            name=name,
            error_type="invalid_json",
        )
    if not isinstance(arguments, dict):
        return error_tool_result(
            "the arguments must be a JSON object",
            call_id=call_id,
            name=name,
            error_type="invalid_json",
        )
    try:
        result = await tools[name].run(ToolInput(arguments, tool_call.id))
    except Exception as error:  # the tool may be any code of the user
        return error_tool_result(f"{type(error).__name__}: {error}", call_id=call_id, name=name)
    return result


def _arguments_model(fn: Callable[..., object]) -> type[pydantic.BaseModel]:
    hints = get_type_hints(fn, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind in NO_PARAMETERS or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigurationError(
                f"tool {fn.__name__}: parameter {name!r} cannot be given by name; use plain "
                "parameters."
            )
        if name == "self" and name not in hints:
            continue
        if name not in hints:
            raise ConfigurationError(
                f"tool {fn.__name__}: parameter {name!r} has no type hint, which the schema needs; "
                f"write `{name}: str`."
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (_described(hints[name]), default)
    return pydantic.create_model(
        f"{fn.__name__}_arguments", __config__=pydantic.ConfigDict(extra="forbid"), **fields
    )


def _described(hint: object) -> object:
    """Turn the text of `Annotated[int, "how many"]` into the parameter's description."""
    if get_origin(hint) is not Annotated:
        return hint
    base, *notes = get_args(hint)
    text = next((note for note in notes if isinstance(note, str)), None)
    return Annotated[base, pydantic.Field(description=text)] if text else hint


def _schema(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    schema.pop("title", None)
    for field in schema.get("properties", {}).values():
        field.pop("title", None)
    schema.setdefault("properties", {})
    return schema


def _readable(error: pydantic.ValidationError) -> str:
    problems = [
        f"{'.'.join(map(str, item['loc'])) or 'arguments'}: {item['msg']}"
        for item in error.errors(include_url=False)
    ]
    return "; ".join(problems)
