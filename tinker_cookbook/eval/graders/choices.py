"""Multiple choice: the letter that a reply chooses, or the likeliest ending."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tinker_cookbook.eval.graders.math_answers import extract_boxed
from tinker_cookbook.exceptions import DataValidationError

__all__ = ["LikelihoodVerdict", "extract_mcq_answer", "format_mcq_choices", "grade_likelihood"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What may be around a letter: **B**, (B), "B", `B`, B., $B$ and \text{B}.
_OPEN, _CLOSE = r"[\s*_(\[\"'`$]*(?:\\text\{|\\boxed\{)?[\s*_(\[]*", r"(?![\w'’])"
_BEFORE = (
    # "the answer is B", "Answer: (B)", "the correct option would be B"
    r"(?:answer|option|choice)(?:\s+(?:is|was|would be|should be|must be)\b|\s*[:=])"
    r"(?:\s+(?:option|choice|letter))?\s*:?",
    # "I choose B"; "A" may follow as an article, which `_is_article` excludes
    r"\b(?:choose|pick|select)(?:\s+(?:option|choice|letter))?\s*:?",
)


def format_mcq_choices(choices: Sequence[str]) -> str:
    """Return the choices as lines `A. text`."""
    if len(choices) > len(LETTERS):
        raise DataValidationError(
            f"{len(choices)} choices have no letters; use at most {len(LETTERS)}."
        )
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def extract_mcq_answer(text: str, valid_letters: str = "ABCD") -> str:
    r"""Return the letter that a reply chooses; an empty text if it chooses none.

    In this order: the last `\boxed{B}`; the last "answer is B" or "Answer: B"; a reply that is
    only a letter, or starts with one as in `B. Paris` or `(B)`; the last line that is only a
    letter. The article "A" ("A dog barks", "the answer is a dog") is not a choice.
    """
    boxed = extract_boxed(text)
    if boxed is not None:
        return _only_letter(boxed, valid_letters)
    stated = _stated(text, valid_letters)
    if stated:
        return stated
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    return _first_letter(lines[0], valid_letters) or _only_letter(lines[-1], valid_letters)


def _stated(text: str, valid: str) -> str:
    """Return the letter of the last statement such as "the answer is B"."""
    found: list[tuple[int, str]] = []
    for before in _BEFORE:
        for match in re.finditer(rf"(?i:{before}){_OPEN}([{valid}]){_CLOSE}", text):
            if not _is_article(match[1], text[match.end() :]):
                found.append((match.end(), match[1]))
    return max(found)[1] if found else ""


def _is_article(letter: str, rest: str) -> bool:
    """Return whether an "A" (or "I") starts a phrase, as in "A dog", and so is not a choice."""
    return letter in "AI" and re.match(r"\s+[a-z]", rest) is not None


def _first_letter(line: str, valid: str) -> str:
    """Return the letter of `B`, `B.`, `(B) Paris`, `B: Paris` or `**B**`."""
    match = re.match(rf"{_OPEN}([{valid}])(?:[\s*_\"'`$}}]*$|[*_]*[.):\]])", line)
    return match[1] if match else ""


def _only_letter(line: str, valid: str) -> str:
    """Return the letter of a line that holds nothing else, such as `(B)` or `**B**`."""
    plain = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", line)
    match = re.fullmatch(rf"[\s*_(\[\"'`$]*([{valid}])[\s*_)\]\"'`$.:]*", plain)
    return match[1] if match else ""


@dataclass(frozen=True)
class LikelihoodVerdict:
    """Which ending is the likeliest."""

    choice: int
    """Index of the ending with the highest log probability."""
    choice_norm: int
    """Index of the ending with the highest log probability per character."""
    acc: float
    """1 if `choice` is the expected one, otherwise 0."""
    acc_norm: float


def grade_likelihood(
    logprobs: Sequence[float], endings: Sequence[str], expected: int
) -> LikelihoodVerdict:
    """Choose the likeliest ending, as lm-evaluation-harness does; the first one wins a tie.

    Args:
        logprobs: The log probability of each whole ending, in nats.
        endings: The endings without the space before them; `acc_norm` divides by their characters.
        expected: The index of the right ending.
    """
    if len(logprobs) != len(endings) or not 0 <= expected < len(endings):
        raise DataValidationError(
            f"{len(logprobs)} log probabilities, {len(endings)} endings and expected={expected} "
            "do not fit together."
        )
    per_character = [
        value / max(len(ending), 1) for value, ending in zip(logprobs, endings, strict=True)
    ]
    choice = max(range(len(endings)), key=lambda index: logprobs[index])
    normed = max(range(len(endings)), key=lambda index: per_character[index])
    return LikelihoodVerdict(choice, normed, float(choice == expected), float(normed == expected))
