"""Formats end to end: a model learns some conversations by heart, and its samples parse to them.

A small random model with the family's own tokenizer trains through the toolkit's supervised loop
on a local service. Then each trained reply is sampled from the renderer's prompt with its stop
sequences, parsed, and must be the message of the data: text, reasoning, and calls with types.
"""

# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.assets import tokenizer_folder
from tests.conftest import ServiceProcess
from tinker_cookbook.renderers import Message, Renderer, load_renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.conversation_file import ConversationFile
from tinker_cookbook.supervised.conversations import parse_row
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils.sdk_compat import wait_for_client

FIND = {
    "name": "find",
    "description": "Find a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "zip": {"type": "string"},
            "limit": {"type": "integer"},
            "deep": {"type": "object"},
        },
    },
}
ARGUMENTS = {"zip": "3011", "limit": 5, "deep": {"ö": [1.5, None, True]}}


def reply(text: str, thinking: str | None, calls: list[dict[str, Any]] | None = None) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": "functions.find:0", "type": "function", "function": call} for call in calls
        ]
    return message


def conversations(*, thinks: bool) -> list[dict[str, Any]]:
    """A call and the answer to its result, an answer after thought, and a plain one."""
    thoughts = ("A zip code:\nlook it up.", "Found.", "Zwölf × 2 …") if thinks else (None,) * 3
    call = {"name": "find", "arguments": ARGUMENTS}
    looked_up = [
        {"role": "user", "content": "Where is 3011?"},
        reply("", thoughts[0], [call]),
        {"role": "tool", "content": "Bern", "tool_call_id": "functions.find:0", "name": "find"},
        reply("It is Bern. 🐻", thoughts[1]),
    ]
    thought = [{"role": "user", "content": "2 × 12?"}, reply("24\n\n- done", thoughts[2])]
    plain = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Sky?"},
        reply("Blue", None),
    ]
    return [{"messages": looked_up, "tools": [FIND]}, {"messages": thought}, {"messages": plain}]


def model_folder(folder: Path, tokenizer_name: str, stop: int) -> Path:
    """A random model of 128 dimensions that reads and writes a family's tokens."""
    from safetensors.numpy import save_file

    shutil.copytree(tokenizer_folder(tokenizer_name), folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = [*vocabulary["model"]["vocab"].values(), *(t["id"] for t in vocabulary["added_tokens"])]
    named = {"<|endoftext|>": 0, "<|im_end|>": stop}
    config = tiny_models._config("qwen3", max(ids) + 1, named, tied=True, num_layers=2)
    config |= {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    tensors = tiny_models._weights(config, seed=0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _values(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def as_dict(message: Message, renderer: Renderer) -> dict[str, Any]:
    """What a message says, calls by name and by the values of their arguments."""
    reasoning, text = split_reasoning(message)
    calls = [
        renderer.to_openai_message(message)["tool_calls"][i]["function"]
        for i in range(len(message.get("tool_calls") or []))
    ]
    return {
        "thinking": reasoning,
        "text": text,
        "calls": [(call["name"], _values(call["arguments"])) for call in calls],
        "unparsed": message.get("unparsed_tool_calls", []),
    }


def train_on(path: Path, model: Path, renderer_name: str, num_epochs: int) -> train.RunResult:
    num_rows = len(path.read_text().splitlines())
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(model),
        renderer_name=renderer_name,
        max_length=1024,
        batch_size=num_rows,
    )
    config = train.Config(
        log_path=str(path.parent / "run"),
        model_name=str(model),
        renderer_name=renderer_name,
        dataset_builder=FromConversationFileBuilder(common_config=common, file_path=str(path)),
        learning_rate=5e-3,
        lora_rank=32,
        num_epochs=num_epochs,
        save_every=0,
    )
    return asyncio.run(train.main(config))


# Of each its tokenizer, whether it thinks, whether it has tools, and the epochs it takes.
FAMILIES = [
    ("qwen3_5", "qwen3_5", True, True, 45),
    ("llama3_1", "llama3_1", False, True, 150),
    ("smollm2", "smollm2", False, False, 150),
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "tokenizer", "thinks", "has_tools", "num_epochs"), FAMILIES)
def test_what_was_learnt_is_sampled_and_parsed(
    name: str,
    tokenizer: str,
    thinks: bool,
    has_tools: bool,
    num_epochs: int,
    tmp_path: Path,
    service_factory: Callable[..., ServiceProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = conversations(thinks=thinks)[0 if has_tools else 1 :]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    stop = load_renderer(name, str(tokenizer_folder(tokenizer))).get_stop_sequences()[0]
    model_folder(model, tokenizer, int(stop))
    renderer = load_renderer(name, str(model))
    service = service_factory(model)
    monkeypatch.setenv("TINKER_BASE_URL", service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", service.api_key)
    result = train_on(path, model, name, num_epochs)
    metrics = (path.parent / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(x)["train_mean_nll"] for x in metrics if "train_mean_nll" in x]
    print(f"\n{name}: {len(losses)} steps, loss {losses[0]:.2f} -> {losses[-1]:.4f}", end=", ")
    assert result.sampler_path
    client = service.connect()
    sampler = wait_for_client(client.create_sampling_client(model_path=result.sampler_path))
    sampled = 0
    for row in ConversationFile(str(path)).rows(range(len(rows))):
        conversation = parse_row(row)
        messages = renderer.declare_tools(conversation.messages, conversation.tools)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            got = sample(sampler, renderer, messages[:index])
            got = renderer.fit_tool_calls(got, conversation.tools)
            assert as_dict(got, renderer) == as_dict(message, renderer)
            sampled += 1
    client.close("success").result()
    print(f"{sampled} replies equal")
    assert sampled == sum(m["role"] == "assistant" for row in rows for m in row["messages"])


def sample(sampler: Any, renderer: Renderer, messages: list[Message]) -> Message:
    """Sample greedily to a stop sequence and parse."""
    import tinker

    params = tinker.SamplingParams(
        max_tokens=200, temperature=0.0, stop=renderer.get_stop_sequences()
    )
    prompt = renderer.build_generation_prompt(messages)
    tokens = sampler.sample(prompt, 1, params).result().sequences[0].tokens
    message, termination = renderer.parse_response(tokens)
    assert termination.is_stop_sequence, renderer.encoder.decode(list(tokens))
    return message
