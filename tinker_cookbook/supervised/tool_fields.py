"""Tool calls and tool declarations of a row."""

from __future__ import annotations

import json

from tinker_cookbook.renderers import ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.replies.json_source import JsonObject, load_json
from tinker_cookbook.supervised.row_fields import FieldReader, shown

__all__ = ["ToolReader"]

_ARGUMENT_KEYS = ("arguments", "parameters")


class ToolReader(FieldReader):
    """Reads the tool fields of messages, and the tools declared next to the messages."""

    def tool_calls(self, value: object, at: str) -> list[ToolCall]:
        value = self.from_json_text(value, at) if isinstance(value, str) else value
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail_type(value, "a list of tool calls", at)
        return [self.tool_call(call, f"{at}[{i}]") for i, call in enumerate(value)]

    def tool_call(self, value: object, at: str) -> ToolCall:
        if not isinstance(value, dict):
            self.fail_type(value, "an object with function", at)
        value = self.wrapped_call(value)
        self.check_keys(value, ("type", "id", "index", "function"), at)
        function = self.from_json_text(value.get("function"), f"{at}.function")
        if not isinstance(function, dict):
            self.fail_type(function, "an object with name and arguments", f"{at}.function")
        self.check_keys(function, ("name", "arguments"), f"{at}.function")
        call_id = value.get("id")
        return ToolCall(
            id=None if call_id is None else self.string(call_id, f"{at}.id"),
            function=ToolCall.FunctionBody(
                name=self.string(function.get("name"), f"{at}.function.name"),
                arguments=self.arguments(function.get("arguments"), f"{at}.function.arguments"),
            ),
        )

    def wrapped_call(self, call: JsonObject) -> JsonObject:
        """Return a call with its name and arguments in `function`, even if they are bare."""
        if call.get("function") is not None or call.get("name") is None:
            return call
        bare = {key: call[key] for key in ("name", *_ARGUMENT_KEYS) if call.get(key) is not None}
        rest = {key: item for key, item in call.items() if key not in bare}
        if "arguments" not in bare and "parameters" in bare:
            self.notes["parameters of a call are read as its arguments"] += 1
            bare["arguments"] = bare.pop("parameters")
        return rest | {"function": bare}

    def arguments(self, value: object, at: str) -> str:
        """Return the JSON text of an object; null, "" and "null", which mean no arguments, become
        `{}`."""
        if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
            return "{}"
        if isinstance(value, dict):
            return self.json_of(value, at)
        if not isinstance(value, str):
            self.fail_type(value, "an object, or a string that holds one", at)
        text = value
        try:
            parsed = load_json(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            self.fail(
                f"arguments {shown(text)} are not a JSON object",
                "use an object, or a string that holds one",
                kind="tool call",
                at=at,
            )
        return text

    def json_of(self, value: JsonObject, at: str) -> str:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            self.fail(
                f"{at.rpartition('.')[2]} {shown(value)} cannot be written as JSON ({error})",
                "use texts, finite numbers, true, false, null, lists and objects of these",
                kind="tool call",
                at=at,
            )

    def unparsed_tool_calls(self, value: object, at: str) -> list[UnparsedToolCall]:
        if not isinstance(value, list):
            self.fail_type(value, "a list of objects with raw_text and error", at)
        calls = []
        for i, call in enumerate(value):
            if not isinstance(call, dict):
                self.fail_type(call, "an object with raw_text and error", f"{at}[{i}]")
            self.check_keys(call, ("raw_text", "error"), f"{at}[{i}]")
            texts = [
                self.string(call.get(key), f"{at}[{i}].{key}") for key in ("raw_text", "error")
            ]
            calls.append(UnparsedToolCall(raw_text=texts[0], error=texts[1]))
        return calls

    def tools(self, value: object, at: str = "tools") -> list[ToolSpec]:
        """Return declarations, given as a list or as JSON text of a list."""
        value = self.from_json_text(value, at)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail_type(value, "a list of tool declarations, or JSON text of one", at)
        return [self.tool(tool, f"{at}[{i}]") for i, tool in enumerate(value)]

    def tool(self, value: object, at: str) -> ToolSpec:
        """Return a declaration, given bare or as `{"type": "function", "function": {...}}`."""
        value = self.from_json_text(value, at)
        if isinstance(value, dict) and value.get("function") is not None:
            at = f"{at}.function"
            value = self.from_json_text(value["function"], at)
        if not isinstance(value, dict):
            self.fail_type(value, "an object with name, description and parameters", at)
        parameters = self.from_json_text(value.get("parameters"), f"{at}.parameters")
        if parameters is not None and not isinstance(parameters, dict):
            self.fail_type(parameters, "a JSON schema object", f"{at}.parameters")
        if parameters is not None:
            self.json_of(parameters, f"{at}.parameters")
        description = value.get("description")
        return ToolSpec(
            name=self.string(value.get("name"), f"{at}.name"),
            description=""
            if description is None
            else self.string(description, f"{at}.description"),
            parameters=parameters or {"type": "object", "properties": {}},
        )
