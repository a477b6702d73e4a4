"""MMLU: multiple choice of 57 subjects, by likelihood of the letters. Source: arXiv:2009.03300."""

from __future__ import annotations

import json
import re

from tinker_cookbook.eval.benchmarks._data import (
    LM_EVAL,
    BenchmarkData,
    HubTable,
    PackageFile,
    Row,
)
from tinker_cookbook.eval.benchmarks._likelihood import LikelihoodBenchmark
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.graders.choices import LETTERS, format_mcq_choices

__all__ = ["SUBJECTS", "MMLUBenchmarkBuilder", "parse_prompts"]

SUBJECTS = tuple(
    """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine
    college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality
    international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology
    public_relations security_studies sociology us_foreign_policy virology
    world_religions""".split()
)
"""The 57 subjects, as the data sets of MMLU and MMLU-Redux name them."""


def parse_prompts(content: bytes) -> list[Row]:
    """Read the questions from prompts with worked answers: JSON, one text per subject."""
    rows = []
    for subject, text in json.loads(content).items():
        for block in re.split(r"\n\nQ: ", text)[1:]:
            asked, worked = block.split("\nA: ", 1)
            question, listed = re.split(r"\s*\(A\)\s*", asked, maxsplit=1)
            choices = re.split(r"\s*\([B-E]\)\s*", listed)
            letter = re.findall(r"[Aa]nswer is:? \(?([A-E])", worked)[-1]
            rows.append(
                {
                    "question": question,
                    "subject": subject,
                    "choices": choices,
                    "answer": LETTERS.index(letter),
                }
            )
    return rows


class MMLUBenchmarkBuilder(LikelihoodBenchmark):
    """MMLU without examples in the prompt; the prompt is that of lm-evaluation-harness.

    The package holds 282 development questions (about 5 per subject), not the test questions.
    """

    name = "mmlu"
    main_metric = "acc"
    data = BenchmarkData(
        name="mmlu",
        keys=("question", "subject", "choices", "answer"),
        hub=HubTable("cais/mmlu", "all", "test"),
        package=PackageFile(
            LM_EVAL, "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json", "MIT", parse_prompts
        ),
    )

    def context(self, row: Row) -> str:
        """Return the subject, and the question with lettered choices."""
        subject = str(row["subject"]).replace("_", " ")
        choices = format_mcq_choices(row["choices"])
        return (
            f"The following are multiple choice questions (with answers) about {subject}.\n\n"
            f"{str(row['question']).strip()}\n{choices}\nAnswer:"
        )

    def endings(self, row: Row) -> list[str]:
        """Return the letters."""
        return list(LETTERS[: len(row["choices"])])

    def expected(self, row: Row) -> int:
        """Return the index of the right choice."""
        return int(row["answer"])


register(MMLUBenchmarkBuilder())
