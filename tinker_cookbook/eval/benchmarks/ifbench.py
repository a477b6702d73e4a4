"""IFBench: 58 further instructions that are harder to follow. Source: arXiv:2507.02833.

The checks are those of the package `if-verifiable` (Apache-2.0), in the extra `ifeval`. Some need
tables of the package nltk, which it downloads when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import (
    IF_BENCH,
    BenchmarkData,
    HubTable,
    PackageFile,
)
from tinker_cookbook.eval.benchmarks._instructions import (
    InstructionBenchmark,
    InstructionEnv,
    Verdict,
)
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.message_env import EnvFromMessageEnv

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["IFBenchBenchmarkBuilder", "IFBenchEnv"]


class IFBenchBenchmarkBuilder(InstructionBenchmark):
    """IFBench; a reply is correct if it obeys all its instructions."""

    name = "ifbench"
    data = BenchmarkData(
        name="ifbench",
        keys=("prompt", "instruction_id_list", "kwargs"),
        hub=HubTable("allenai/IFBench_test", None, "train"),
        package=PackageFile(IF_BENCH, "ifbench/data/IFBench_test.jsonl", "ODC-BY-1.0"),
        id_key="key",
    )

    def check(
        self, reply: str, prompt: str, ids: Sequence[str], kwargs: list[Any]
    ) -> list[Verdict]:
        """Check with the functions of `if-verifiable`."""
        try:
            from if_verifiable.common import evaluate_instructions  # pyright: ignore
            from if_verifiable.ifbench.instructions_registry import (  # pyright: ignore
                INSTRUCTION_DICT,
            )
        except ImportError as error:
            raise ConfigurationError(
                f"benchmark=ifbench needs the package if-verifiable ({error}); run `pip install "
                "'tinker-cookbook[ifeval]'`."
            ) from error
        results, _ = evaluate_instructions(
            response=reply,
            instruction_id_list=list(ids),
            kwargs_list=[
                {key: value for key, value in (given or {}).items() if value is not None}
                for given in kwargs
            ],
            prompt=prompt,
            instruction_registry=INSTRUCTION_DICT,
        )
        return [(result.strict_pass, result.loose_pass) for result in results]


class IFBenchEnv(EnvFromMessageEnv):
    """One prompt of IFBench, as an environment of tokens."""

    def __init__(
        self,
        prompt: str,
        instruction_ids: Sequence[str],
        kwargs_list: Sequence[Any],
        renderer: Renderer,
        example_id: str = "",
    ) -> None:
        self.example_id = example_id
        super().__init__(
            renderer,
            InstructionEnv(
                IFBenchBenchmarkBuilder(),
                build_messages(prompt),
                instruction_ids,
                kwargs_list,
                example_id,
            ),
            failed_parse_reward=0.0,
            terminate_on_parse_error=False,
            context_overflow_reward=0.0,
        )


register(IFBenchBenchmarkBuilder())
