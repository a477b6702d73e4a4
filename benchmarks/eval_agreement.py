"""The same questions by this package, by lm-evaluation-harness, and by inspect-ai.

    pip install 'lm-eval[api]==0.4.13' inspect-ai
    python benchmarks/eval_agreement.py hellaswag 100
    python benchmarks/eval_agreement.py mmlu 282
    python benchmarks/eval_agreement.py gsm8k 20

A local service is started on the default model. lm-evaluation-harness uses its OpenAI-compatible
endpoint. Likelihoods are compared per ending, and sampled replies (greedy) per question.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tinker_cookbook import model_info, service
from tinker_cookbook.eval.benchmarks import BenchmarkConfig, find_benchmark, load_trajectories
from tinker_cookbook.eval.benchmarks import run_benchmark as run_ours
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.model_files import resolve_model_folder
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.utils.sdk_compat import wait_for_client

MAX_TOKENS = 64
MMLU_TEXT = (
    "The following are multiple choice questions (with answers) about "
    "{{subject.replace('_', ' ')}}.\n\n{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
    "C. {{choices[2]}}\nD. {{choices[3]}}"
    "{% if choices|length > 4 %}\nE. {{choices[4]}}{% endif %}\nAnswer:"
)


def lm_eval_task(name: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the task with its data in a file; its texts are those of lm-evaluation-harness."""
    file = folder / f"{name}.jsonl"
    common: dict[str, Any] = {
        "task": f"{name}_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        "num_fewshot": 0,
    }
    if name == "hellaswag":
        from lm_eval.tasks.hellaswag.utils import process_docs

        rows = [
            {key: row[key] for key in ("activity_label", "endings", "label")}
            | {"ctx_a": row["ctx"], "ctx_b": ""}
            for row in rows
        ]
        common |= {
            "output_type": "multiple_choice",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    elif name == "mmlu":
        rows = [
            {key: row[key] for key in ("subject", "question", "choices", "answer")} for row in rows
        ]
        common |= {
            "output_type": "multiple_choice",
            "doc_to_text": MMLU_TEXT,
            "doc_to_target": "answer",
            "doc_to_choice": lambda row: list("ABCDE"[: len(row["choices"])]),
            "metric_list": [{"metric": "acc"}],
        }
    else:
        benchmark = find_benchmark(name)
        assert isinstance(benchmark, QuestionBenchmark)
        rows = [{"text": benchmark.question(row), "expected": "-"} for row in rows]
        common |= {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{expected}}",
            "generation_kwargs": {"until": [], "max_gen_toks": MAX_TOKENS, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match"}],
        }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return common


def by_lm_eval(
    connection: service.Connection, task: dict[str, Any], folder: str
) -> list[dict[str, Any]]:
    """Return the samples of lm-evaluation-harness, in order."""
    import lm_eval

    sampled = task["output_type"] == "generate_until"
    path = "chat/completions" if sampled else "completions"
    args: dict[str, Any] = {
        "model": connection.model_name,
        "base_url": f"{connection.base_url}/oai/api/v1/{path}",
        "num_concurrent": 8,
        "tokenizer": folder,
    }
    found = lm_eval.simple_evaluate(
        model="local-chat-completions" if sampled else "local-completions",
        model_args=args,
        tasks=[task],
        apply_chat_template=sampled,
        bootstrap_iters=0,
    )
    assert found is not None
    return sorted(found["samples"][task["task"]], key=lambda row: row["doc_id"])


def by_inspect(client: Any, model: str, questions: list[str]) -> list[str]:
    """Return the replies of inspect-ai, in order."""
    from inspect_ai import Task, eval_async
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, Model
    from inspect_ai.solver import generate

    from tinker_cookbook.eval.inspect_utils import InspectAPIFromTinkerSampling

    settings = GenerateConfig(temperature=0.0, max_tokens=MAX_TOKENS)
    api = InspectAPIFromTinkerSampling(
        renderer_name=model_info.get_recommended_renderer_name(model),
        model_name=model,
        sampling_client=client,
        config=settings,
    )
    samples = [Sample(input=text, id=number) for number, text in enumerate(questions)]
    task = Task(dataset=MemoryDataset(samples), solver=generate())
    with tempfile.TemporaryDirectory() as folder:
        (log,) = asyncio.run(
            eval_async(task, model=Model(api=api, config=settings), log_dir=folder)
        )
        found = sorted(log.samples or (), key=lambda sample: int(sample.id))  # read from the file
    return [sample.output.completion for sample in found]


def main() -> None:
    """Run one benchmark everywhere, and print the agreement and the seconds."""
    name, count = sys.argv[1], int(sys.argv[2])
    others = sys.argv[3:] or ["lm-eval", "inspect"]
    benchmark = find_benchmark(name)
    with service.connect("local") as connection, tempfile.TemporaryDirectory() as folder:
        model = connection.model_name
        client = wait_for_client(
            connection.service_client().create_sampling_client(base_model=model)
        )
        os.environ["OPENAI_API_KEY"] = connection.api_key or ""
        config = BenchmarkConfig(
            max_examples=count,
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            system_prompt="",
            concurrency=16,
            save_dir=folder,
        )
        renderer = load_renderer(model_info.get_recommended_renderer_name(model), model)
        started = time.monotonic()
        result = asyncio.run(run_ours(name, client, renderer, config))
        print(f"ours: {result.score:.4f} in {time.monotonic() - started:.1f} s", flush=True)
        ours = sorted(load_trajectories(folder, name), key=lambda found: found.idx)
        rows = benchmark.data.load(config).rows[:count]  # pyright: ignore[reportAttributeAccessIssue]
        if "lm-eval" in others:
            started = time.monotonic()
            task = lm_eval_task(name, rows, Path(folder))
            samples = by_lm_eval(connection, task, str(resolve_model_folder(model)))
            print(f"lm-eval: {time.monotonic() - started:.1f} s", flush=True)
            compare(ours, samples, task["output_type"])
        if "inspect" in others and isinstance(benchmark, QuestionBenchmark):
            started = time.monotonic()
            questions = [benchmark.question(row) for row in rows]
            replies = by_inspect(client, model, questions)
            print(f"inspect: {time.monotonic() - started:.1f} s", flush=True)
            show_equal("inspect", [each.reply for each in ours], replies)


def compare(ours: list[Any], samples: list[dict[str, Any]], kind: str) -> None:
    """Print in how many questions lm-evaluation-harness found the same."""
    if kind == "generate_until":
        show_equal(
            "lm-eval", [each.reply for each in ours], [row["resps"][0][0] for row in samples]
        )
        return
    largest = 0.0
    for metric in ("acc", "acc_norm"):
        if metric in samples[0]:
            equal = sum(
                float(row[metric]) == each.metrics[metric]
                for each, row in zip(ours, samples, strict=True)
            )
            print(f"{metric}: {equal} of {len(ours)} equal")
    for each, row in zip(ours, samples, strict=True):
        mine = [turn.metadata["logprob"] for turn in each.turns[1:]]
        theirs = [float(response[0]) for response in row["filtered_resps"]]
        largest = max(largest, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
    print(f"largest difference of an ending's log probability: {largest:.2g}")


def show_equal(name: str, ours: list[str], theirs: list[str]) -> None:
    """Print how many replies are the same text."""
    equal = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {equal} of {len(ours)} replies equal")


if __name__ == "__main__":
    main()
