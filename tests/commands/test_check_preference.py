"""`tinker-cookbook check` of pairs and rated replies: figures, problems by line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.cli import main

USER = {"role": "user", "content": "Q"}
LONG = "word " * 60


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def comparison(label: str, first: str = "a", second: str = "b") -> dict[str, Any]:
    sides = {"completion_A": [reply(first)], "completion_B": [reply(second)]}
    return {"comparison": {"prompt_conversation": [USER], **sides}, "label": label}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def check(path: Path, *options: str) -> int:
    command = ["check", str(path), "--model", str(tiny_model()), "--renderer", "chatml"]
    return main([*command, *options])


GOOD: list[dict[str, Any]] = [
    {"prompt": "Q", "chosen": "better", "rejected": "bad and long"},
    {"prompt": [USER], "chosen": [reply("better")], "rejected": [reply("bad and long")]},
    {"chosen": [USER, reply("yes")], "rejected": [USER, reply("no")]},
    comparison("B"),
    comparison("Tie"),
]

BAD: list[tuple[dict[str, Any] | str, str]] = [
    ({"prompt": "Q", "chosen": "same", "rejected": "same"}, "chosen and rejected are equal"),
    (
        {"chosen": [USER, reply("a")], "rejected": [{**USER, "content": "R"}, reply("b")]},
        "the prompts of chosen and rejected differ",
    ),
    ({"prompt": "Q", "chosen": "good"}, "the row has 'prompt', 'chosen'; use"),
    ({"chosen": "good", "rejected": "bad"}, "chosen is text and the row has no prompt"),
    ({"prompt": "Q", "chosen": 3, "rejected": "bad"}, "chosen is a number (3)"),
    ({"chosen": [reply("a"), USER], "rejected": [reply("b"), USER]}, "chosen ends with a message"),
    ({"comparison": {"prompt_conversation": [USER]}, "label": "A"}, "completion_A is missing"),
    (comparison("C"), "label='C' must be A, B or Tie"),
    (
        {"prompt": "Q", "chosen": [{"role": "bot", "content": "x"}], "rejected": "b"},
        "role 'bot' is unknown",
    ),
    ('{"prompt": "Q", "chosen": ', "the row is not JSON"),
    ({"prompt": LONG, "chosen": "a", "rejected": "b"}, "no token of the chosen completion is"),
    (
        {"prompt": "Q", "chosen": LONG + "a", "rejected": LONG + "b"},
        "both completions are the same tokens within max_length=40",
    ),
    ({"prompt": "Q", "chosen": "", "rejected": "b"}, "chosen"),
]


def test_a_sound_file_of_pairs_passes_with_its_figures(tmp_path: Path, capsys):
    path = write(tmp_path / "pairs.jsonl", *GOOD)
    assert check(path) == 0
    out = capsys.readouterr().out
    assert "usable      4 pairs" in out
    assert "ties        1 rows, left out (line 5)" in out
    assert "duplicates  1 rows repeat an earlier one" in out
    assert "longer one in 0% of the pairs" in out or "longer one in 25% of the pairs" in out
    assert check(path, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["usable_rows"], figures["ties"]["rows"], figures["problems"]) == (4, 1, [])
    assert figures["chosen"]["completions"] == 4
    assert 0 < figures["chosen"]["trained_tokens"]["total"] < figures["chosen"]["tokens"]["total"]


def test_every_bad_row_of_pairs_is_named_by_file_line_and_field(tmp_path: Path, capsys):
    path = write(tmp_path / "pairs.jsonl", GOOD[0], *(row for row, _ in BAD))
    assert check(path, "--max-length", "40") == 1
    out = capsys.readouterr().out
    assert f"unusable    {len(BAD)} rows" in out
    lines = out.partition("problems\n")[2].splitlines()
    assert len(lines) == len(BAD)
    for number, (line, (_, words)) in enumerate(zip(lines, BAD, strict=True), 2):
        assert f"pairs.jsonl:{number}: " in line
        assert words in line


def test_cut_pairs_are_counted(tmp_path: Path, capsys):
    long = {"prompt": "Q", "chosen": "a " + LONG, "rejected": "b " + LONG}
    path = write(tmp_path / "pairs.jsonl", GOOD[0], long)
    assert check(path, "--max-length", "40") == 0
    assert "cut         1 pairs at max_length=40 (line 2)" in capsys.readouterr().out


def test_rated_replies_are_recognized_and_checked(tmp_path: Path, capsys):
    rows: list[dict[str, Any]] = [
        {"prompt": "Q", "completion": "good", "label": True},
        {"messages": [USER, reply("bad")], "label": False},
    ]
    path = write(tmp_path / "replies.jsonl", *rows)
    assert check(path) == 0
    out = capsys.readouterr().out
    assert "replies with a label true or false" in out
    assert "usable      2 replies" in out
    bad = [{"prompt": "Q", "completion": "x", "label": "up"}, {"prompt": "Q", "label": True}]
    assert check(write(path, *rows, *bad)) == 1
    out = capsys.readouterr().out
    assert "replies.jsonl:3: label='up' must be true (thumb up) or false (down)" in out
    assert "replies.jsonl:4: the row has 'prompt', 'label'; use" in out


@pytest.mark.parametrize(
    "row", [{"prompt": "Q", "completion": "a"}, {"messages": [USER, reply("a")]}]
)
def test_conversations_are_not_taken_for_preference_data(tmp_path: Path, capsys, row: dict):
    assert check(write(tmp_path / "c.jsonl", row)) == 0
    assert "pairs" not in capsys.readouterr().out
