"""An agent as a program in a sandbox: its variables, input, limits and output."""

import sys

import pytest

from tinker_cookbook.capture import Address, run_in_sandbox
from tinker_cookbook.exceptions import TrainingError
from tinker_cookbook.sandbox.local_sandbox import LocalSandbox

ADDRESS = Address("http://127.0.0.1:9/rollout/x/v1", "a 'key'", "policy")
AGENT = """
import os, sys
print(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], os.environ["WORD"])
print(sys.stdin.read(), sorted(name for name in os.environ if name.startswith("TINKER_")))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
async def sandbox():
    sandbox = LocalSandbox(cut_network=False)
    await sandbox.write_file("agent.py", AGENT)
    yield sandbox
    await sandbox.cleanup()


@pytest.mark.anyio
async def test_a_program_in_a_sandbox_gets_its_address_and_input(sandbox, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-secret")
    outcome = await run_in_sandbox(
        sandbox,
        [sys.executable, "agent.py", "3"],
        ADDRESS,
        stdin="What's 1 + 1?",
        environment={"WORD": "two words"},
    )
    shown = "http://127.0.0.1:9/rollout/x/v1 a 'key' two words\nWhat's 1 + 1? []\n"
    assert (outcome.return_code, outcome.stdout, outcome.timed_out) == (3, shown, False)
    with pytest.raises(TrainingError, match="exit status 3"):
        outcome.raise_for_status()


@pytest.mark.anyio
async def test_a_program_in_a_sandbox_ends_at_its_limit(sandbox):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    outcome = await run_in_sandbox(sandbox, command, ADDRESS, timeout_seconds=1)
    assert outcome.timed_out
