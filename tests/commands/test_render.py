"""`tinker-cookbook render` and the pictures behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.assets import tokenizer_folder
from tinker_cookbook.cli import main
from tinker_cookbook.renderers import get_renderer, register_renderer, unregister_renderer
from tinker_cookbook.renderers.battery.differences import DifferenceKind, differences
from tinker_cookbook.tokenizer_utils import get_tokenizer

TALK = [
    {"role": "user", "content": "Hi <b>&\u202e"},
    {"role": "assistant", "content": "Hello 𓀀"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good\nbye"},
]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": TALK[2:]}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def render(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["render", *words]) == 0
    return capsys.readouterr().out


def test_trained_text_is_marked_without_colours(chat: Path, capsys) -> None:
    out = render(capsys, str(chat), "--index", "0")
    assert "renderer smollm2, trains all_assistant_messages" in out
    assert "<|im_start|>assistant\n«Hello 𓀀<|im_end|>»\n" in out
    assert "«Good\nbye<|im_end|>»" in out
    assert "\x1b" not in out
    assert "\u202e" not in out  # would turn the terminal's text around
    assert "chat.jsonl:1: " in out


def test_limit_and_mode(chat: Path, capsys) -> None:
    out = render(capsys, str(chat), "--limit", "2", "--train-on-what", "all_messages")
    assert out.count("--- ") == 2
    assert "«Bye<|im_end|>»" in out


def test_every_example_of_a_rewriting_format_is_shown(chat: Path, capsys) -> None:
    words = ["--model", str(tokenizer_folder("qwen3")), "--renderer", "qwen3", "--index", "0"]
    out = render(capsys, str(chat), *words)
    assert "chat.jsonl:1, example 1 of 2" in out
    assert "«<think>\n\n</think>\n\nGood\nbye<|im_end|>»" in out


def test_table_of_tokens(chat: Path, capsys) -> None:
    lines = render(capsys, str(chat), "--index", "1", "--tokens").splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == [str(number) for number in range(len(rows))]
    stop = next(row for row in reversed(rows) if row[3] == "stop")
    assert stop[1:] == ["2", "1", "stop", "1", "assistant", "'<|im_end|>'"]
    assert any("\\xf0" in row[-1] for row in rows)  # a part of a character


def test_page(chat: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "out.html"
    assert "wrote 3 examples" in render(capsys, str(chat), "--html", str(page))
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "<b>" not in text.split("<body>")[1]
    assert "&lt;" in text.split("</h2>")[1]
    assert 'class="t' in text
    assert "http" not in text  # nothing is fetched
    assert "weight 1, stop, message 1 assistant" in text


def test_colours_on_a_terminal(chat: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = render(capsys, str(chat), "--index", "1")
    assert "\x1b[32m" in out
    assert "\x1b" not in render(capsys, str(chat), "--index", "1", "--no-color")


def test_differences_from_the_template_are_shown_side_by_side(chat: Path, capsys) -> None:
    assert "3 same tokens" in render(capsys, str(chat), "--against-template")
    assert main(["render", str(chat), "--against-template", "--renderer", "chatml"]) == 1
    out = capsys.readouterr().out
    assert "3 different" in out
    assert "!      1                                            |    9690 'system'" in out
    assert "\x1b" not in out
    typed = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "\nx"}]
    chat.write_text(json.dumps({"messages": typed}), encoding="utf-8")
    assert "1 same text, other token borders" in render(capsys, str(chat), "--against-template")


def test_what_is_meant_is_told_from_what_differs(chat: Path, tmp_path: Path, capsys) -> None:
    """A reply's own border is meant; another text is not; page and exit status say the same."""
    model = str(tokenizer_folder("qwen3_5"))
    words = ["--against-template", "--model", model, "--renderer", "qwen3_5", "--index", "1"]
    out = render(capsys, str(chat), *words)
    assert "1 same text, other token borders, 0 different" in out
    (line,) = (line for line in out.splitlines() if line.startswith("~") and "271" in line)
    assert line.endswith("a reply is encoded apart from its prompt")
    assert "!" not in "".join(line[:1] for line in out.splitlines())
    page = tmp_path / "page.html"
    assert "wrote 1 comparisons" in render(capsys, str(chat), *words, "--html", str(page))
    assert 'class="m" title="a reply is encoded apart from its prompt' in page.read_text("utf-8")
    wrong = [*words[:4], "chatml", *words[5:], "--html", str(page)]
    assert main(["render", str(chat), *wrong]) == 1
    assert "1 different" in capsys.readouterr().out
    body = page.read_text("utf-8").split("<h2>")[1]
    assert '<ins title="another text' in body or '<del title="another text' in body
    assert "<b>" not in body


def test_the_template_is_asked_as_the_renderer_writes(chat: Path, capsys) -> None:
    """Options such as `enable_thinking` are found by trying those that templates have."""
    thinks = [{**TALK[1], "reasoning_content": "well"}]
    rows = [{"messages": [TALK[0], *thinks, TALK[2], *thinks]}]
    chat.write_text(json.dumps(rows[0]), encoding="utf-8")
    model = str(tokenizer_folder("qwen3_6"))
    words = ["--against-template", "--model", model, "--renderer", "qwen3_6_preserve_thinking"]
    out = render(capsys, str(chat), *words)
    assert "with preserve_thinking=True" in out
    assert "0 different" in out


def test_rows_that_are_refused_are_named_and_the_others_compared(
    chat: Path, tmp_path: Path, capsys
) -> None:
    """Qwen3.5's template takes a system message at the start only, and so does the renderer."""
    late = [*TALK[:2], {"role": "system", "content": "x"}, *TALK[2:]]
    rows = [{"messages": late}, {"messages": TALK[:2]}]
    chat.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--against-template", "--model", str(tokenizer_folder("qwen3_5"))]
    page = tmp_path / "page.html"
    for name, who in (("qwen3_5", "renderer"), ("qwen3", "template")):
        found = ["render", str(chat), *words, "--renderer", name]
        assert main(found) == 1
        out = capsys.readouterr().out
        assert f"chat.jsonl:1: the {who} refuses it: " in out
        assert out.rstrip().split("\n\n")[-1].split("\n")[0].endswith(", 1 refused")
        assert main([*found, "--html", str(page)]) == 1
        assert f"chat.jsonl:1: the {who} refuses it: " in page.read_text("utf-8")
        capsys.readouterr()
        assert main([*found, "--index", "0"]) == 2
        assert f"the {who} refuses it: " in capsys.readouterr().err


def test_a_border_that_nothing_explains_is_a_difference() -> None:
    renderer = get_renderer("smollm2", get_tokenizer(str(tokenizer_folder("smollm2"))))
    rendering = renderer.render([{"role": "user", "content": "Hello there"}])
    encoder, tokens = renderer.encoder, rendering.tokens()
    place = tokens.index(encoder.encode_batch(["Hello"])[0][0])
    apart = [encoder.encode_batch([letter])[0][0] for letter in "Hello"]
    found = differences(rendering, [*tokens[:place], *apart, *tokens[place + 1 :]], encoder)
    assert [(one.kind, one.is_meant) for one in found] == [(DifferenceKind.BORDER, False)]
    assert differences(rendering, tokens, encoder) == []


def test_verify_says_which_renderer_fits(capsys) -> None:
    folder = str(tokenizer_folder("qwen3"))
    out = render(capsys, "--verify", folder, "--renderer", "qwen3")
    lines = out.splitlines()
    assert lines[2] == "use qwen3"  # the verdict comes first
    row = next(line for line in lines if line.startswith("qwen3 "))
    assert len(row.split()) == 8
    assert main(["render", "--verify", folder, "--renderer", "chatml"]) == 1
    out = capsys.readouterr().out
    assert "no renderer fits" in out
    assert "chatml: differs: after" in out


def test_the_columns_of_verify_stand_under_their_names_however_long_these_are(capsys) -> None:
    name = "a_renderer_whose_name_is_longer_than_any_that_is_built_in"
    register_renderer(name, lambda tokenizer, _: get_renderer("smollm2", tokenizer))
    try:
        out = render(capsys, "--verify", str(tokenizer_folder("smollm2")), "--renderer", name)
    finally:
        unregister_renderer(name)
    lines = out.splitlines()
    header, row = (next(x for x in lines if x.startswith(w)) for w in ("renderer ", name))
    assert len(header) == len(row)
    for column in ("tokens", "refused", "injection"):
        end = header.index(column) + len(column)
        assert row[end - 1].isdigit()
        assert row[end : end + 1].strip() == ""


def test_verify_names_the_nearest_where_none_fits(capsys) -> None:
    """GLM's replies end with the token that opens the next message, which its template leaves."""
    folder = str(tokenizer_folder("glm4_5"))
    assert main(["render", "--verify", folder, "--renderer", "glm4_5"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[2].endswith("nearest: glm4_5")  # the verdict comes first
    assert "the renderer writes '<|user|>', the template ''" in out
    assert main(["render", "--verify", folder, "--renderer", "role_colon"]) == 1
    assert "nearest" not in capsys.readouterr().out
    # a template that asks for the day gets the renderer's
    name = "gpt_oss_medium_reasoning"
    assert main(["render", "--verify", str(tokenizer_folder("gpt_oss")), "--renderer", name]) == 1
    assert f"nearest: {name}\n" in capsys.readouterr().out


def test_verify_refuses_a_renderer_that_cannot_be_made(tmp_path: Path, capsys) -> None:
    folder = str(tokenizer_folder("smollm2"))
    assert main(["render", "--verify", folder, "--renderer", "qwen33"]) == 2
    assert "Did you mean 'qwen3'?" in capsys.readouterr().err
    assert main(["render", "--verify", folder, "--renderer", "qwen3"]) == 2
    assert "has no token '<think>'" in capsys.readouterr().err
    assert main(["render", __file__, "--model", str(tmp_path)]) == 2
    assert "is a folder without a chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify", "x"], "--verify=x is given together with FILE"),
        (["--index", "9"], "--index=9 is not in"),
        (["--limit", "0"], "--limit=0 is too small"),
        (["--renderer", "qwen"], "renderer name='qwen' is unknown"),
        (["--verify", "x", "--html", "y"], "Leave out the others"),
        (["--model", "/nowhere/model"], "is not a folder"),
        (["--model", "nobody/none"], "model_name='nobody/none' is not a known model"),
        (["--html", "/nowhere/x.html"], "cannot be written"),
    ],
)
def test_mistakes(chat: Path, capsys, words: list[str], message: str) -> None:
    assert main(["render", str(chat), *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_every_shape_are_shown(tmp_path: Path, capsys) -> None:
    path = tmp_path / "chats.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "fox"}]
    path.write_text(json.dumps([{"conversations": turns}, {"text": "fox"}]))
    assert "chats.json:1: " in render(capsys, str(path), "--limit", "1")
    assert main(["render", str(path), "--index", "1"]) == 2
    assert "chats.json:1: plain text has no chat format" in capsys.readouterr().err


def test_weights_of_messages_are_shown(tmp_path: Path, capsys) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]}))
    out = render(capsys, str(path))
    assert "«Hello" not in out
    assert "«Good\nbye<|im_end|>»" in out
