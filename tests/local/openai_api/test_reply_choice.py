"""Completions in their place: SentencePiece's spaces, marks as tokens, stops within marks."""

# pyright: reportReturnType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.assets import tokenizer_folder
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.reply import Piece, ReplyReader
from tinker_cookbook.local.openai_api.reply_choice import Choice
from tinker_cookbook.local.openai_api.sampling import Drawn

WORDS = ["▁The", "▁sky", "▁is", "▁blue", "▁today", ".", "▁", "\n"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> TextCodec:
    """A vocabulary as of Llama 2: words begin with their space, which a text's first one lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder)


def ids(codec: TextCodec, *names: str) -> list[int]:
    return [codec.tokenizer.token_to_id(name) for name in names]


def read(choice: Choice, tokens: list[int]) -> list[Piece]:
    pieces = [piece for token in tokens for piece in choice.push(Drawn(0, token, -1.0))]
    return pieces + choice.finish()


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        (["▁The", "▁sky", "▁is"], ["▁blue", "▁today", "."], " blue today."),
        (["▁The", "▁sky", "\n"], ["▁", "▁blue"], "  blue"),
        (["▁The", "▁sky"], ["."], "."),
        (["<s>"], ["▁The", "▁sky"], "The sky"),
        ([], ["▁The", "▁sky"], "The sky"),
        (["▁The", "<0xE4>", "<0xBD>"], ["<0xA0>", "▁is"], "你 is"),
    ],
)
def test_a_completion_continues_its_prompt(
    sentencepiece: TextCodec, prompt: list[str], completion: list[str], text: str
) -> None:
    after = sentencepiece.text_before(ids(sentencepiece, *prompt))
    choice = Choice(sentencepiece, end_ids=frozenset(), stops=(), after=after)
    pieces = read(choice, ids(sentencepiece, *completion))
    assert "".join(piece.text for piece in pieces) == text
    shown: Any = choice.completion_logprobs(choice.entries)
    if "你" not in text:
        assert "".join(shown["tokens"]).strip() == text.strip()


def test_streamed_logprobs_include_a_last_token_without_text(sentencepiece: TextCodec) -> None:
    choice = Choice(sentencepiece, end_ids=frozenset(), stops=())
    taken = []
    for token in ids(sentencepiece, "▁The", "<0xE4>"):  # the first byte of three
        choice.push(Drawn(0, token, -1.0))
        taken += choice.take_entries()
    choice.finish()
    taken += choice.take_entries()
    assert [entry.drawn.token for entry in taken] == choice.token_ids


def test_chats_begin_without_a_space(sentencepiece: TextCodec) -> None:
    choice = Choice(sentencepiece, end_ids=frozenset(), stops=())
    assert read(choice, ids(sentencepiece, "▁The", "▁sky"))[0].text == "The"


TOOL = {"function": {"name": "f", "parameters": {}}}


def chat(codec: TextCodec, *, stops: tuple[str, ...] = ()) -> Choice:
    reader = ReplyReader(
        starts_in_thinking=False, tools=[TOOL], token_marks=codec.mark_texts.values()
    )
    return Choice(codec, end_ids=frozenset(), stops=stops, reader=reader)


def said(pieces: list[Piece]) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for piece in pieces:
        text = piece.text or piece.call["function"]["arguments"]
        if joined and joined[-1][0] == piece.kind == "content":
            text = joined.pop()[1] + text
        joined.append((piece.kind, text))
    return joined


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_marks_are_tokens_where_the_vocabulary_has_them(family: str) -> None:
    codec = TextCodec(Path(tokenizer_folder(family)))
    call = '<tool_call>\n{"name": "f", "arguments": {"cmd": "echo </tool_call>"}}\n</tool_call>'
    tokens = codec.encode_text(f"Well.\n{call}")
    assert said(read(chat(codec), tokens)) == [
        ("content", "Well."),
        ("tool_call", '{"cmd": "echo </tool_call>"}'),
    ]
    cut = read(chat(codec, stops=("_call>", "never")), tokens)
    assert said(cut) == [("content", "Well.\n<tool")]
    before = read(chat(codec, stops=("\n<tool_call>",)), tokens)
    assert said(before) == [("content", "Well.")]


ANALYSIS = "<|channel|>analysis<|message|>add<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("markup", "want"),
    [
        ("<|channel|>final<|message|>4", [("content", "4")]),
        (f"{ANALYSIS}<|channel|>final<|message|>4", [("reasoning", "add"), ("content", "4")]),
        (
            f'{ANALYSIS} to=functions.f<|channel|>commentary json<|message|>{{"a": 1}}',
            [("reasoning", "add"), ("tool_call", '{"a": 1}')],
        ),
        (
            " to=functions.g<|channel|>commentary json<|message|>{}",
            [("content", " to=functions.g<|channel|>commentary json<|message|>{}")],
        ),
    ],
)
def test_gpt_oss_replies_are_read_message_by_message(markup: str, want: list) -> None:
    codec = TextCodec(Path(tokenizer_folder("gpt_oss")))
    assert said(read(chat(codec), codec.encode_text(markup))) == want


def test_letters_are_no_mark_where_the_vocabulary_has_a_token() -> None:
    codec = TextCodec(Path(tokenizer_folder("qwen3")))
    typed = [token for part in ("<tool", "_call>") for token in codec.encode_text(part)]
    assert said(read(chat(codec), typed)) == [("content", "<tool_call>")]
