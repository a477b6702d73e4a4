"""C-Eval: Chinese multiple choice of 52 subjects. Source: arXiv:2305.08322."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark, ChoiceEnv
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["CEvalBenchmarkBuilder", "CEvalMessageEnv"]

SUBJECTS = tuple(
    """accountant advanced_mathematics art_studies basic_medicine business_administration
    chinese_language_and_literature civil_servant clinical_medicine college_chemistry
    college_economics college_physics college_programming computer_architecture computer_network
    discrete_mathematics education_science electrical_engineer
    environmental_impact_assessment_engineer fire_engineer high_school_biology
    high_school_chemistry high_school_chinese high_school_geography high_school_history
    high_school_mathematics high_school_physics high_school_politics
    ideological_and_moral_cultivation law legal_professional logic mao_zedong_thought marxism
    metrology_engineer middle_school_biology middle_school_chemistry middle_school_geography
    middle_school_history middle_school_mathematics middle_school_physics middle_school_politics
    modern_chinese_history operating_system physician plant_protection probability_and_statistics
    professional_tour_guide sports_science tax_accountant teacher_qualification
    urban_and_rural_planner veterinary_medicine""".split()
)
"""Configurations of the data set on the hub."""


def _convert(row: Row) -> Row:
    return {**row, "options": [str(row[letter]) for letter in "ABCD"]}


class CEvalBenchmarkBuilder(ChoiceBenchmark):
    """C-Eval's validation questions, whose answers are public, with a metric per subject."""

    name = "ceval"
    group_key = "subject"
    instruction = "请先思考，最后以“The answer is (X)”结尾，其中 X 是正确选项的字母。"
    data = BenchmarkData(
        name="ceval",
        keys=("question", "options", "answer"),
        hub=HubTable("ceval/ceval-exam", SUBJECTS, "val"),
        convert=_convert,
    )


class CEvalMessageEnv(ChoiceEnv):
    """One question of C-Eval, with its options in the prompt."""

    def __init__(
        self,
        prompt: str,
        expected: str,
        subject: str = "",
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            CEvalBenchmarkBuilder(),
            prompt,
            expected,
            group=subject,
            example_id=example_id,
            system_prompt=system_prompt,
        )


register(CEvalBenchmarkBuilder())
