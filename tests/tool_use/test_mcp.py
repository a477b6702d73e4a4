"""Tools of a real MCP server, which the official package runs over standard input and output."""

# pyright: reportCallIssue=false

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.renderers.families import FAMILIES
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.problems import Problem, episode_data
from tinker_cookbook.tool_use import ToolInput
from tinker_cookbook.tool_use.mcp import McpServer, build_mcp_tool_env

pytest.importorskip("mcp")

SERVER = '''
import asyncio, os, sys
from pathlib import Path
try:
    from mcp.server import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server

Path(sys.argv[1]).joinpath(f"pid-{os.getpid()}").touch()
server = Server("toy")

@server.tool()
def double(number: int) -> str:
    """Double a number."""
    return str(2 * number)

@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no such thing")

@server.tool()
async def wait() -> str:
    """Take long."""
    await asyncio.sleep(600)
    return "late"

@server.tool()
def leave() -> str:
    """End the server."""
    os._exit(3)

server.run("stdio")
'''
RENDERER = get_renderer("qwen3_instruct", FAMILIES["qwen3_instruct"].tokenizer)
TASK: list[Message] = [{"role": "user", "content": "double 7"}]
CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 7}}\n</tool_call>'


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    return [sys.executable, str(program), str(tmp_path)]


async def graded(history: list[Message]) -> tuple[float, dict[str, float]]:
    return float(any(message["content"] == "14" for message in history)), {}


def running(folder: Path) -> list[int]:
    """Return the servers that still run."""
    found = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    return [pid for pid in found if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def call(server: McpServer, name: str, **arguments: object) -> dict[str, str]:
    tools = {tool.name: tool for tool in server.tools}
    result = await tools[name].run(ToolInput(dict(arguments), "call_1"))
    [message] = result.messages
    assert (message["role"], message.get("tool_call_id")) == ("tool", "call_1")
    content = str(message["content"])
    return json.loads(content) if content.startswith("{") else {"text": content}


@pytest.mark.anyio
async def test_errors_timeouts_and_a_dead_server_are_messages(command, tmp_path):
    async with McpServer(command) as server:
        assert [tool.name for tool in server.tools] == ["double", "fail", "wait", "leave"]
        spec = server.tools[0].to_spec()
        assert spec["description"] == "Double a number."
        assert spec["parameters"]["required"] == ["number"]
        assert "fail" in (await call(server, "fail"))["error"]
        server._call_timeout_seconds = 0.2
        assert (await call(server, "wait"))["error_type"] == "timeout"
        # The server is still usable after the timeout, and by several calls at once.
        server._call_timeout_seconds = 60.0
        doubled = await asyncio.gather(*(call(server, "double", number=n) for n in range(5)))
        assert [done["text"] for done in doubled] == ["0", "2", "4", "6", "8"]
        assert (await call(server, "double", number="x"))["error_type"] == "execution_error"
        assert len(running(tmp_path)) == 1
        assert (await call(server, "leave"))["error_type"] == "execution_error"
        assert (await call(server, "double", number=1))["error_type"] == "execution_error"
    assert running(tmp_path) == []


@pytest.mark.anyio
async def test_servers_end_with_the_environments_of_their_group(command, tmp_path):
    async def environment(problem, renderer):
        return await build_mcp_tool_env(renderer, [McpServer(command)], TASK, graded)

    data = episode_data(lambda split: [Problem("double 7")], environment)(
        model_name="m", renderer_name="qwen3_instruct", groups_per_batch=1, group_size=2
    )
    group = data.make_group(Problem("double 7"), RENDERER, 2)
    envs: Sequence = await group.make_envs()
    assert len(running(tmp_path)) == 2
    prompt, _ = await envs[0].initial_observation()
    assert '"name": "double"' in RENDERER.tokenizer.decode(prompt.to_ints())
    end = int(RENDERER.get_stop_sequences()[0])
    rewards = []
    for text in (CALL, "It is 14."):
        tokens = RENDERER.tokenizer.encode(text, add_special_tokens=False)
        result = await envs[0].step([*tokens, end], extra={"stop_reason": "stop"})
        rewards.append((result.reward, result.episode_done))
    assert rewards == [(0.0, False), (1.0, True)]
    # Another task than the one that started the servers ends them, as in a train loop.
    await asyncio.create_task(group.cleanup())
    assert running(tmp_path) == []


@pytest.mark.anyio
async def test_a_program_that_is_not_a_server_is_named():
    with pytest.raises(TrainingError, match=r"command=\['/no/such/program'\] does not run"):
        await McpServer(["/no/such/program"]).start()
    silent = McpServer([sys.executable, "-c", "print('hello')"], start_timeout_seconds=30)
    with pytest.raises(TrainingError, match="does not run as an MCP server"):
        await silent.start()
    with pytest.raises(ConfigurationError, match="command="):
        McpServer([])
