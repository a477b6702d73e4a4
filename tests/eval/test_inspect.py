"""The bridge to inspect-ai: messages, stop reasons, stop lists, tools, and a task as evaluator."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
)
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate
from inspect_ai.tool import ToolCall, ToolInfo, ToolParams

from tests.conftest import ServiceProcess
from tests.eval.benchmarks.scripted import CUT, ScriptedClient
from tests.tiny_models import tiny_model
from tinker_cookbook.eval.inspect_evaluators import InspectEvaluatorBuilder
from tinker_cookbook.eval.inspect_utils import (
    InspectAPIFromTinkerSampling,
    convert_inspect_messages,
)
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.utils.sdk_compat import create_client

# Of tenacity, which inspect-ai calls with a name that newer versions have replaced.
pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning")
TOOL = ToolInfo(name="add", description="Adds.", parameters=ToolParams())


class KeepingClient(ScriptedClient):
    """Also keeps the sampling settings."""

    params: Any = None

    async def sample(self, *, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
        self.params = sampling_params
        return await super().sample(
            prompt=prompt, num_samples=num_samples, sampling_params=sampling_params
        )


def model(*replies: str, renderer: str = "chatml", **options: Any) -> tuple[Model, KeepingClient]:
    client = KeepingClient(lambda prompt, call: replies)
    api = InspectAPIFromTinkerSampling(
        renderer_name=renderer,
        model_name=str(tiny_model(tied=False)),
        sampling_client=client,  # pyright: ignore[reportArgumentType]
        **options,
    )
    return Model(api=api, config=GenerateConfig()), client


def ask(target: Model, *, tools: tuple[ToolInfo, ...] = (), **config: Any) -> Any:
    return asyncio.run(target.generate("Hi", tools=tools, config=GenerateConfig(**config)))


def test_the_reason_of_the_end_is_passed_on() -> None:
    target, client = model("one", f"two{CUT}")
    output = ask(target, num_choices=2, max_tokens=9, seed=3, top_k=5)
    assert [choice.stop_reason for choice in output.choices] == ["stop", "max_tokens"]
    assert [choice.message.text for choice in output.choices] == ["one", "two"]
    assert (client.params.max_tokens, client.params.seed, client.params.top_k) == (9, 3, 5)
    assert output.usage.total_tokens == output.usage.input_tokens + output.usage.output_tokens


def test_the_stop_list_of_a_task_ends_the_reply() -> None:
    target, _ = model(f"one END two{CUT}")
    output = ask(target, stop_seqs=["END", "two"])
    assert (output.completion, output.choices[0].stop_reason) == ("one ", "stop")


def test_messages_with_images_tools_and_reasoning_are_converted() -> None:
    call = ToolCall(id="c1", function="add", arguments={"a": 1})
    found = convert_inspect_messages(
        [
            ChatMessageSystem(content="Be short."),
            ChatMessageUser(
                content=[ContentText(text="What?"), ContentImage(image="data:image/png;base64,AA")]
            ),
            ChatMessageAssistant(
                content=[ContentReasoning(reasoning="Hm."), ContentText(text="Wait")],
                tool_calls=[call],
            ),
            ChatMessageTool(content="2", tool_call_id="c1", function="add"),
        ]
    )
    assert found[0] == {"role": "system", "content": "Be short."}
    assert found[1]["content"][1] == {"type": "image", "image": "data:image/png;base64,AA"}
    assert found[2]["content"][0] == {"type": "thinking", "thinking": "Hm."}
    (made,) = found[2].get("tool_calls", [])
    assert (made.id, made.function.name, made.function.arguments) == ("c1", "add", '{"a": 1}')
    assert (found[3].get("tool_call_id"), found[3].get("name")) == ("c1", "add")


def test_tools_are_declared_and_calls_are_returned() -> None:
    reply = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    target, client = model(reply, renderer="qwen3_instruct")
    output = ask(target, tools=(TOOL,))
    (made,) = output.message.tool_calls
    assert (made.function, made.arguments) == ("add", {"a": 1})
    assert output.choices[0].stop_reason == "tool_calls"
    assert "Adds." in client.requests[0][0]


def test_the_reasoning_is_left_out_unless_asked_for() -> None:
    parsed: Message = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "4"}],
    }
    for asked, kinds in ((False, None), (True, ["reasoning", "text"])):
        target, _ = model(include_reasoning=asked)
        api: Any = target.api
        content = api._content(parsed, "4")
        assert (content == "4") if kinds is None else ([part.type for part in content] == kinds)


@pytest.mark.anyio
async def test_a_task_runs_on_a_checkpoint(
    service_client, local_service: ServiceProcess, tmp_path
) -> None:
    run = await asyncio.to_thread(
        service_client.create_lora_training_client(base_model=local_service.model, rank=2).result
    )
    path = (await asyncio.to_thread(run.save_weights_for_sampler("one").result)).path
    client = await create_client(service_client.create_sampling_client, model_path=path)
    samples = [Sample(input=f"What is {n} + 1?", target=str(n + 1)) for n in range(3)]
    tasks = [
        Task(
            dataset=MemoryDataset(samples, name="sums"),
            solver=generate(),
            scorer=[match(), includes()],
            name=name,
        )
        for name in ("first", "second")
    ]
    builder = InspectEvaluatorBuilder(
        tasks=tasks,
        renderer_name="chatml",
        model_name=local_service.model,
        temperature=0.0,
        max_tokens=5,
        log_dir=str(tmp_path),
        log_level="warning",
    )
    metrics = await builder()(client)
    assert set(metrics) == {
        f"{name}/{metric}"
        for name in ("sums", "second")
        for metric in ("accuracy", "stderr", "includes/accuracy", "includes/stderr")
    }
    logs = [read_eval_log(str(path)) for path in tmp_path.iterdir()]
    reasons = {sample.output.choices[0].stop_reason for log in logs for sample in log.samples or ()}
    assert reasons == {"max_tokens"}


def test_the_model_is_registered_under_its_name() -> None:
    from inspect_ai._util.registry import registry_info

    target, _ = model("x")
    assert SimpleNamespace(**registry_info(target.api).model_dump()).name.endswith(
        "tinker-sampling"
    )
