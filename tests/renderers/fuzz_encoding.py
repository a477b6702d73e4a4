"""Compare the fast encoding with the tokenizers themselves on random texts.

    python -m tests.renderers.fuzz_encoding [TEXTS] [TOKENIZER ...]     # 1,000,000 texts; all three

Texts mix all scripts, normal forms, control characters, white space, code, digits, contractions
and pieces of control tokens. Prints the counts and the first difference, if there is one.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

from tests.assets import load_tokenizer
from tinker_cookbook.renderers.encoding.encoder import build_text_encoder

NAMES = ("qwen3", "llama3", "smollm2")
_RANGES = (
    *[(0x20, 0x7E)] * 6,
    *[(0x0, 0x1F), (0x7F, 0xA0), (0xA1, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x590, 0x7BF)],
    *[(0x900, 0xDFF), (0xE00, 0xFFF), (0x1000, 0x13FF), (0x1680, 0x1AFF), (0x1E00, 0x1FFF)],
    *[(0x2000, 0x206F), (0x2070, 0x218F), (0x2190, 0x2BFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF)],
    *[(0xA000, 0xABFF), (0xAC00, 0xD7A3), (0x1100, 0x11FF), (0xE000, 0xF8FF), (0xF900, 0xFFFD)],
    *[(0x10000, 0x10FFF), (0x11000, 0x12FFF), (0x1D100, 0x1D7FF), (0x1F000, 0x1FBFF)],
    *[(0x20000, 0x323AF), (0xE0000, 0xE01EF), (0x0, 0xD7FF), (0x10000, 0x10FFFF)],
)
_PIECES = (
    "the and ing tion Hello world 's 'S 't 're 'VE 'll 'd ' '' I'm don't _ __init__ == != -> 2024 "
    "3.14 1,000,000 0x1F é ß ﬁ Å 日本 한국어 עברית العربية ไทย हिन्दी 🙂 👩‍👩‍👧‍👦 🏳️‍🌈 <|im_end|> "
    '<|eot_id|> <think> </tool_call> <| |> http://x.y/z?a=b &amp; {"a": \\n \\u00e9 ```python '
    "def return self. function() {} ; // # --- *** ... ?! $ € % aaaaaaaa abababab ſ K"
).split()
_SPACES = (
    " ",
    " ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "  ",
    "    ",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
)
_SPACES += ("\x85", "\u2028", "\u200b", "\x0b", "\x1c", "")


def random_text(choose: random.Random) -> str:
    """Return a text of one to some dozen random runs."""
    parts = []
    for _ in range(choose.randint(1, 12)):
        kind = choose.random()
        if kind < 0.35:
            low, high = choose.choice(_RANGES)
            codes = (choose.randint(low, high) for _ in range(choose.randint(1, 8)))
            parts.append("".join(chr(c) for c in codes if not 0xD800 <= c <= 0xDFFF))
        elif kind < 0.7:
            parts.append(choose.choice(_PIECES))
        elif kind < 0.95:
            parts.append(choose.choice(_SPACES))
        else:
            parts.append(str(choose.randint(0, 10 ** choose.randint(1, 12))))
    text = "".join(parts)
    form = choose.random()
    if form < 0.1:
        return unicodedata.normalize("NFD", text)
    if form < 0.15:
        return unicodedata.normalize("NFKC", text)
    return text


def first_difference(fast: Any, slow: Any, texts: list[str]) -> str | None:
    """Return the first text that the encoders encode differently."""
    both = zip(texts, fast.encode_batch(texts), slow.encode_batch(texts), strict=True)
    return next(
        (f"{text!r}: {ours} / {theirs}" for text, ours, theirs in both if ours != theirs), None
    )


def every_character() -> Iterator[str]:
    """Yield each code point next to a letter, a space, a digit, a line break and itself."""
    codes = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    while characters := list(itertools.islice(codes, 30)):
        yield "".join(f"a{c}b {c} 1{c}2{c}{c}\n{c}" for c in characters)


def fuzz(name: str, num_texts: int) -> None:
    """Compare `num_texts` texts and print the counts."""
    tokenizer = load_tokenizer(name)
    fast: Any = build_text_encoder(tokenizer)
    slow: Any = build_text_encoder(tokenizer)
    slow._characters_left = sys.maxsize  # stays with the tokenizer
    assert fast.switch()
    difference = first_difference(fast, slow, list(every_character()))
    choose = random.Random(f"fuzz {name}")
    num_fast = num_characters = done = 0
    started = time.process_time()
    while done < num_texts and difference is None:
        texts = [random_text(choose) for _ in range(min(5000, num_texts - done))]
        difference = first_difference(fast, slow, texts)
        done += len(texts)
        num_characters += sum(map(len, texts))
        num_fast += sum(fast._fast.encode(text) is not None for text in texts)
    seconds = time.process_time() - started
    if difference is not None:
        raise SystemExit(f"{name}: {difference}")
    print(
        f"{name}: {done:,} texts, {num_characters:,} characters, {num_fast:,} the fast way, "
        f"every code point, 0 differences, {seconds:.0f} s of CPU",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    """Run the comparison for the tokenizers asked for."""
    num_texts = int(arguments[0]) if arguments else 1_000_000
    for name in arguments[1:] or NAMES:
        fuzz(name, num_texts)


if __name__ == "__main__":
    main(sys.argv[1:])
