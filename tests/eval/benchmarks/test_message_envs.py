"""The environments of single examples, and the helpers that benchmarks of other programs import."""

# pyright: reportGeneralTypeIssues=false

import asyncio
import json
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tinker_cookbook.eval.benchmarks import (
    _common,
    aime,
    ceval,
    gpqa,
    gsm8k,
    ifbench,
    ifeval,
    math500,
    mbpp,
    mmlu_pro,
    mmlu_redux,
    supergpqa,
)
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, BenchmarkResult
from tinker_cookbook.eval.custom_evaluators import QA_DATASET, CustomEvaluator, grader_fn
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import Renderer, load_renderer
from tinker_cookbook.rl.message_env import MessageEnv
from tinker_cookbook.sandbox import LocalSandbox
from tinker_cookbook.utils.sdk_compat import wait_for_client

COUNT = [{"num_words": 2, "relation": "at least"}]


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> Renderer:
    return load_renderer("role_colon", str(tiny_model_folder))


def run(env: MessageEnv, reply: str) -> tuple[list, float, dict]:
    async def go():
        messages = await env.initial_observation()
        result = await env.step({"role": "assistant", "content": reply})
        assert result.episode_done
        return messages, result.reward, result.metrics

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (lambda: aime.AIMEMessageEnv("p", 7), r"\boxed{007}", "8"),
        (lambda: gsm8k.GSM8KMessageEnv("q", "1200"), "It is 1,200.", "12"),
        (lambda: math500.MATH500MessageEnv("p", r"\frac{1}{2}"), r"\boxed{1/2}", r"\boxed{2}"),
        (lambda: ceval.CEvalMessageEnv("q", "B", "law"), "The answer is (B)", "The answer is (A)"),
        (lambda: gpqa.GPQAMessageEnv("q", "D"), "The answer is (D)", "I do not know"),
        (
            lambda: mmlu_pro.MMLUProMessageEnv("q", "J", "ABCDEFGHIJ"),
            "The answer is (J)",
            "The answer is (A)",
        ),
        (lambda: mmlu_redux.MMLUReduxMessageEnv("q", "A", "law"), "The answer is (A)", "B"),
        (lambda: supergpqa.SuperGPQAMessageEnv("q", "C"), "The answer is (C)", "B"),
        (
            lambda: ifeval.IFEvalMessageEnv(
                [{"role": "user", "content": "q"}],
                ["length_constraints:number_words"],
                COUNT,
            ),
            "two words",
            "one",
        ),
    ],
)
def test_a_reply_is_graded_as_by_the_benchmark(make, right: str, wrong: str):
    assert run(make(), right)[1] == 1.0
    assert run(make(), wrong)[1] == 0.0


def test_the_prompt_and_the_group_are_those_given():
    env = mmlu_redux.MMLUReduxMessageEnv("q", "A", "law", example_id="x", system_prompt="s")
    messages, _, metrics = run(env, "The answer is (A)")
    assert [message["content"] for message in messages] == ["s", "q"]
    assert (env.example_id, metrics["acc/law"]) == ("x", 1.0)


def test_a_program_runs_in_the_sandbox_of_its_environment():
    made = []

    async def factory() -> LocalSandbox:
        made.append(LocalSandbox())
        return made[-1]

    async def grade(reply: str) -> float:
        env = mbpp.MBPPMessageEnv("p", "t", ["assert f(2) == 4"], factory)
        result = await env.step({"role": "assistant", "content": reply})
        assert env.sandbox is made[-1]
        await env.cleanup()
        assert env.sandbox is None
        return result.reward

    assert asyncio.run(grade("```python\ndef f(x):\n    return 2 * x\n```")) == 1.0
    assert asyncio.run(grade("```python\ndef f(x):\n    return x\n```")) == 0.0
    assert len(made) == 2


def test_ifbench_is_an_environment_of_tokens(renderer):
    env = ifbench.IFBenchEnv("Say it.", ["count:numbers"], [{"N": 1}], renderer, "x")
    observation, _ = asyncio.run(env.initial_observation())
    assert "Say it." in renderer.tokenizer.decode(observation.to_ints())
    assert env.example_id == "x"


def test_sandboxes_of_an_evaluation():
    def factory() -> LocalSandbox:
        return LocalSandbox()

    assert _common.get_sandbox_factory(BenchmarkConfig()) is LocalSandbox
    assert _common.get_sandbox_factory(BenchmarkConfig(), packages=["numpy"]) is LocalSandbox
    assert _common.get_sandbox_factory(BenchmarkConfig(sandbox_factory=factory)) is factory
    with pytest.raises(ConfigurationError, match="pip install not-a-package"):
        _common.get_sandbox_factory(BenchmarkConfig(), packages=["not-a-package"])


def test_helpers(renderer):
    assert _common.extract_command("a\n```bash\nls\n```\n```sh\n\n```") == "ls"
    assert _common.extract_command("```python\nls\n```") is None
    assert _common.is_task_complete("Done.\nTASK_COMPLETE\n")
    assert not _common.is_task_complete("Say TASK_COMPLETE when done.")
    assert _common.parse_kwargs([None, '{"a": 1, "b": null}'], ["x", "y", "z"]) == [
        {},
        {"a": 1},
        {},
    ]
    tokens = renderer.tokenizer.encode("Hello", add_special_tokens=False)
    assert _common.decode_response(tokens, renderer) == "Hello"


def test_data_sets_are_loaded_and_limited(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(9)))
    found = _common.load_benchmark_dataset(str(tmp_path))
    assert isinstance(found, datasets.Dataset)
    assert _common.limit_dataset(found, None)["n"] == list(range(9))
    assert _common.limit_dataset(found, 2)["n"] == [0, 1]
    mixed = _common.limit_dataset(found, 4, shuffle_seed=1)["n"]
    assert mixed == _common.limit_dataset(found, 4, shuffle_seed=1)["n"] != [0, 1, 2, 3]


def test_a_result_is_a_json_object():
    result = BenchmarkResult("x", 0.5, 2, 1, pass_at_k={1: 0.5})
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["pass_at_k"] == {"1": 0.5}
    assert BenchmarkResult.from_dict(stored) == result


def test_the_example_of_an_evaluator(local_service: ServiceProcess, shared_client):
    created = shared_client.create_sampling_client(base_model=local_service.model)
    rows = [*QA_DATASET, {"input": "Anything?", "output": ""}]
    evaluator = CustomEvaluator(rows, grader_fn, local_service.model, "role_colon")
    found = asyncio.run(evaluator(wait_for_client(created)))
    assert found == {"accuracy": 0.25}, "a random model knows no capitals"
