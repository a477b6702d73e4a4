"""IFEval's instructions: each is a rule that a program can check. Source: arXiv:2311.07911.

`verify_instruction` checks one of the 25 rules by its id in the data set. A check is a function of
the reply and the rule's settings. Two rules count what has no exact definition: sentences end
with `.`, `!` or `?` before white space, and words are runs of letters and digits. The published
checker uses a trained sentence splitter, so counts can differ by one or two in unusual texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = ["INSTRUCTIONS", "loose_variants", "verify_all_instructions", "verify_instruction"]

Settings = Mapping[str, Any]
Check = Callable[[str, Settings], bool]

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def verify_instruction(instruction_id: str, response: str, kwargs: Settings) -> bool:
    """Return whether a reply obeys one instruction; an empty reply obeys none.

    Args:
        instruction_id: An id of IFEval, such as `length_constraints:number_words`.
        response: The reply.
        kwargs: The settings of the instruction; those that are None are left out.

    Raises:
        DataValidationError: if the id is unknown, or a setting is missing.
        ConfigurationError: if a language has to be recognized and `langdetect` is not installed.
    """
    if instruction_id not in INSTRUCTIONS:
        raise DataValidationError(
            f"instruction={instruction_id} is unknown.{did_you_mean(instruction_id, INSTRUCTIONS)}"
        )
    if not response.strip():
        return False
    given = {key: value for key, value in kwargs.items() if value is not None}
    try:
        return INSTRUCTIONS[instruction_id](response, given)
    except KeyError as error:
        raise DataValidationError(
            f"instruction={instruction_id} needs the setting {error.args[0]}; it has "
            f"{', '.join(given) or 'none'}."
        ) from error


def verify_all_instructions(
    response: str, instruction_id_list: Sequence[str], kwargs_list: Sequence[Settings]
) -> tuple[float, dict[str, bool]]:
    """Return the share of instructions that a reply obeys, and the verdict of each.

    An id that occurs twice has a number behind it in the dictionary.
    """
    verdicts: dict[str, bool] = {}
    for index, (name, kwargs) in enumerate(zip(instruction_id_list, kwargs_list, strict=True)):
        key = name if name not in verdicts else f"{name} {index}"
        verdicts[key] = verify_instruction(name, response, kwargs)
    return sum(verdicts.values()) / max(len(verdicts), 1), verdicts


def loose_variants(response: str) -> list[str]:
    """Return the reply, without its first line, its last line, or both; each also without `*`.

    A reply obeys an instruction loosely if one of these does: an introduction, a closing line or
    bold type are then no fault.
    """
    lines = response.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(part).strip() for part in cut]
    return texts + [text.replace("*", "") for text in texts]


# ---- parts ----


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation == "at least":
        return count >= wanted
    if relation == "less than":
        return count < wanted
    raise DataValidationError(f"relation={relation!r} is unknown; use 'at least' or 'less than'.")


def _count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _count_sentences(text: str) -> int:
    """Count ends of sentences; an abbreviation such as "e.g." or an initial does not end one."""
    text = re.sub(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|Prof|St|[A-Z])\.", "", text)
    return len([part for part in re.split(r"[.!?]+[\"')\]”’]*(?:\s+|$)", text) if part.strip()])


def _split_parts(text: str, pattern: str) -> list[str] | None:
    """Return the parts between separators; None if one in the middle is empty."""
    parts = re.split(pattern, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _language(text: str) -> str | None:
    """Return the code of the language of a text; None if it has no letters to tell from."""
    try:
        import langdetect  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigurationError(
            "instructions about languages need the package langdetect; run `pip install "
            "'tinker-cookbook[ifeval]'`."
        ) from error
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


# ---- the instructions ----


def _contains_keywords(text: str, given: Settings) -> bool:
    return all(_count(text, re.escape(word)) for word in given["keywords"])


def _keyword_frequency(text: str, given: Settings) -> bool:
    count = _count(text, re.escape(given["keyword"]))
    return _compare(count, given["relation"], given["frequency"])


def _no_forbidden_words(text: str, given: Settings) -> bool:
    return not any(_count(text, rf"\b{re.escape(word)}\b") for word in given["forbidden_words"])


def _letter_frequency(text: str, given: Settings) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


def _is_in_language(text: str, given: Settings) -> bool:
    return _language(text) in (given["language"], None)


def _number_sentences(text: str, given: Settings) -> bool:
    return _compare(_count_sentences(text), given["relation"], given["num_sentences"])


def _number_words(text: str, given: Settings) -> bool:
    return _compare(_count(text, r"\w+"), given["relation"], given["num_words"])


def _number_paragraphs(text: str, given: Settings) -> bool:
    parts = _split_parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == given["num_paragraphs"]


def _first_word_of_paragraph(text: str, given: Settings) -> bool:
    paragraphs = re.split(r"\n\n", text)
    position = given["nth_paragraph"]
    if sum(bool(part.strip()) for part in paragraphs) != given["num_paragraphs"]:
        return False
    if position > len(paragraphs) or not paragraphs[position - 1].strip():
        return False
    word = paragraphs[position - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == str(given["first_word"]).lower()


def _number_placeholders(text: str, given: Settings) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"]


def _has_postscript(text: str, given: Settings) -> bool:
    marker = str(given["postscript_marker"]).strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return _count(text, known.get(marker, re.escape(marker))) > 0


def _number_bullets(text: str, given: Settings) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == given["num_bullets"]


def _is_constrained_answer(text: str, given: Settings) -> bool:
    del given
    return any(answer in text for answer in CONSTRAINED_ANSWERS)


def _number_highlights(text: str, given: Settings) -> bool:
    single = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= given["num_highlights"]


def _number_sections(text: str, given: Settings) -> bool:
    splitter = re.escape(str(given["section_spliter"]).strip())
    return len(re.findall(rf"\s?{splitter}\s?\d+\s?", text)) >= given["num_sections"]


def _is_json(text: str, given: Settings) -> bool:
    del given
    plain = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(plain)
    except ValueError:
        return False
    return True


def _has_title(text: str, given: Settings) -> bool:
    del given
    return any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", text))


def _has_two_responses(text: str, given: Settings) -> bool:
    del given
    parts = _split_parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _repeats_prompt(text: str, given: Settings) -> bool:
    wanted = str(given["prompt_to_repeat"]).strip().lower()
    return text.strip().lower().startswith(wanted)


def _ends_with(text: str, given: Settings) -> bool:
    wanted = str(given["end_phrase"]).strip().lower()
    return text.strip().strip('"').lower().endswith(wanted)


def _is_quoted(text: str, given: Settings) -> bool:
    del given
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def _capital_words(text: str, given: Settings) -> bool:
    words = re.findall(r"\w+(?:['’-]\w+)*", text)
    count = sum(word.isupper() for word in words)
    return _compare(count, given["capital_relation"], given["capital_frequency"])


def _is_upper_english(text: str, given: Settings) -> bool:
    del given
    return text.isupper() and _language(text) in ("en", None)


def _is_lower_english(text: str, given: Settings) -> bool:
    del given
    return text.islower() and _language(text) in ("en", None)


def _has_no_comma(text: str, given: Settings) -> bool:
    del given
    return "," not in text


INSTRUCTIONS: dict[str, Check] = {
    "keywords:existence": _contains_keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _no_forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _is_in_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": _number_bullets,
    "detectable_format:constrained_response": _is_constrained_answer,
    "detectable_format:number_highlighted_sections": _number_highlights,
    "detectable_format:multiple_sections": _number_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _is_upper_english,
    "change_case:english_lowercase": _is_lower_english,
    "punctuation:no_comma": _has_no_comma,
}
"""Id of an instruction -> its check."""
