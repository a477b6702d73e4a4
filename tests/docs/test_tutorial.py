"""The tutorial's programs run and give what the page shows."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from tests.assets import load_tokenizer
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.supervised.conversation_file import ConversationFile

PAGE = (Path(__file__).parent.parent.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_data_program_writes_300_rows_that_train_an_answer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[0], "make_reminders.py", "exec"), {})
    lines = (tmp_path / "reminders.jsonl").read_text().splitlines()
    assert len(ConversationFile(tmp_path / "reminders.jsonl")) == len(lines) == 300
    renderer = get_renderer("chatml", load_tokenizer("qwen3"))
    for line in lines[::60]:
        messages = json.loads(line)["messages"]
        assert set(json.loads(messages[1]["content"])) == {"task", "day", "time"}
        _, weights = renderer.build_supervised_example(messages)
        assert weights.sum() > 10


def test_the_client_program_is_valid_python() -> None:
    assert len(PROGRAMS) == 2
    ast.parse(PROGRAMS[1])
