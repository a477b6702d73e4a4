"""Exact fast encoding of byte-level BPE vocabularies, with `tiktoken` (the extra `fast`).

`build_fast_encoding` returns an encoding only for tokenizers proved to give the same ids:

 - Splitting: tokenizer.json must hold one of the splitting rules of `_split_pattern`, on whose
   character classes both regex engines agree at every code point (a test compares all of them).
 - Merging: `tokenizers` merges the pair that comes first in its list of merges, tiktoken the pair
   whose result has the lowest id. Two facts make the results equal for every text:

   1. Ids rise along the list of merges.
   2. Every token, encoded by itself with merges alone, gives itself.

   Suppose both have reached the same symbols and tiktoken picks x+y, the lowest result t. So far,
   the merges within t's bytes are those that happen when t is encoded by itself, since no merge has
   crossed t's borders and the choices within are the same. By (2) those merges end in t, and only
   x+y is left, so x+y is in the list. By (1) no pair with another result comes before it, and
   another neighbouring pair with result t would be the same state of the same token, so it is x+y
   again.

   Merging never produces tokens that fail (2), so they are left out. If the tokenizer takes whole
   words from its vocabulary first, a token that fails with two symbols left would be merged by
   tiktoken alone, so such a vocabulary is refused.
 - Texts that the engines might split differently are encoded by the tokenizer itself: characters
   that this Python's Unicode does not know, bytes without a token, very long white space, lone
   surrogates.
"""

from __future__ import annotations

import bisect
import importlib.util
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tinker_cookbook.replies.json_source import JsonObject

if TYPE_CHECKING:
    from tokenizers import Tokenizer


__all__ = ["FastEncoding", "build_fast_encoding"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
_QWEN3_5 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}*{_LOWER}+"
_CASED_2 = r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED}|{_CASED_2}|\p{{N}}|{_CASED_REST}"  # Mistral, Nemotron
_O200K = (  # gpt-oss
    rf"{_CASED}{_CONTRACTIONS}?|{_CASED_2}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}"
)
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = r"[\p{Han}]+|" + _O200K.replace(_UPPER, _UPPER[:-1] + _NO_HAN).replace(
    _LOWER, _LOWER[:-1] + _NO_HAN
).replace("/", "")

# DeepSeek splits three times: digits, then Chinese and kana, then each of these pieces and the text
# between them. As one rule: no other alternative may cross into digits or `_CJK`, a piece ends
# where one of them follows, and characters that no rule matches stay together, except the last one
# before a letter, which that letter's alternative matches.
_CJK = r"\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_STEPS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    _ASCII_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_WORD = rf"[\p{{L}}\p{{M}}&&[^{_CJK}]]"
_DEEPSEEK = (
    rf"\p{{N}}{{1,3}}|[\p{{L}}\p{{M}}&&[{_CJK}]]+|[\p{{P}}\p{{S}}&&[{_CJK}]]+|{_ASCII_WORD}"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_CJK}]?{_WORD}+| ?[\p{{P}}\p{{S}}&&[^{_CJK}]]+[\r\n]*"
    rf"|\s*[\r\n]+|\s+(?![^\s\p{{N}}{_CJK}])|\s+"
    rf"|[^\s\p{{L}}\p{{M}}\p{{P}}\p{{S}}\p{{N}}]+(?!{_WORD})"
)
_KNOWN_SPLITS = {
    **{(rule,): rule for rule in (_QWEN2, _LLAMA3, _QWEN3_5, _TEKKEN, _O200K, _KIMI)},
    _DEEPSEEK_STEPS: _DEEPSEEK,
}
# GPT-2's rule within text without digits; each digit is a separate piece. White space before a
# digit ends such a text, so it is one piece there, as at the end of a text.
_GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's regex engine gives up (and panics) in runs of some hundred thousand spaces.
_LONG_TEXT = 50_000
_LONG_SPACE = re.compile(r"\s{20000}")
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})

# Probes for comparing both ways: words, every kind of white space, digits, marks, and letters,
# digits and compositions from Unicode 13 to 17.
_PROBES = (
    "Hello world, it's 12345 o'clock! I'LL 'ſ 'K\n\n  two\t\ttabs \r\n x\n",
    "Grüße naïve e\u0301\u0323 日本語テキスト שלום مرحبا क्षत्रिय ไทย ½Ⅷ²٣ 🙂👩‍👩‍👧‍👦"
    "\u200b\u00a0\u3000\x85\u2028",
    *(f"a{c} {c}1{c}.{c}\u0301" for c in "\U00010d40\U00010d4a\U00010efd\U00011f50\U00011f04"),
    *(f"a{c} {c}1{c}.{c}\u0301" for c in "\U000113c5\U00011de0\U00011db0\U0002ebf0\U0001e4d0"),
    *(f"a{c} {c}1{c}.{c}\u0301" for c in "\U0001df25\U00031350\u1c89\ua7dc\u0870\U0001fbf0"),
    "\u3000\u1906\u1a25\u1ac4\u18a9 e\u1ac4\u0323\u0301",
    "  a  1  . \n 7x 12 a1b2 __init__ $x=3.14e-10; {\"k\": [1,2]} </s> <|im_end|> ''' ---- ....",
)


class FastEncoding:
    """Encodes text like the tokenizer it was built from; returns None where only the tokenizer
    can."""

    def __init__(
        self,
        encoding: Any,
        lengths: dict[int, int],
        risky: tuple[re.Pattern, re.Pattern],
        *,
        has_all_bytes: bool,
        normalizer: Any | None,
    ) -> None:
        self._encode = encoding.encode_ordinary
        self._has_all_bytes = has_all_bytes
        self._lengths = lengths
        self._suspect, self._risky = risky
        self._normalizer = normalizer
        self._trusts_latin1 = not any(self._risky.match(chr(code)) for code in range(0x100))

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of a text, None if it must be left to the tokenizer itself."""
        if not (self._trusts_latin1 and _is_latin1(text)):
            if not self._is_harmless(text) and self._risky.search(text):
                return None
            if not self._is_normal(text):
                text = self._normalizer.normalize_str(text)  # pyright: ignore
        if len(text) > _LONG_TEXT and _LONG_SPACE.search(text):
            return None
        return self._encode(text)

    def _is_harmless(self, text: str) -> bool:
        """Whether a quick check proves that the text is safe; False proves nothing.

        Characters unknown to this Python, and surrogates, are not printable.
        """
        if self._has_all_bytes and text.replace("\n", "").isprintable():
            return True
        return self._suspect.search(text) is None

    def _is_normal(self, text: str) -> bool:
        """Whether the tokenizer's normalizer does not change the text.

        Its normalizer may be of an older Unicode than this Python. It then moves and composes fewer
        characters, so what is normal here is normal there.
        """
        return self._normalizer is None or unicodedata.is_normalized("NFC", text)

    def encode_spans(self, spans: Sequence[str]) -> list[list[int]] | None:
        """Encode the joined spans; a token belongs to the span it starts in."""
        text = "".join(spans)
        if not self._is_normal(text):
            return None  # bytes would no longer tell which span a token comes from
        tokens = self.encode(text)
        if tokens is None:
            return None
        ends, total = [], 0
        for span in spans:
            total += len(span) if span.isascii() else len(span.encode())
            ends.append(total)
        result: list[list[int]] = [[] for _ in spans]
        start = 0
        for token in tokens:
            result[bisect.bisect_right(ends, start)].append(token)
            start += self._lengths[token]
        return result


def _is_latin1(text: str) -> bool:
    """Whether the text has characters below U+0100 only: all known and in normal form."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def build_fast_encoding(backend: Tokenizer, byte_of: dict[str, int]) -> FastEncoding | None:
    """Return the fast encoding of a `tokenizers.Tokenizer`, None unless it is proved equal.

    Takes a second for a large vocabulary.

    Args:
        backend: a byte-level tokenizer without added tokens.
        byte_of: the byte behind each character of its vocabulary.
    """
    if importlib.util.find_spec("tiktoken") is None:
        return None
    config = json.loads(backend.to_str())
    pattern = _split_pattern(config["pre_tokenizer"])
    normalizer = config["normalizer"]
    if normalizer == {"type": "Sequence", "normalizers": []}:
        normalizer = None
    if pattern is None or (normalizer is not None and normalizer != {"type": "NFC"}):
        return None
    ranks = _proved_ranks(config["model"], byte_of)
    if ranks is None:
        return None
    import tiktoken

    encoding = tiktoken.Encoding(
        "exact", pat_str=_grouped(pattern), mergeable_ranks=ranks, special_tokens={}
    )
    lengths = {rank: len(token) for token, rank in ranks.items()}
    missing = frozenset(byte for byte in range(256) if bytes([byte]) not in ranks)
    risky = _risky_characters(missing)
    fast = FastEncoding(
        encoding,
        lengths,
        risky,
        has_all_bytes=not missing - _NEVER_IN_UTF8,
        normalizer=normalizer and backend.normalizer,
    )
    return fast if _agrees(fast, backend) else None


def _split_pattern(pre_tokenizer: JsonObject | None) -> str | None:
    """Return tiktoken's regex for the way a tokenizer.json splits text; None if it is unknown."""
    if pre_tokenizer is None:
        return None
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    before = steps[:-1]
    if last["use_regex"]:
        if not before:
            return _GPT2
        is_digits = before == [{"type": "Digits", "individual_digits": True}]
        return _GPT2_DIGITS if is_digits else None
    if any(step["type"] != "Split" for step in before):
        return None
    if any(step["behavior"] != "Isolated" or step["invert"] for step in before):
        return None
    rules = (step["pattern"].get("Regex", "") for step in before)
    written = tuple(rule.replace("\r", r"\r").replace("\n", r"\n") for rule in rules)
    return _KNOWN_SPLITS.get(written)


def _grouped(rule: str) -> str:
    """Group the alternatives before the first that looks ahead, which changes no match.

    tiktoken's engine tries alternatives one by one, but hands a group that never looks ahead to an
    automaton as a whole: a fifth to a third less time.
    """
    plain, looks_ahead, rest = rule.partition(r"|\s+(?!")
    return f"(?:{plain}){looks_ahead}{rest}"


def _proved_ranks(model: JsonObject, byte_of: dict[str, int]) -> dict[bytes, int] | None:
    """Return the id of each token's bytes, or None if merging by id is not proved exact."""
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    is_plain = not any(model.get(o) for o in (*options, "fuse_unk", "byte_fallback"))
    if model.get("type") != "BPE" or not is_plain:
        return None
    vocabulary = {t: i for t, i in model["vocab"].items() if all(c in byte_of for c in t)}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not _ids_rise(vocabulary, merges):
        return None
    kept = _merged_tokens(vocabulary, merges, takes_words=bool(model.get("ignore_merges")))
    if kept is None:
        return None
    return {bytes(byte_of[character] for character in token): kept[token] for token in kept}


def _ids_rise(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> bool:
    """Fact 1: along the list of merges, ids of results never fall."""
    before = 0
    for left, right in merges:
        result = vocabulary.get(left + right, -1)
        if result < before or left not in vocabulary or right not in vocabulary:
            return False
        before = result
    return True


def _merged_tokens(
    vocabulary: dict[str, int], merges: list[tuple[str, ...]], *, takes_words: bool
) -> dict[str, int] | None:
    """Fact 2: return the tokens that come out of merging (or of whole words), None if inexact."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    bare = Tokenizer(BPE(vocabulary, merges, ignore_merges=False))  # pyright: ignore
    names = list(vocabulary)
    kept = dict(vocabulary)
    for name, encoding in zip(names, bare.encode_batch_fast(names), strict=True):
        ids = encoding.ids
        if ids == [vocabulary[name]]:
            continue
        if not takes_words:
            del kept[name]
        elif len(ids) < 3:
            return None
    return kept


@cache
def _risky_characters(missing_bytes: frozenset[int]) -> tuple[re.Pattern, re.Pattern]:
    """Match characters unknown to this Python, surrogates, and those with a missing byte.

    The first pattern also matches everything beyond U+FFFF. Without ranges there, `re` looks each
    character up in a table, which is 20 times as fast.
    """
    characters = list(map(chr, range(sys.maxunicode + 1)))
    risky = {c for c in characters if unicodedata.category(c) in ("Cn", "Cs")}
    if missing_bytes - _NEVER_IN_UTF8:
        for character in characters:
            encoded = character.encode("utf-8", "replace")
            if not missing_bytes.isdisjoint(encoded):
                risky.add(character)
    ranges: list[list[int]] = []
    for code in sorted(map(ord, risky)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    low = [pair for pair in ranges if pair[0] <= 0xFFFF]
    return _character_class([*low, [0x10000, sys.maxunicode]]), _character_class(ranges)


def _character_class(ranges: list[list[int]]) -> re.Pattern:
    return re.compile("[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges) + "]")


def _agrees(fast: FastEncoding, backend: Tokenizer) -> bool:
    """Compare both ways on the probes, to guard against other versions of the engines."""
    for text in _PROBES:
        tokens = fast.encode(text)
        if tokens is not None:
            by_tokenizer = backend.encode(text, add_special_tokens=False).ids
            if tokens != by_tokenizer:
                return False
    return True
