"""Rows of every shape in use: what they become, and what is trained of them, token by token."""

import datetime
import json
from decimal import Decimal
from typing import Any

import pytest

from tests.assets import tokenizer_folder
from tinker_cookbook.exceptions import DataError
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer
from tinker_cookbook.supervised.conversations import (
    NOTE_MOVED,
    Conversation,
    ConversationError,
    SourceRow,
    parse_row,
)
from tinker_cookbook.tokenizer_utils import get_tokenizer

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "find", "description": "Find.", "parameters": CITY}
CALL_OF_OSLO = ("find", '{"city": "Oslo"}')


def parse(row: Any, **options: Any) -> Conversation:
    return parse_row(SourceRow("chat.jsonl:12", json.dumps(row).encode()), **options)


def parse_table(row: dict[str, Any]) -> Conversation:
    return parse_row(SourceRow("chat.parquet row 12", row))


def refusal(row: Any, **options: Any) -> str:
    with pytest.raises(ConversationError, match=r"^chat\.jsonl:12: ") as info:
        parse(row, **options)
    return str(info.value).removeprefix("chat.jsonl:12: ")


def plain(conversation: Conversation) -> list[Any]:
    """Messages with calls as (name, arguments)."""
    messages = []
    for message in conversation.messages:
        calls = [(c.function.name, c.function.arguments) for c in message.get("tool_calls", [])]
        messages.append({**message, "tool_calls": calls} if calls else message)
    return messages


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5"])
def family(request) -> str:
    return request.param


def renderer_of(name: str) -> Any:
    folder = str(tokenizer_folder(name))
    name = name.removesuffix("_2507")
    return get_renderer(name, get_tokenizer(folder), model_name=folder)


def trained(row: Any, name: str = "qwen3", **options: Any) -> list[str]:
    """The trained runs of a row as text, over all of its datums."""
    renderer = renderer_of(name)
    [rendered] = ConversationRenderer(renderer, None, **options)(
        [SourceRow("chat.jsonl:12", json.dumps(row).encode())]
    )
    texts = []
    for datum in rendered.datums:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        on = datum.loss_fn_inputs["weights"].to_numpy() > 0
        runs: list[list[int]] = [[]]
        for target, is_on in zip(targets, on, strict=True):
            runs[-1].append(int(target)) if is_on else runs.append([])
        texts += [renderer.encoder.decode(run) for run in runs if run]
    return texts


# ---- messages, as OpenAI's interfaces write them ----


@pytest.mark.parametrize("value", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_a_list_or_json_text(key, value):
    assert parse({"messages": [USER, REPLY], key: value}).tools == [TOOL]


@pytest.mark.parametrize("value", [None, [], "", "  ", "[]", "null"])
def test_no_tools_in_every_spelling(value):
    assert parse({"messages": [USER, REPLY], "tools": value}).tools == []


def test_parameters_may_be_json_text():
    tool = TOOL | {"parameters": json.dumps(CITY)}
    assert parse({"messages": [USER, REPLY], "tools": [tool]}).tools == [TOOL]


@pytest.mark.parametrize("value", ["[{", "find", 3, {"name": "find"}])
def test_tools_that_are_no_list_are_refused_by_name(value):
    text = refusal({"messages": [USER, REPLY], "tools": value})
    assert text.startswith("tools is ")
    assert "JSON text of one" in text


@pytest.mark.parametrize("value", ["", None, "null", " ", {}, "{}"])
def test_a_call_without_arguments_in_every_spelling(value):
    call = {"function": {"name": "f", "arguments": value}}
    for calls in ([call], [{"function": {"name": "f"}}]):
        conversation = parse({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})
        assert plain(conversation)[1]["tool_calls"] == [("f", "{}")]


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_calls_may_stand_bare(key):
    calls = [{"id": "1", "name": "find", key: {"city": "Oslo"}}]
    conversation = parse({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})
    assert plain(conversation)[1]["tool_calls"] == [CALL_OF_OSLO]
    assert conversation.messages[1]["tool_calls"][0].id == "1"  # pyright: ignore


def test_the_function_of_a_call_and_of_a_tool_may_be_json_text():
    function = json.dumps({"name": "find", "arguments": {"city": "Oslo"}})
    calls = [{"type": "function", "function": function}]
    tools = [{"type": "function", "function": json.dumps(TOOL)}]
    messages = [USER, {"role": "assistant", "tool_calls": calls}]
    conversation = parse({"messages": messages, "tools": tools})
    assert plain(conversation)[1]["tool_calls"] == [CALL_OF_OSLO]
    assert conversation.tools == [TOOL]


@pytest.mark.parametrize(
    "value", [[], [1], 3, True, "[]", "x", '{"a": NaN}', {"a": float("nan")}, '"{}"']
)
def test_arguments_that_are_no_json_object_are_refused_by_place(value):
    calls = [{"function": {"name": "f", "arguments": value}}]
    text = refusal({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})
    assert text.startswith("arguments ")
    assert "an object" in text or "finite numbers" in text
    assert text.endswith("(messages[1].tool_calls[0].function.arguments)")


def test_a_table_with_values_that_json_does_not_have_is_refused_by_row():
    for value in (datetime.date(2020, 1, 1), b"x", Decimal("1.5")):
        calls = [{"function": {"name": "f", "arguments": {"a": value}}}]
        tools = [TOOL | {"parameters": {"default": value}}]
        messages = [USER, REPLY | {"tool_calls": calls}]
        for row in ({"messages": messages}, {"messages": [USER, REPLY], "tools": tools}):
            with pytest.raises(ConversationError, match=r"^chat\.parquet row 12: .* as JSON"):
                parse_table(row)


def test_roles_of_other_interfaces_are_read_and_counted():
    messages = [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "7"},
        REPLY,
    ]
    conversation = parse({"messages": messages, "parallel_tool_calls": False})
    assert plain(conversation) == [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [("f", "{}")]},
        {"role": "tool", "name": "f", "content": "7"},
        REPLY,
    ]
    for word in ("developer", "function is read as tool", "function_call", "parallel_tool_calls"):
        assert sum(word in note for note in conversation.notes) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_text", "text": "hello"},
        {"type": "output_text", "text": "hello", "annotations": []},
        {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "hello", "image": None},
        {"type": "refusal", "refusal": "hello"},
    ],
)
def test_parts_of_other_interfaces_are_text(part):
    conversation = parse({"messages": [USER, REPLY | {"content": [part]}]})
    assert conversation.messages[1]["content"] == [{"type": "text", "text": "hello"}]


def test_what_a_reply_of_the_api_has_besides_its_text():
    reply = REPLY | {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    assert parse({"messages": [USER, reply]}).messages == [USER, REPLY]
    refused = {"role": "assistant", "content": None, "refusal": "No."}
    assert parse({"messages": [USER, refused]}).messages[1]["content"] == "No."
    assert "'audio'" in refusal({"messages": [USER, REPLY | {"audio": {"id": "a"}}]})


@pytest.mark.parametrize(
    ("role", "meant"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("observation", "tool")],
)
def test_a_role_of_another_format_names_the_right_one(role, meant):
    text = refusal({"messages": [{"role": role, "content": "x"}]})
    assert text == (
        f"role {role!r} is unknown; use one of system, user, assistant, tool; "
        f"did you mean {meant!r}? (messages[0])"
    )
    assert parse({"messages": [{"role": meant, "content": "x"}]})


def test_hints_lead_on():
    text = refusal({"messages": [{"role": "user", "content": [{"type": "text", "value": "x"}]}]})
    assert "key 'value' is unknown" in text
    assert "rename it to 'text'" in text
    text = refusal({"messages": [{"from": "human", "value": "x"}]})
    assert "call the list of messages 'conversations'" in text
    assert parse({"conversations": [{"from": "human", "value": "x"}]}).messages == [
        {"role": "user", "content": "x"}
    ]


# ---- weights ----

TWO_TURNS = [
    USER,
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
]


def weighted(*weights: float | None) -> list[dict[str, Any]]:
    return [m | {"weight": w} for m, w in zip(TWO_TURNS, weights, strict=True)]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((None, None, None, None), ["one", "two"]),
        ((None, 1, None, 1), ["one", "two"]),
        ((None, 0, None, 1), ["two"]),
        ((0, 0.0, 0, None), ["two"]),
        ((None, 1, None, 0), ["one"]),
    ],
)
def test_replies_of_weight_0_are_not_trained(weights, expected):
    texts = trained({"messages": weighted(*weights)}, "qwen3_instruct_2507")
    assert texts == [f"{text}<|im_end|>" for text in expected]


def test_weights_go_with_the_modes_that_choose_messages():
    row = {"messages": weighted(None, 0, None, 1)}
    for mode in ("last_assistant_message", "last_assistant_turn", "all_assistant_messages"):
        texts = trained(row, "qwen3_instruct_2507", train_on_what=TrainOnWhat(mode))
        assert texts == ["two<|im_end|>"]
    texts = trained(row, "qwen3_instruct_2507", train_on_what=TrainOnWhat.ALL_MESSAGES)
    assert texts == ["hi<|im_end|>", "more<|im_end|>", "two<|im_end|>"]
    for mode in (TrainOnWhat.ALL_TOKENS, TrainOnWhat.CUSTOMIZED):
        with pytest.raises(DataError, match=r"chat\.jsonl:12: weight=0 .* train_on_what="):
            trained(row, "qwen3_instruct_2507", train_on_what=mode)


def test_weights_count_messages_behind_declared_tools():
    row = {"messages": weighted(None, 0, None, 1), "tools": [TOOL]}
    assert trained(row, "qwen3_instruct_2507") == ["two<|im_end|>"]
    with_system = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    assert trained(row | {"messages": with_system}, "qwen3_instruct_2507") == ["two<|im_end|>"]


def test_a_row_whose_replies_all_have_weight_0_is_refused():
    with pytest.raises(DataError, match=r"chat\.jsonl:12: every reply .* weight 0"):
        trained({"messages": weighted(None, 0, None, 0)})


def test_rows_with_and_without_weights_keep_their_places_in_a_batch():
    rows = [{"messages": TWO_TURNS}, {"messages": weighted(None, 0, None, 1)}, {"text": "fox"}]
    rows = [rows[i] for i in (1, 0, 2, 0, 1)]
    render = ConversationRenderer(renderer_of("qwen3_instruct_2507"), None)
    together = render([SourceRow("x", json.dumps(row).encode()) for row in rows])
    alone = [render([SourceRow("x", json.dumps(row).encode())])[0] for row in rows]
    counts = [row.num_trained_tokens for row in together]
    assert counts == [row.num_trained_tokens for row in alone]
    assert counts[1] == 2 * counts[0]


# ---- ShareGPT ----


def test_sharegpt_turns():
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "function_call", "value": '{"name": "find", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "59 N"},
            {"from": "gpt", "value": "At 59 N.", "weight": None},
        ],
        "tools": json.dumps([TOOL]),
    }
    conversation = parse(row)
    assert plain(conversation) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [("find", '{"city": "Oslo"}')]},
        {"role": "tool", "content": "59 N"},
        {"role": "assistant", "content": "At 59 N."},
    ]
    assert (conversation.shape, conversation.tools) == ("sharegpt", [TOOL])


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "find", "parameters": {"city": "Oslo"}}',
        '[{"type": "function", "function": {"name": "find", "arguments": {"city": "Oslo"}}}]',
        {"name": "find", "arguments": '{"city": "Oslo"}'},
        '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>',
    ],
)
@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
def test_a_call_of_sharegpt_keeps_its_arguments_in_every_spelling(speaker: str, value: Any):
    turns = [{"from": "human", "value": "Where?"}, {"from": speaker, "value": value}]
    [_, call] = plain(parse({"conversations": turns}))
    assert call == {"role": "assistant", "content": "", "tool_calls": [CALL_OF_OSLO]}


def test_what_a_call_of_sharegpt_holds_besides_is_refused():
    value = '{"name": "find", "kwargs": {"city": "Oslo"}}'
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": value}]
    text = refusal({"conversations": turns})
    assert text.startswith("key 'kwargs' is unknown; use type, id, index, function")
    assert text.endswith("(conversations[1].tool_calls[0])")


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_sharegpt_lists_may_hold_role_and_content(key):
    assert parse({key: [USER, REPLY]}).messages == [USER, REPLY]
    assert parse({key: json.dumps([USER, REPLY])}).messages == [USER, REPLY]


def test_hermes_calls_stand_as_markup_in_sharegpt():
    call = '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>'
    answer = "<tool_response>\n59 N\n</tool_response>"
    turns = [("human", "Where?"), ("gpt", call), ("tool", answer), ("gpt", "At 59 N.")]
    conversation = parse({"conversations": [{"from": f, "value": v} for f, v in turns]})
    messages = plain(conversation)
    assert messages[1]["tool_calls"] == [("find", '{"city": "Oslo"}')]
    assert messages[2] == {"role": "tool", "content": "59 N"}
    assert sorted(conversation.notes.values()) == [1, 1]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("hello", ["conversations is a string ('hello')", "list of messages"]),
        ([], ["conversations is empty"]),
        (["hello"], ["conversations[0] is a string"]),
        ([{"from": "bot", "value": "x"}], ["from 'bot' is unknown", "human", "conversations[0]"]),
        ([{"value": "x"}], ["from is missing"]),
        ([{"from": "human", "value": 5}], ["value is a number (5)", "conversations[0].value"]),
        ([{"from": "human"}], ["value is null", "use a string"]),
        ([{"from": "human", "value": " "}], ["user message is empty", "(conversations[0])"]),
        ([{"from": "human", "vale": "x"}], ["'vale' is unknown", "did you mean 'value'?"]),
        ([{"from": "function_call", "value": "find(1)"}], ["value is a string ('find(1)')"]),
        ([{"from": "function_call", "value": "[3]"}], ["is not a call", '"name"']),
        ([{"from": "gpt", "value": "x", "weight": 2}], ["weight is 2", "use 0 or 1"]),
    ],
)
def test_bad_sharegpt_rows_name_the_place(turns, words):
    text = refusal({"conversations": turns})
    for word in words:
        assert word in text


# ---- Alpaca ----


def test_alpaca_rows():
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "history": [["Hi", "Hello."]],
        "system": "Count.",
        "text": "Below is an instruction ...",
    }
    conversation = parse(row)
    assert conversation.messages == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Add.\n2 and 2"},
        {"role": "assistant", "content": "4"},
    ]
    assert (conversation.shape, conversation.unused) == ("alpaca", ("text",))


@pytest.mark.parametrize("source", [None, "", " "])
def test_alpaca_without_input(source):
    row = {"instruction": "Add.", "input": source, "output": "4", "history": []}
    assert parse(row).messages[0]["content"] == "Add."


def test_dolly_names_the_same_things_otherwise():
    row = {"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "qa"}
    assert [m["content"] for m in parse(row).messages] == ["Add.\n2 and 2", "4"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": 5}, ["instruction is a number (5)", "use a string"]),
        ({"input": ["x"]}, ["input is a list", "use a string"]),
        ({"output": ""}, ["assistant message is empty", "(output)"]),
        ({"output": 4}, ["output is a number (4)"]),
        ({"history": "x"}, ["history is a string ('x') that is not JSON"]),
        ({"history": [["x"]]}, ["history holds ['x']", "[question, answer]", "history[0]"]),
        ({"history": [["x", 3]]}, ["is a number (3)", "history[0][1]"]),
        ({"response": "5"}, ["'output' and 'response' are both in one row", "keep one"]),
    ],
)
def test_bad_alpaca_rows_name_the_field(change, words):
    text = refusal({"instruction": "Add.", "output": "4"} | change)
    for word in words:
        assert word in text


# ---- prompt and completion ----


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("prompt", "completion"), ("question", "answer"), ("query", "response")],
)
def test_prompt_and_completion_as_texts(prompt, completion):
    conversation = parse({prompt: "hi", completion: "hello", "id": 3})
    assert conversation.messages == [USER, REPLY]
    assert (conversation.shape, conversation.unused) == ("prompt_completion", ("id",))


def test_a_system_prompt_beside_a_question():
    row = {"system_prompt": "Be brief.", "question": "hi", "response": "hello"}
    assert parse(row).messages == [{"role": "system", "content": "Be brief."}, USER, REPLY]


def test_of_a_prompt_of_messages_no_reply_is_trained():
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    assert parse(row).messages == TWO_TURNS
    assert trained(row, "qwen3_instruct_2507") == ["two<|im_end|>"]
    everything = trained(row, "qwen3_instruct_2507", train_on_what=TrainOnWhat.ALL_MESSAGES)
    assert len(everything) == 4


def test_bad_prompts_name_the_field():
    assert "prompt is a number (5)" in refusal({"prompt": 5, "completion": "x"})
    assert "completion is empty" in refusal({"prompt": "x", "completion": []})
    text = refusal({"prompt": [{"role": "bot", "content": "x"}], "completion": "x"})
    assert "role 'bot' is unknown" in text
    assert "(prompt[0])" in text
    text = refusal({"prompt": "x", "question": "y", "answer": "z"})
    assert "'prompt' and 'question' are both in one row" in text


# ---- plain text ----


def test_plain_text_is_trained_whole_with_its_end():
    texts = trained({"text": "The fox jumps."})
    assert texts == [" fox jumps.<|im_end|>"]  # nothing precedes the first token
    mode = TrainOnWhat.LAST_ASSISTANT_MESSAGE
    assert trained({"text": "The fox jumps."}, train_on_what=mode) == texts


def test_text_with_the_marks_of_a_chat_format_keeps_them():
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert trained({"text": text}) == [text.removeprefix("<|im_start|>")]


def test_a_document_starts_where_the_tokenizer_says_so():
    renderer = renderer_of("llama3")
    render = ConversationRenderer(renderer, None)
    for text in ("The fox", "<|begin_of_text|>The fox"):
        [row] = render([SourceRow("x", json.dumps({"text": text}).encode())])
        tokens = row.datums[0].model_input.to_ints()
        assert renderer.encoder.decode(tokens) == "<|begin_of_text|>The fox"
        assert row.num_trained_tokens == len(tokens)


def test_bad_texts_name_the_field():
    assert "text is empty" in refusal({"text": "  "})
    assert "text is a number (5)" in refusal({"text": 5})


# ---- tables ----


def test_null_members_of_a_table_are_no_arguments_and_no_properties():
    properties = {"city": {"type": "string", "enum": None}, "a": None, "b": None}
    schema = {"type": "object", "properties": properties, "required": ["city"]}
    arguments = {"city": "Oslo", "a": None, "deep": {"x": None, "y": [None, 1]}}
    call = {"function": {"name": "find", "arguments": arguments}, "id": None}
    row = {
        "messages": [
            USER | {"tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": TOOL | {"parameters": schema}}],
    }
    conversation = parse_table(row)
    [(name, text)] = plain(conversation)[1]["tool_calls"]
    assert (name, json.loads(text)) == ("find", {"city": "Oslo", "deep": {"y": [None, 1]}})
    assert conversation.tools[0]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }


def test_null_arguments_of_a_json_file_are_as_written():
    call = {"function": {"name": "find", "arguments": {"city": None}}}
    conversation = parse({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert plain(conversation)[1]["tool_calls"] == [("find", '{"city": null}')]


def test_cells_hold_lists_as_json_text():
    row = {"messages": json.dumps([USER, REPLY]), "tools": json.dumps([TOOL])}
    conversation = parse_table(row)
    assert (conversation.messages, conversation.tools) == ([USER, REPLY], [TOOL])
    text = refusal({"messages": str([USER, REPLY])})
    assert "messages is a string" in text
    assert "json.dumps" in text


# ---- markup in replies ----

THOUGHT = "<think>\nadd\n</think>\n\n4"
CALL = '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_reasoning_in_a_replys_text_trains_the_block_of_the_format(family):
    renderer = renderer_of(family)
    row = {"messages": [USER, {"role": "assistant", "content": THOUGHT}]}
    [rendered] = ConversationRenderer(renderer, None)([SourceRow("x", json.dumps(row).encode())])
    [datum] = rendered.datums
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    tokens = targets[datum.loss_fn_inputs["weights"].to_numpy() > 0].tolist()
    structured = {"role": "assistant", "content": "4", "reasoning_content": "add"}
    assert trained(row, family) == trained({"messages": [USER, structured]}, family)
    if family == "qwen3":
        assert tokens == [151667, 198, 718, 198, 151668, 271, 19, 151645]
    assert len(tokens) in (6, 8), "tags are one token each, not letters"


def test_markup_is_converted_in_every_turn_and_counted():
    first = {"role": "assistant", "content": f"<think>\nlook\n</think>\n\n{CALL}"}
    answer = {"role": "tool", "content": "59 N"}
    conversation = parse({"messages": [USER, first, answer, REPLY | {"content": THOUGHT}]})
    messages = plain(conversation)
    assert messages[1]["content"] == [{"type": "thinking", "thinking": "look"}]
    assert messages[1]["tool_calls"] == [("find", '{"city": "Oslo"}')]
    assert messages[3]["content"][0] == {"type": "thinking", "thinking": "add"}
    assert sum(conversation.notes.values()) == 3


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": THOUGHT}]},
    {"instruction": "hi", "output": THOUGHT},
    {"prompt": "hi", "completion": THOUGHT},
])  # fmt: skip
def test_markup_is_converted_in_every_shape(row):
    assert parse(row).messages[1]["content"] == [
        {"type": "thinking", "thinking": "add"},
        {"type": "text", "text": "4"},
    ]


def test_untyped_calls_in_markup_have_the_types_of_the_declared_tools():
    text = "<tool_call>\n<function=find>\n<parameter=city>\n90210\n</parameter>\n</function>\n"
    row = {"messages": [USER, REPLY | {"content": f"{text}</tool_call>"}], "tools": [TOOL]}
    assert plain(parse(row))[1]["tool_calls"] == [("find", '{"city": "90210"}')]


def test_markup_is_refused_or_kept_if_asked():
    row = {"messages": [USER, {"role": "assistant", "content": THOUGHT}]}
    text = refusal(row, markup="refuse")
    assert text.startswith("<think> is in the text of a reply")
    assert text.endswith("(messages[1])")
    kept = parse(row, markup="keep")
    assert kept.messages[1]["content"] == THOUGHT
    assert list(kept.notes) == ["<think> or <tool_call> stays text in a reply, trained as letters"]
    in_code = {"messages": [USER, {"role": "assistant", "content": "Write `<think>`."}]}
    for markup in ("convert", "refuse", "keep"):
        assert not parse(in_code, markup=markup).notes


def test_a_format_without_reasoning_says_how_to_keep_the_text():
    with pytest.raises(DataError, match=r"chat\.jsonl:12: .*thinking.*markup=keep"):
        trained({"messages": [USER, {"role": "assistant", "content": THOUGHT}]}, "smollm2")
    kept = trained(
        {"messages": [USER, {"role": "assistant", "content": THOUGHT}]}, "smollm2", markup="keep"
    )
    assert kept == [f"{THOUGHT}<|im_end|>"]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_prompt_and_a_completion_may_be_json_text_of_messages(system):
    row = {"prompt": json.dumps([*system, USER]), "completion": json.dumps([REPLY])}
    conversation = parse(row)
    assert conversation.messages == [*system, USER, REPLY]
    assert conversation.num_context == len(system) + 1


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "[x", '[{"role": "king"}]', '[{"a": 1}, "b"]'])
def test_a_prompt_that_is_json_of_something_else_stays_text(text):
    conversation = parse({"prompt": text, "completion": text})
    assert [message["content"] for message in conversation.messages] == [text, text]


def test_a_reply_of_an_empty_block_alone_is_refused_as_an_empty_one():
    text = refusal({"messages": [USER, REPLY | {"content": "<think>\n\n</think>\n\n"}]})
    assert text.startswith("content of the assistant message is empty")


@pytest.mark.parametrize("content", ["<thinking>add</thinking>4", "<TOOL_CALL>f</TOOL_CALL>"])
def test_tags_that_are_like_markup_are_counted(content):
    row = {"messages": [USER, REPLY | {"content": content}]}
    assert parse(row).messages[1]["content"] == content
    [note] = parse(row).notes
    assert "stays text" in note
    assert "is in the text of a reply" in refusal(row, markup="refuse")


@pytest.mark.parametrize(
    ("content", "count"), [("<think>a</think>4\n<think>b</think>\n5", 1), ("<think>a</think>4", 0)]
)
def test_reasoning_behind_text_is_counted(content, count):
    conversation = parse({"messages": [USER, REPLY | {"content": content}]})
    assert conversation.notes[NOTE_MOVED] == count


@pytest.mark.parametrize("row", [USER, {"from": "human", "value": "hi"}])
def test_a_row_that_is_one_message_is_told_so(row):
    assert "the row is one message" in refusal(row)
