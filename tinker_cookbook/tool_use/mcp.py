"""Tools of MCP servers (Model Context Protocol): `pip install 'tinker-cookbook[mcp]'`.

    servers = [McpServer([sys.executable, "my_server.py"])]
    env = await build_mcp_tool_env(renderer, servers, messages, reward_fn)

A server is a program that lists and runs tools over its standard input and output. Errors and
timeouts of a call are messages for the model. The program ends with its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.renderers.types import Message, ToolSpec
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.tool_use.agent_tool_message_env import (
    AgentToolMessageEnv,
    RewardFn,
    build_agent_tool_env,
)
from tinker_cookbook.tool_use.tools import error_tool_result, simple_tool_result
from tinker_cookbook.tool_use.types import Tool, ToolInput, ToolResult

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["McpServer", "McpTool", "build_mcp_tool_env"]

_Call = Callable[[str, dict[str, Any]], Awaitable[Mapping[str, Any]]]


class McpTool:
    """One tool of a server."""

    def __init__(self, declaration: Mapping[str, Any], call: _Call) -> None:
        """Read the declaration, a JSON object as the protocol sends it."""
        self.name: str = declaration["name"]
        self.description: str = declaration.get("description") or ""
        self.parameters_schema: dict[str, Any] = dict(declaration["inputSchema"])
        self._call = call

    def to_spec(self) -> ToolSpec:
        """Return name, description and schema."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters_schema,
        }

    async def run(self, input: ToolInput) -> ToolResult:
        """Call the tool. Its errors, and those of its server, are results."""
        call_id = input.call_id or ""
        try:
            result = await self._call(self.name, input.arguments)
        except TimeoutError as error:
            return error_tool_result(
                str(error), call_id=call_id, name=self.name, error_type="timeout"
            )
        except Exception as error:  # whatever a server does goes back to the model
            return error_tool_result(
                f"{type(error).__name__}: {error}", call_id=call_id, name=self.name
            )
        text = _result_text(result)
        if result.get("isError"):
            return error_tool_result(text, call_id=call_id, name=self.name)
        return simple_tool_result(text, call_id=call_id, name=self.name)


class McpServer:
    """A server program and its tools. `start` and `cleanup` may run in different tasks."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_timeout_seconds: float = 60.0,
        call_timeout_seconds: float = 60.0,
    ) -> None:
        """Set the program; `start` runs it.

        Args:
            command: The program and its arguments.
            env: Variables added to the few that a server inherits, such as PATH and HOME.
            cwd: The program's working directory.
            start_timeout_seconds: Maximum seconds until the server has listed its tools.
            call_timeout_seconds: Maximum seconds of one call.

        Raises:
            ConfigurationError: the command is empty.
        """
        if not command:
            raise ConfigurationError("command=[] is empty; give the server's program.")
        self.command = list(command)
        self.tools: list[McpTool] = []
        """The tools of a started server."""
        self._env = dict(env or {})
        self._cwd = cwd
        self._start_timeout_seconds = start_timeout_seconds
        self._call_timeout_seconds = call_timeout_seconds
        self._session: Any = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> McpServer:
        """Run the program and ask for its tools.

        Raises:
            ConfigurationError: the package `mcp` is not installed.
            TrainingError: the program does not start or does not answer as an MCP server.
        """
        if self._task is not None:
            return self
        _require_mcp()
        self._stop.clear()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The connection must be closed by the task that opened it, so it has its own task.
        self._task = asyncio.create_task(self._serve(ready))
        try:
            async with asyncio.timeout(self._start_timeout_seconds):
                await ready
        except Exception as error:
            await self.cleanup()
            problem = f"no answer in {self._start_timeout_seconds:g} seconds"
            if not isinstance(error, TimeoutError):
                problem = f"{type(error).__name__}: {error}"
            raise TrainingError(
                f"command={self.command} does not run as an MCP server ({problem}); run it in a "
                "terminal to see why."
            ) from error
        except asyncio.CancelledError:
            await self.cleanup()
            raise
        return self

    async def cleanup(self) -> None:
        """End the program."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stop.set()
        if self._session is None:
            task.cancel()
        # A server that broke its connection has nothing left to tell.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.shield(task)

    async def __aenter__(self) -> McpServer:
        return await self.start()

    async def __aexit__(self, *error: object) -> None:
        await self.cleanup()

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        """Hold the connection open until `cleanup`."""
        from mcp import (  # pyright: ignore[reportMissingImports]
            ClientSession,
            StdioServerParameters,
        )
        from mcp.client.stdio import stdio_client  # pyright: ignore[reportMissingImports]

        program, *arguments = self.command
        parameters = StdioServerParameters(
            command=program, args=arguments, env=self._env, cwd=self._cwd
        )
        try:
            async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
                await session.initialize()
                self.tools = await self._list_tools(session)
                self._session = session
                ready.set_result(None)
                await self._stop.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(_first_error(error))
        finally:
            self._session = None

    async def _list_tools(self, session: Any) -> list[McpTool]:
        from mcp.types import PaginatedRequestParams  # pyright: ignore[reportMissingImports]

        found: list[McpTool] = []
        page = None
        while True:
            listed = await session.list_tools(
                params=None if page is None else PaginatedRequestParams(cursor=page)
            )
            # Field names differ between versions of the package; the protocol's names do not.
            record = listed.model_dump(by_alias=True, mode="json")
            found += [McpTool(declaration, self._call) for declaration in record["tools"]]
            page = record.get("nextCursor")
            if not page:
                return found

    async def _call(self, name: str, arguments: dict[str, Any]) -> Mapping[str, Any]:
        if self._session is None:
            raise ConnectionError("the tool's server is not running")
        seconds = self._call_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                result = await self._session.call_tool(name, arguments)
        except TimeoutError as error:
            raise TimeoutError(f"the tool did not answer in {seconds:g} seconds") from error
        return result.model_dump(by_alias=True, mode="json", exclude_none=True)


async def build_mcp_tool_env(
    renderer: Renderer,
    servers: Sequence[McpServer],
    initial_messages: list[Message],
    reward_fn: RewardFn,
    *,
    tools: Sequence[Tool] = (),
    **settings: Any,
) -> EnvFromMessageEnv:
    """Start servers and return an environment in which the model may call their tools.

    The environment's `cleanup` ends the servers. The group builders of `rl.problems` call it; a
    group builder that you write must call it in its own `cleanup`.

    Args:
        renderer: The chat format, which must have a notation for tools.
        servers: Servers that only this environment uses.
        initial_messages: The task.
        reward_fn: Grades the finished conversation.
        tools: Further tools.
        settings: Other arguments of `build_agent_tool_env`.

    Raises:
        ConfigurationError: the package `mcp` is not installed, or two tools have the same name.
        TrainingError: a server does not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        listed: list[Tool] = [*tools, *(tool for server in servers for tool in server.tools)]
        env = build_agent_tool_env(renderer, listed, initial_messages, reward_fn, **settings)
        assert isinstance(env.message_env, AgentToolMessageEnv), "build_agent_tool_env makes one"
        env.message_env.on_cleanup = stack.pop_all().aclose
    return env


def _require_mcp() -> None:
    try:
        import mcp  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise ConfigurationError(
            "McpServer needs the package mcp; run pip install 'tinker-cookbook[mcp]'."
        ) from error


def _first_error(error: BaseException) -> BaseException:
    """Return the first error in a group, because a group's own message does not name it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _result_text(result: Mapping[str, Any]) -> str:
    """Return the content of a result as text; images and sound are only named."""
    parts = [_block_text(block) for block in result.get("content") or ()]
    structured = result.get("structuredContent")
    if not parts and structured is not None:
        return json.dumps(structured, ensure_ascii=False)
    return "\n".join(parts)


def _block_text(block: Mapping[str, Any]) -> str:
    if block["type"] == "text":
        return block["text"]
    resource = block.get("resource") or block
    if isinstance(resource.get("text"), str):
        return resource["text"]
    return f"[{block['type']}: {resource.get('uri') or resource.get('mimeType') or 'unknown'}]"
