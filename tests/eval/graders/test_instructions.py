"""IFEval's instructions: replies that obey, and replies that just do not."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.eval.benchmarks import REGISTRY, BenchmarkConfig
from tinker_cookbook.eval.benchmarks._ifeval_verify import verify_all_instructions
from tinker_cookbook.eval.benchmarks._instructions import InstructionBenchmark
from tinker_cookbook.eval.graders.instructions import (
    INSTRUCTIONS,
    loose_variants,
    verify_instruction,
)
from tinker_cookbook.exceptions import DataValidationError

AT_LEAST_3 = {"relation": "at least"}

# Instruction, its settings, replies that obey it, and replies that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["sea", "salt"]}, ["Salt of the Sea"], ["The sea"]),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, **AT_LEAST_3},
        ["sea and Sea", "sea sea sea"],
        ["sea", "ocean"],
    ),
    (
        "keywords:frequency",
        {"keyword": "c++", "frequency": 2, "relation": "less than"},
        ["C++", "c"],
        ["c++ or C++"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["art"]},
        ["a party"],
        ["modern Art", "art."],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Z", "let_frequency": 2, "let_relation": "at least"},
        ["zigZag", "zz"],
        ["zebra"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **AT_LEAST_3},
        ["One. Two! Three?", 'He said "Go." Then he left. It rained... Nobody saw it.'],
        ["One. Two.", "It costs 3.50 or so. Fine.", "Dr. Smith came, e.g. today. He left."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ["one two three"],
        ["one two three four", "it's two words"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "one *** two ***"],
        ["one\n\ntwo", "one *** *** two", "a *** b *** c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "However"},
        ["One.\n\nhowever, two.", 'One.\n\n"However" two.'],
        ["One.\n\nTwo.", "However\n\nx\n\ny", "However"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], at [place]", "[a][b][c]"],
        ["Dear [name]"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP. S. y"], ["PS y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. y"], ["P.S. y"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\ntext\n  - b"],
        ["* a", "* a\n- b\n- c", "** a\n** b"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["no", "My answer: no."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** b *c*"],
        ["*a* b", "** **  * *"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nx\nSection 2\ny"],
        ["Section 1\nx", "section one, section two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "```\n[]\n```"],
        ["{a: 1}", 'Here: {"a": 1}'],
    ),
    ("detectable_format:title", {}, ["<<The sea>>\nIt is blue."], ["<The sea>", "<< >>"]),
    (
        "combination:two_responses",
        {},
        ["one ****** two", "******one******two******"],
        ["one", "one ****** one", "one ****** two ****** three", "one ****** ****** two"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Tell me."},
        ["tell me. Well ..."],
        ["Well. Tell me."],
    ),
    ("startend:end_checker", {"end_phrase": "Bye."}, ["x bye.", '"x Bye."'], ["Bye. Now"]),
    ("startend:quotation", {}, ['"all of it"', ' "x" '], ['"', "all", '"all']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE SEA is blue", "NASA, I said"],
        ["The Sea", "NASA"],
    ),
    ("punctuation:no_comma", {}, ["one and two"], ["one, two"]),
]


@pytest.mark.parametrize(
    ("name", "settings", "right", "wrong"), CASES, ids=[f"{n} {c[0]}" for n, c in enumerate(CASES)]
)
def test_replies_are_told_apart(name: str, settings: dict, right: list[str], wrong: list[str]):
    given = {**settings, "unused": None}
    assert [reply for reply in right if not verify_instruction(name, reply, given)] == []
    assert [reply for reply in wrong if verify_instruction(name, reply, given)] == []
    assert not verify_instruction(name, " \n", given)


def test_languages():
    pytest.importorskip("langdetect")
    text = "This is a sentence that anybody can read without any trouble at all."
    assert verify_instruction("language:response_language", text, {"language": "en"})
    assert not verify_instruction("language:response_language", text, {"language": "de"})
    assert verify_instruction("change_case:english_lowercase", text.lower(), {})
    assert not verify_instruction("change_case:english_lowercase", text, {})
    assert verify_instruction("change_case:english_capital", text.upper(), {})


def test_every_instruction_has_a_case():
    languages = {"language:response_language"} | {
        f"change_case:english_{case}" for case in ("capital", "lowercase")
    }
    assert {case[0] for case in CASES} | languages == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


def test_mistakes_in_the_data_are_named():
    with pytest.raises(DataValidationError, match="Did you mean 'punctuation:no_comma'"):
        verify_instruction("punctuation:no_commas", "x", {})
    with pytest.raises(DataValidationError, match="needs the setting num_words; it has relation"):
        verify_instruction("length_constraints:number_words", "x", {"relation": "at least"})
    given = {"relation": "more", "num_words": 1}
    with pytest.raises(DataValidationError, match="relation='more' is unknown"):
        verify_instruction("length_constraints:number_words", "x", given)


def test_shares():
    ids = ["punctuation:no_comma", "startend:quotation", "punctuation:no_comma"]
    share, verdicts = verify_all_instructions("one", ids, [{}, {}, {}])
    assert share == pytest.approx(2 / 3)
    assert verdicts == {
        "punctuation:no_comma": True,
        "startend:quotation": False,
        "punctuation:no_comma 2": True,
    }


def test_a_loose_reply_may_have_an_introduction_and_bold_type():
    assert len(loose_variants("Sure:\n**x**\nBye")) == 8
    ifeval = REGISTRY["ifeval"]
    assert isinstance(ifeval, InstructionBenchmark)
    verdicts = ifeval.check("Sure, here:\nno comma", "", ["punctuation:no_comma"], [None])
    assert verdicts == [(False, True)]


async def _grade(reply: str, row: dict[str, Any]):
    ifeval = REGISTRY["ifeval"]
    assert isinstance(ifeval, InstructionBenchmark)
    return await ifeval.grade(reply, ifeval.reference(row), BenchmarkConfig())


def test_scores_are_those_of_the_paper():
    """Two prompts with one and three instructions: prompt and instruction level differ."""
    import asyncio

    row = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    ids = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    long = {"prompt": "p", "instruction_id_list": ids, "kwargs": [{}, {}, {}]}
    grades = [asyncio.run(_grade("one two", each)) for each in (row, long)]
    assert [grade.reward for grade in grades] == [1.0, 0.0]
    assert grades[1].logs["broken"] == "startend:quotation, detectable_format:title"
    result = REGISTRY["ifeval"].aggregate([1.0, 0.0], [grade.metrics for grade in grades])
    assert result.score == result.metrics["prompt_strict"] == 0.5
    assert result.metrics["inst_strict"] == 0.5  # 2 of 4, not the mean of 1 and 1/3


def test_ifbench_uses_its_own_checks():
    pytest.importorskip("if_verifiable")
    ifbench = REGISTRY["ifbench"]
    assert isinstance(ifbench, InstructionBenchmark)
    given = {"keyword1": "a1", "keyword2": "b2", "keyword3": "c3", "keyword4": "d4"}
    given |= {"keyword5": "e5", "N": None}
    reply = " ".join(["a1"] + ["b2"] * 2 + ["c3"] * 3 + ["d4"] * 5 + ["e5"] * 7)
    ids = ["count:keywords_multiple"]
    assert ifbench.check(reply, "", ids, [given]) == [(True, True)]
    assert ifbench.check("a1 b2", "", ids, [given]) == [(False, False)]
