"""`tinker-cookbook check`: figures, problems by line, exit status."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.cli import main
from tinker_cookbook.supervised.shapes import SHAPES
from tinker_cookbook.tokenizer_utils import get_tokenizer

SHORT, LONG = "fox", "the quick brown fox " * 30


def conversation(*texts: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def check(path: Path, *options: str) -> list[str]:
    return ["check", str(path), "--model", str(tiny_model()), "--renderer", "chatml", *options]


def figures_of(capsys, path: Path, *options: str) -> dict:
    main(check(path, "--json", *options))
    return json.loads(capsys.readouterr().out)


def count_tokens(text: str) -> int:
    return len(get_tokenizer(str(tiny_model())).encode(text, add_special_tokens=False))


def test_a_sound_file_passes_with_its_figures(tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", conversation("a", SHORT), "", conversation("a", LONG))
    assert main(check(path)) == 0
    text = capsys.readouterr().out
    assert "chat.jsonl: 2 rows, 1 blank lines" in text
    assert "unusable    0 rows" in text
    figures = figures_of(capsys, path)
    ends = [count_tokens(reply) + 1 for reply in (SHORT, LONG)]
    whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    totals = [count_tokens(whole.format(reply)) for reply in (SHORT, LONG)]
    percentiles = {"min": ends[0], "p50": ends[0], "p90": ends[1], "p99": ends[1], "max": ends[1]}
    assert figures["trained_tokens"] == {"total": sum(ends)} | percentiles
    assert (figures["tokens"]["total"], figures["tokens"]["max"]) == (sum(totals), totals[1])
    assert figures["usable_rows"] == figures["rows"] == 2


def test_every_bad_line_is_listed_by_reason_and_the_status_is_1(tmp_path, capsys):
    bad = [
        '{"messages": [{"role": "bot", "content": "x"}]}',
        "not json",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "x"}]}',
    ]
    path = write(tmp_path / "chat.jsonl", conversation("a", SHORT), *bad)
    assert main(check(path)) == 1
    lines = capsys.readouterr().out.splitlines()
    problems = lines[lines.index("problems") + 1 :]
    assert [line.partition("chat.jsonl:")[2].partition(":")[0] for line in problems] == list("2345")
    assert "role 'bot' is unknown; use one of system, user, assistant, tool" in problems[0]
    assert "no assistant turn" in problems[3]
    figures = figures_of(capsys, path)
    assert (figures["usable_rows"], figures["unusable_rows"]) == (1, 4)
    assert figures["unusable_by_reason"] == {
        "unknown role": 1, "not JSON": 1, "no messages": 1, "nothing to train": 1
    }  # fmt: skip


FILES = {
    "messages.jsonl": conversation("a", SHORT),
    "sharegpt.json": json.dumps(
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": SHORT}]}]
    ),
    "alpaca.csv": f"instruction,input,output\na,,{SHORT}\n",
    "prompt_completion.jsonl": json.dumps({"prompt": "a", "completion": SHORT}),
    "text.txt": f"a {SHORT}\n",
}


@pytest.mark.parametrize("name", list(FILES))
def test_the_shape_and_a_row_as_it_is_trained_are_shown(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    assert main(check(path)) == 0
    text = capsys.readouterr().out
    title = {shape.name: shape.title for shape in SHAPES}[path.stem]
    assert f"shape       {title}\n" in text
    line = 2 if name.endswith(".csv") else 1
    assert f"{name}:{line} as trained («» is trained, the rest is context):\n" in text
    assert f"{SHORT}<|im_end|>»" in text
    figures = figures_of(capsys, path)
    assert (figures["shapes"], figures["unusable_rows"]) == ({path.stem: 1}, 0)


def test_what_is_converted_and_what_is_not_used_is_counted(tmp_path, capsys):
    row = json.loads(conversation("a", SHORT))
    row["messages"].insert(0, {"role": "developer", "content": "b"})
    path = write(tmp_path / "chat.jsonl", json.dumps(row | {"id": 7}), conversation("a", SHORT))
    main(check(path))
    text = capsys.readouterr().out
    assert "converted   1 row: role developer is read as system (line 1)\n" in text
    assert "not used    keys id (1 row)" in text
    figures = figures_of(capsys, path)
    assert list(figures["converted"].values()) == [{"rows": 1, "times": 1, "first_lines": [1]}]
    assert figures["unused_keys"] == {"id": 1}


def test_markup_can_be_refused_by_line(tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", conversation("a", "<think>\nb\n</think>\n\nc"))
    assert main(check(path, "--markup", "refuse")) == 1
    assert "chat.jsonl:1: <think> is in the text of a reply" in capsys.readouterr().out
    assert main(check(path, "--markup", "keep")) == 0
    assert "1 row: <think> or <tool_call> stays text" in capsys.readouterr().out


def test_several_files_are_checked_with_their_own_lines(tmp_path, capsys):
    write(tmp_path / "a.jsonl", conversation("a", SHORT), "oops")
    (tmp_path / "b.csv").write_text(f"prompt,completion\na,{SHORT}\n")
    assert main(check(tmp_path, "--batch-size", "3")) == 1
    text = capsys.readouterr().out
    assert "container   2 files (1 JSONL, 1 CSV)" in text
    assert f"{tmp_path}/a.jsonl:2: not JSON" in text
    assert f"line {tmp_path}/b.csv:2 = line {tmp_path}/a.jsonl:1" in text
    assert "batches     last batch of an epoch: 2 of 3 rows" in text
    main(check(f"{tmp_path}/a.jsonl:1,{tmp_path}/b.csv:1"))  # type: ignore[arg-type]
    assert f"mix         {tmp_path}/a.jsonl: 1 rows an epoch of its 2\n" in capsys.readouterr().out


def test_only_so_many_problems_are_shown(tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", *["nope"] * 30)
    assert main(check(path, "--max-problems", "3")) == 1
    text = capsys.readouterr().out
    assert text.count("not JSON:") == 3
    assert "and 27 more" in text
    assert "30 not JSON" in text


def test_truncation_is_counted_and_lost_rows_are_named(tmp_path, capsys):
    path = write(
        tmp_path / "chat.jsonl",
        conversation("a", SHORT),
        conversation("a", LONG),
        conversation(LONG, SHORT),
    )
    figures = figures_of(capsys, path, "--max-length", "60")["truncated"]
    whole = figures_of(capsys, path)["tokens"]
    assert figures["rows"] == 2
    assert figures["tokens_cut"] == whole["total"] - 2 * 60 - whole["min"]
    assert figures["first_lines_without_trained_tokens"] == [3]
    assert figures["first_lines"] == [2, 3]
    assert main(check(path, "--max-length", "60")) == 0
    assert "1 rows have no trained token left (line 3)" in capsys.readouterr().out


def test_duplicates_are_found_by_content_not_by_bytes(tmp_path, capsys):
    first = conversation("a", SHORT)
    other_order = '{"id": 9, "messages": [{"content": "a", "role": "user"}, '
    other_order += f'{{"content": "{SHORT}", "role": "assistant"}}]}}'
    path = write(tmp_path / "chat.jsonl", first, conversation("b", SHORT), other_order, first)
    assert figures_of(capsys, path)["duplicates"] == {"rows": 2, "first_lines": [[3, 1], [4, 1]]}
    main(check(path))
    assert (
        "2 rows repeat an earlier one (line 3 = line 1, line 4 = line 1)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_figures_do_not_depend_on_the_processes(tmp_path, capsys, workers):
    lines = [conversation("a", f"{SHORT} {i}") for i in range(1500)]
    lines[700] = "oops"
    path = write(tmp_path / "chat.jsonl", *lines)
    figures = figures_of(capsys, path, "--workers", workers)
    assert figures["problems"] == [
        f"{path}:701: not JSON: Expecting value at character 1, near 'oops'; "
        "write one JSON object per line"
    ]
    expected = sum(count_tokens(f"{SHORT} {i}") + 1 for i in range(1500) if i != 700)
    assert figures["trained_tokens"]["total"] == expected


def test_a_line_too_long_to_read_is_a_problem_and_the_rest_is_checked(tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", conversation("a", SHORT))
    with path.open("ab") as stream:
        stream.truncate(100_000_000)
        stream.seek(100_000_000)
        stream.write(b"\n" + conversation("b", SHORT).encode())
    assert main(check(path)) == 1
    text = capsys.readouterr().out
    assert "chat.jsonl:2: the line has 100 MB" in text
    assert "usable      2 rows" in text


def test_gzip_is_read(tmp_path, capsys):
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(conversation("a", SHORT).encode()))
    assert main(check(path)) == 0
    assert "1 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "does not exist"),
        (["chat.jsonl", "--max-length", "1"], "--max-length=1"),
    ],
)
def test_what_cannot_be_checked_at_all_ends_with_status_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chat.jsonl", conversation("a", SHORT))
    assert main(["check", *arguments, "--model", str(tiny_model()), "--renderer", "chatml"]) == 2
    assert message in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    path = write(tmp_path / "chat.jsonl", conversation("a", SHORT))
    settings = {
        "TINKER_COOKBOOK_HOME": str(path / "home"),  # below a file
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    # a new process: this one may have loaded the tokenizer of the default model
    command = [sys.executable, "-m", "tinker_cookbook.cli", "check", str(path)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "cannot be written" in line
    assert "TINKER_COOKBOOK_HOME" in line
