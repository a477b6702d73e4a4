"""Datasets: batches depend on (seed, index) alone, whoever renders them, and no row gets lost."""

# pyright: reportAbstractUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import gzip
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tinker
import tokenizers

from tests.tiny_models import tiny_model
from tinker_cookbook.exceptions import ConfigurationError, DataError, DataValidationError
from tinker_cookbook.renderers import (
    TrainOnWhat,
    get_renderer,
    register_renderer,
    unregister_renderer,
)
from tinker_cookbook.supervised import (
    ChatDatasetBuilderCommonConfig,
    FromConversationFileBuilder,
    HFDatasetSource,
    InterleavedChatDatasetBuilder,
    StreamingSupervisedDatasetFromHFDataset,
    SupervisedDataset,
    SupervisedDatasetFromHFDataset,
    conversation_to_datum,
    conversation_to_datums,
)
from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer
from tinker_cookbook.supervised.lazy_dataset import LazyDataset, default_num_workers, shuffled
from tinker_cookbook.tokenizer_utils import get_tokenizer


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": "say it"}, {"role": "assistant", "content": text}]


def write_rows(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"messages": messages(text)}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def common_config(**options) -> ChatDatasetBuilderCommonConfig:
    defaults = {
        "model_name_for_tokenizer": str(tiny_model()),
        "renderer_name": "chatml",
        "max_length": None,
        "batch_size": 4,
    }
    return ChatDatasetBuilderCommonConfig(**(defaults | options))


def build(path: Path, **options):
    names = ("test_size", "shuffle_seed", "num_workers", "drop_last", "markup", "mix_until")
    own = {name: options.pop(name) for name in names if name in options}
    return FromConversationFileBuilder(
        common_config=common_config(**options), file_path=str(path), **own
    )()


def build_train(path: Path, **options) -> LazyDataset:
    train, _ = build(path, **options)
    assert isinstance(train, LazyDataset)
    return train


@pytest.fixture(scope="module")
def renderer():
    folder = str(tiny_model())
    return get_renderer("chatml", get_tokenizer(folder), model_name=folder)


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "chat.jsonl", [f"reply {i}" for i in range(30)])


def content(datum: tinker.Datum) -> tuple:
    inputs = datum.loss_fn_inputs
    return (
        tuple(datum.model_input.to_ints()),
        inputs["target_tokens"].to_numpy().tobytes(),
        inputs["weights"].to_numpy().tobytes(),
    )


def replies(batch: list[tinker.Datum]) -> list[str]:
    """The trained text of every datum."""
    tokenizer = get_tokenizer(str(tiny_model()))
    texts = []
    for datum in batch:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        trained = targets[datum.loss_fn_inputs["weights"].to_numpy() > 0]
        texts.append(str(tokenizer.decode(trained)).removesuffix("<|im_end|>"))
    return texts


def epoch_replies(dataset: SupervisedDataset) -> list[str]:
    return [text for i in range(len(dataset)) for text in replies(dataset.get_batch(i))]


def test_every_row_is_trained_or_held_out_and_none_is_both(chat_file):
    train, test = build(chat_file, test_size=6)
    assert test is not None
    held_out = epoch_replies(test)
    assert (len(train), len(test), len(held_out)) == (6, 1, 6)
    train.set_epoch(0)
    assert sorted(epoch_replies(train) + held_out) == sorted(f"reply {i}" for i in range(30))


def test_the_split_depends_on_the_shuffle_seed_alone(chat_file):
    def held_out(**options) -> list[str]:
        test = build(chat_file, test_size=6, **options)[1]
        return epoch_replies(test)

    assert held_out() == held_out(batch_size=2)
    assert held_out() != held_out(shuffle_seed=1)


def test_rows_come_in_the_order_of_hugging_face_shuffle(chat_file):
    import datasets

    rows = datasets.Dataset.from_dict({"i": list(range(30))}).shuffle(seed=3)
    train_rows = rows.select(range(5, 30))
    train = build_train(chat_file, test_size=5, shuffle_seed=3, batch_size=5)
    assert epoch_replies(train) == [f"reply {i}" for i in train_rows["i"]]
    train.set_epoch(7)
    assert epoch_replies(train) == [f"reply {i}" for i in train_rows.shuffle(seed=7)["i"]]


def test_epochs_differ_and_the_same_seed_repeats(chat_file):
    train = build_train(chat_file)
    orders = []
    for seed in (0, 1, 0):
        train.set_epoch(seed)
        orders.append(epoch_replies(train))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == sorted(f"reply {i}" for i in range(30)), "every row comes once"


def test_rows_that_do_not_fill_the_last_batch_are_trained_or_named(chat_file):
    train = build_train(chat_file)
    train.set_epoch(3)
    assert [len(train.get_batch(i)) for i in range(len(train))] == [4] * 7 + [2]
    assert train.summary[-1] == "last batch of an epoch: 2 of 4 rows"
    whole = build_train(chat_file, drop_last=True)
    whole.set_epoch(3)
    assert epoch_replies(whole) == epoch_replies(train)[:28]
    assert whole.summary[-1] == "2 of 30 rows left out in an epoch: no full batch of 4"
    assert not any("batch" in line for line in build_train(chat_file, batch_size=5).summary)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_batch_is_the_same_after_a_resume_and_from_workers(chat_file, num_workers):
    reference = build_train(chat_file, num_workers=0)
    reference.set_epoch(5)
    expected = [list(map(content, reference.get_batch(i))) for i in range(len(reference))]
    resumed = build_train(chat_file, num_workers=num_workers)
    resumed.set_epoch(5)
    assert [list(map(content, resumed.get_batch(i))) for i in range(4, 8)] == expected[4:]
    assert list(map(content, resumed.get_batch(1))) == expected[1]
    resumed.close()


def test_batches_ahead_are_forgotten_at_a_new_epoch(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [f"reply {i}" for i in range(40)])
    dataset = build_train(path, num_workers=1)
    reference = build_train(path, num_workers=0)
    for seed, index in ((0, 0), (1, 1), (0, 2), (0, 9)):
        dataset.set_epoch(seed)
        reference.set_epoch(seed)
        assert replies(dataset.get_batch(index)) == replies(reference.get_batch(index))
    dataset.close()


def test_gzip_gives_the_same_batches(chat_file, tmp_path):
    packed = tmp_path / "chat.jsonl.gz"
    packed.write_bytes(gzip.compress(chat_file.read_bytes()))
    assert epoch_replies(build_train(packed)) == epoch_replies(build_train(chat_file))


def test_datums_are_what_conversation_to_datum_makes(chat_file, renderer):
    train = build_train(chat_file, max_length=40)
    index = int(train.row_indices(0)[0])
    expected = conversation_to_datum(messages(f"reply {index}"), renderer, 40)  # type: ignore[arg-type]
    assert content(train.get_batch(0)[0]) == content(expected)
    assert expected.loss_fn_inputs["weights"].to_numpy().sum() == pytest.approx(1.0)


def test_a_large_file_is_checked_in_places_on_opening(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", ["ok"] * 1000)
    padding = '{"messages": "wrong"' + " " * 40_000 + "}\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" + padding * 1000)  # 40 MB: beyond what is parsed on opening
    with pytest.raises(DataError, match=r"chat\.jsonl:\d+: messages is a string"):
        build(path)  # the spread of parsed rows meets one of so many


def test_a_row_without_a_reply_is_refused_on_opening(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", ["ok"] * 40)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('\n{"messages": [{"role": "user", "content": "no reply"}]}')
    with pytest.raises(DataError, match=r"chat\.jsonl:41: messages has no assistant turn"):
        build(path)
    build(path, train_on_what=TrainOnWhat.ALL_MESSAGES)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_met_while_training_names_its_line(tmp_path, renderer, num_workers):
    path = write_rows(tmp_path / "chat.jsonl", [f"reply {i}" for i in range(40)])
    lines = path.read_text().splitlines()
    lines[10] = json.dumps({"messages": [messages("x")[0], messages("x")[1] | {"weight": 0}]})
    path.write_text("\n".join(lines))
    train = build_train(path, num_workers=num_workers)
    (position,) = np.flatnonzero(train._order == 10)  # type: ignore[arg-type]
    bad_batch = int(position) // 4
    for index in range(len(train)):
        if index != bad_batch:
            assert len(train.get_batch(index)) == 4
            continue
        with pytest.raises(DataError, match=r"chat\.jsonl:11: .* has weight 0"):
            train.get_batch(index)
    train.close()


@pytest.mark.parametrize(
    ("last", "mode", "words"),
    [
        ({"role": "user", "content": "x"}, "last_assistant_message", "last message is from 'user'"),
        ({"role": "user", "content": "x"}, "customized", "train_on_what=customized needs"),
        ({"role": "tool", "content": "x"}, "last_assistant_message", "last message is from 'tool'"),
    ],
)
def test_rows_that_train_nothing_are_refused_with_the_reason(tmp_path, last, mode, words):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [*messages("a"), last]}))
    train = build_train(path, batch_size=1, train_on_what=TrainOnWhat(mode))
    with pytest.raises(DataError, match=rf"chat\.jsonl:1: .*{words}"):
        train.get_batch(0)


def test_rows_cut_before_their_reply_stay_with_weight_zero_and_are_reported(tmp_path, caplog):
    path = write_rows(tmp_path / "chat.jsonl", ["x", "y" * 50])
    train = build_train(path, batch_size=2, max_length=4)
    with caplog.at_level(logging.WARNING):
        batch = train.get_batch(0)
    assert [datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in batch] == [0, 0]
    assert train.counts == {
        "rows": 2,
        "datums": 2,
        "truncated_rows": 2,
        "rows_without_trained_tokens": 2,
    }
    assert "2 of the 2 rows of batch 0 are cut before their first trained token" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 31}, "batch_size=31 is more than the 30 training rows"),
        ({"batch_size": 25, "test_size": 6}, "24 training rows of .* after 6 were held out"),
        ({"test_size": 30}, "test_size=30 does not fit the 30 rows"),
        ({"test_size": -1}, "test_size=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"renderer_name": "chatm"}, "chatml"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chat_file, options, message):
    with pytest.raises(ValueError, match=message):
        build(chat_file, **options)


@pytest.mark.parametrize("index", [-1, 8, 1000])
def test_batches_outside_the_epoch_are_refused(chat_file, index):
    with pytest.raises(DataValidationError, match="has 8 batches of 4 rows"):
        build_train(chat_file).get_batch(index)


def test_renderers_registered_in_this_process_are_used_here_only(chat_file, caplog):
    class Shouting(type(get_renderer("chatml", get_tokenizer(str(tiny_model()))))):
        pass

    register_renderer("chatml_here", lambda tokenizer, image_processor: Shouting(tokenizer))
    try:
        train = build_train(chat_file, renderer_name="chatml_here", num_workers=2)
        train.get_batch(0)
    finally:
        unregister_renderer("chatml_here")
    assert train.worker_pids == []
    assert "registered in this process" in caplog.text


def test_small_files_start_no_processes():
    assert default_num_workers(4999) == 0
    assert 1 <= default_num_workers(5000) <= 4


def test_conversation_renderers_are_small_to_send(renderer):
    assert len(pickle.dumps(ConversationRenderer(renderer, 100))) < 1000


# ---- formats that rewrite history ----


def thought(thinking: str, text: str) -> dict:
    parts = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": text}]
    return {"role": "assistant", "content": parts}


THINKING = [
    {"role": "user", "content": "one"},
    thought("hm", "1"),
    {"role": "user", "content": "two"},
    thought("ah", "2"),
]


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory) -> str:
    """The tiny model's tokenizer with the control tokens of Qwen3."""
    folder = tmp_path_factory.mktemp("thinking")
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))
    names = ("think", "tool_call", "tool_response")
    tokenizer.add_tokens([token for name in names for token in (f"<{name}>", f"</{name}>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def thinking_renderer(thinking_model):
    return get_renderer("qwen3", get_tokenizer(thinking_model), model_name=thinking_model)


def test_one_datum_for_each_turn_where_the_format_rewrites_history(thinking_renderer):
    datums = conversation_to_datums(THINKING, thinking_renderer, None)  # type: ignore[arg-type]
    assert len(datums) == 2
    first, second = (
        str(thinking_renderer.tokenizer.decode(d.model_input.to_ints())) for d in datums
    )
    assert "hm" in first
    assert "two" not in first
    assert "hm" not in second
    assert "ah" in second


def test_a_conversation_weighs_one_however_many_datums_it_takes(thinking_renderer):
    datums = conversation_to_datums(THINKING, thinking_renderer, None)  # type: ignore[arg-type]
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in datums]
    assert sum(w.sum() for w in weights) == pytest.approx(1.0)
    values = {round(float(v), 6) for w in weights for v in w if v}
    assert len(values) == 1, "every trained token of the conversation weighs the same"
    plain = conversation_to_datums(THINKING, thinking_renderer, None, reduction="none")  # type: ignore[arg-type]
    assert {float(v) for d in plain for v in d.loss_fn_inputs["weights"].tolist()} == {0.0, 1.0}


def test_datums_cut_before_their_turn_are_left_out(thinking_renderer):
    whole = conversation_to_datums(THINKING, thinking_renderer, None)  # type: ignore[arg-type]
    first_length = whole[0].model_input.length + 1
    datums = conversation_to_datums(THINKING, thinking_renderer, first_length)  # type: ignore[arg-type]
    assert len(datums) == 1
    assert datums[0].model_input == whole[0].model_input
    assert datums[0].loss_fn_inputs["weights"].to_numpy().sum() == pytest.approx(1.0)


def test_the_single_datum_is_refused_with_the_way_out(thinking_renderer):
    with pytest.raises(DataValidationError, match=r"needs 2 datums.*conversation_to_datums"):
        conversation_to_datum(THINKING, thinking_renderer, None)  # type: ignore[arg-type]
    conversation_to_datum(
        THINKING,  # type: ignore[arg-type]
        thinking_renderer,
        None,
        train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    )


def test_a_batch_holds_all_datums_of_its_conversations(tmp_path, thinking_model):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps({"messages": THINKING})] * 4))
    train = build_train(
        path, model_name_for_tokenizer=thinking_model, renderer_name="qwen3", batch_size=2
    )
    assert (len(train), len(train.get_batch(0))) == (2, 4)


# ---- Hugging Face datasets ----


def hf_rows(count: int):
    import datasets

    return datasets.Dataset.from_dict({"number": list(range(1, count + 1))})


def number_datum(row: dict) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints([row["number"]]))


def numbers(batch: list[tinker.Datum]) -> list[int]:
    return [datum.model_input.to_ints()[0] for datum in batch]


def test_hf_dataset_in_order_then_shuffled_from_the_original():
    dataset = SupervisedDatasetFromHFDataset(hf_rows(7), batch_size=3, map_fn=number_datum)
    assert len(dataset) == 2
    assert dataset.summary == ["1 of 7 rows left out in an epoch: no full batch of 3"]
    assert numbers(dataset.get_batch(0)) == [1, 2, 3]
    dataset.set_epoch(1)
    expected = hf_rows(7).shuffle(seed=1)["number"][:3]
    assert numbers(dataset.get_batch(0)) == list(expected)
    dataset.set_epoch(2)
    dataset.set_epoch(1)
    assert numbers(dataset.get_batch(0)) == list(expected)


def test_hf_dataset_flatmap_may_give_any_number_of_datums():
    dataset = SupervisedDatasetFromHFDataset(
        hf_rows(4), batch_size=4, flatmap_fn=lambda row: [number_datum(row)] * (row["number"] % 3)
    )
    assert numbers(dataset.get_batch(0)) == [1, 2, 2, 4]


def test_hf_dataset_maps_in_processes_too():
    dataset = SupervisedDatasetFromHFDataset(
        hf_rows(40), batch_size=4, map_fn=number_datum, num_workers=1
    )
    seen = [number for i in range(len(dataset)) for number in numbers(dataset.get_batch(i))]
    assert seen == list(range(1, 41))
    dataset.close()


def test_errors_of_a_users_function_name_the_row():
    def fails_at_three(row: dict) -> tinker.Datum:
        return number_datum({"number": 1 // (3 - row["number"])})

    dataset = SupervisedDatasetFromHFDataset(hf_rows(4), batch_size=2, map_fn=fails_at_three)
    dataset.get_batch(0)
    with pytest.raises(ZeroDivisionError) as info:
        dataset.get_batch(1)
    assert info.value.__notes__ == ["raised for dataset row 2"]


@pytest.mark.parametrize("functions", [{}, {"map_fn": number_datum, "flatmap_fn": list}])
def test_exactly_one_function_is_needed(functions):
    with pytest.raises(ConfigurationError, match="exactly one"):
        SupervisedDatasetFromHFDataset(hf_rows(4), batch_size=2, **functions)
    with pytest.raises(ConfigurationError, match="exactly one"):
        StreamingSupervisedDatasetFromHFDataset(
            hf_rows(4).to_iterable_dataset(), batch_size=2, length=4, **functions
        )


def stream(count: int = 10, length: int = 10) -> StreamingSupervisedDatasetFromHFDataset:
    return StreamingSupervisedDatasetFromHFDataset(
        hf_rows(count).to_iterable_dataset(),
        batch_size=2,
        length=length,
        map_fn=number_datum,
        buffer_size=4,
    )


def test_stream_gives_every_row_once_and_repeats_with_the_seed():
    dataset = stream()
    epochs = []
    for seed in (0, 1, 0):
        dataset.set_epoch(seed)
        epochs.append([numbers(dataset.get_batch(i)) for i in range(len(dataset))])
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(number for batch in epochs[1] for number in batch) == list(range(1, 11))


def test_stream_skips_forward_but_never_goes_back():
    reference = [numbers(batch) for batch in map(stream().get_batch, [0])] + [
        numbers(stream().get_batch(3))
    ]
    dataset = stream()
    assert numbers(dataset.get_batch(0)) == reference[0]
    assert numbers(dataset.get_batch(3)) == reference[1]
    for index in (3, 0):
        with pytest.raises(DataValidationError, match=f"index={index} has passed"):
            dataset.get_batch(index)


def test_stream_that_ends_early_says_so():
    dataset = stream(count=5, length=10)
    dataset.get_batch(1)
    with pytest.raises(DataValidationError, match=r"index=2 is beyond the end.*length=10"):
        dataset.get_batch(2)


# ---- mixes ----


def source(folder: Path, name: str, count: int, **options) -> HFDatasetSource:
    field = options.get("message_field", "messages")
    place = folder / name
    place.mkdir()
    lines = [json.dumps({field: messages(f"{name} {i}"), name: i}) for i in range(count)]
    (place / "train.jsonl").write_text("\n".join(lines))
    return HFDatasetSource(path=str(place), **options)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def mix(sources: list[HFDatasetSource], **options):
    own = {
        name: options.pop(name)
        for name in ("test_size", "shuffle_seed", "stopping_strategy")
        if name in options
    }
    return InterleavedChatDatasetBuilder(
        common_config=common_config(batch_size=1, **options), sources=sources, **own
    )()


@pytest.mark.usefixtures("offline")
def test_a_mix_takes_every_source_and_keeps_held_out_rows_out(tmp_path):
    sources = [
        source(tmp_path, "a", 30, weight=3.0),
        source(tmp_path, "b", 10, weight=1.0, message_field="turns"),
    ]
    train, test = mix(sources, test_size=8)
    held_out, trained = epoch_replies(test), epoch_replies(train)
    assert sorted(text[0] for text in held_out) == ["a"] * 6 + ["b"] * 2
    assert not set(held_out) & set(trained)
    expected = {f"a {i}" for i in range(30)} | {f"b {i}" for i in range(10)}
    assert set(held_out) | set(trained) == expected


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("strategy", "count"),
    [("first_exhausted", 8), ("all_exhausted", 12), ("all_exhausted_without_replacement", 10)],
)
def test_stopping_strategies(tmp_path, strategy, count):
    sources = [source(tmp_path, "a", 6), source(tmp_path, "b", 4)]
    train, test = mix(sources, stopping_strategy=strategy)
    assert test is None
    texts = epoch_replies(train)
    assert abs(len(texts) - count) <= 1
    assert [text[0] for text in texts[:4]] == ["a", "b", "a", "b"]
    train.set_epoch(1)
    assert sorted(epoch_replies(train)) == sorted(texts)


@pytest.mark.usefixtures("offline")
def test_bad_mixes_are_refused(tmp_path):
    good = source(tmp_path, "a", 3)
    weighted = HFDatasetSource(path=good.path, weight=1.0)
    wrong_field = HFDatasetSource(path=good.path, message_field="turns")
    for sources, message in (
        ([], "sources is empty"),
        ([good, weighted], "positive weight to every source"),
        ([HFDatasetSource(path=good.path, weight=-1.0)], "positive weight"),
        ([wrong_field], "message_field='turns' is not a column .* messages, a"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(sources)
    with pytest.raises(ConfigurationError, match="test_size=5"):
        mix([good, HFDatasetSource(path=good.path)], test_size=5)


@pytest.mark.usefixtures("offline")
def test_datasets_of_other_shapes_are_mixed_too(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b 0"}]
    for name, row in (("c", {"conversations": turns}), ("d", {"prompt": "a", "completion": "d 0"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row))
    sources = [
        HFDatasetSource(path=str(tmp_path / "c"), message_field="conversations"),
        HFDatasetSource(path=str(tmp_path / "d")),
        source(tmp_path, "a", 1),
    ]
    train, _ = mix(sources)
    assert sorted(epoch_replies(train)) == ["a 0", "b 0", "d 0"]
    assert "prompt and completion: 1 rows" in train.summary[0]


# ---- mixes of files ----


def mix_of_files(folder: Path, **options) -> tuple[LazyDataset, SupervisedDataset | None]:
    write_rows(folder / "a.jsonl", [f"a {i}" for i in range(30)])
    csv_rows = "".join(f"q,b {i}\n" for i in range(90))
    (folder / "b.csv").write_text("prompt,completion\n" + csv_rows)
    data = f"{folder}/a.jsonl:0.5,{folder}/b.csv:0.5"
    train, test = build(data, batch_size=10, **options)  # type: ignore[arg-type]
    assert isinstance(train, LazyDataset)
    return train, test


def epoch_of(dataset: SupervisedDataset, seed: int) -> list[str]:
    dataset.set_epoch(seed)
    return epoch_replies(dataset)


def test_a_weighted_mix_gives_each_file_its_share_and_repeats_with_its_seed(tmp_path):
    train, _ = mix_of_files(tmp_path)
    first, second = epoch_of(train, 0), epoch_of(train, 1)
    for texts in (first, second):
        assert sorted(text[0] for text in texts) == ["a"] * 30 + ["b"] * 30
        assert len(set(texts)) == 60
    assert set(first) != set(second), "another part of the long file comes in another epoch"
    again, _ = mix_of_files(tmp_path)
    again.set_epoch(1)
    assert [replies(again.get_batch(i)) for i in (5, 2)] == [second[50:], second[20:30]]
    assert again.fingerprint == train.fingerprint
    assert any("b.csv: 30 rows an epoch of its 90" in line for line in train.summary)


def test_a_mix_until_all_are_through_repeats_the_short_file(tmp_path):
    train, _ = mix_of_files(tmp_path, mix_until="all_exhausted")
    texts = epoch_of(train, 0)
    assert len(texts) == 180
    assert all(texts.count(f"a {i}") == 3 for i in range(30))
    assert any("each comes about 3.0 times" in line for line in train.summary)


def test_held_out_rows_of_a_mix_of_files_are_never_trained(tmp_path):
    train, test = mix_of_files(tmp_path, test_size=8)
    assert test is not None
    held_out = epoch_replies(test)
    assert sorted(text[0] for text in held_out) == ["a"] * 4 + ["b"] * 4
    for seed in range(4):
        assert not set(held_out) & set(epoch_of(train, seed))


def test_files_without_weights_are_read_whole(tmp_path):
    mix_of_files(tmp_path)
    train = build_train(f"{tmp_path}/a.jsonl,{tmp_path}/b.csv")  # type: ignore[arg-type]
    assert sorted(epoch_of(train, 0)) == sorted(
        [f"a {i}" for i in range(30)] + [f"b {i}" for i in range(90)]
    )
    assert "120 rows, 2 files (1 JSONL, 1 CSV)" in train.summary[0]


def test_a_run_says_what_it_converted(tmp_path, thinking_model):
    path = tmp_path / "chat.jsonl"
    row = {"messages": messages("<think>\nadd\n</think>\n\n4")}
    path.write_text("\n".join([json.dumps(row)] * 3))
    options = {"model_name_for_tokenizer": thinking_model, "renderer_name": "qwen3"}
    train = build_train(path, batch_size=1, **options)
    assert train.summary == [
        f"{path}: 3 rows, JSONL, read as messages (role, content)",
        "3 rows: <think> or <tool_call> in a reply's text became reasoning or a call",
    ]
    assert replies(train.get_batch(0)) != replies(
        build_train(path, batch_size=1, markup="keep", **options).get_batch(0)
    )
    with pytest.raises(DataError, match=r"chat\.jsonl:1: <think> is in the text of a reply"):
        build_train(path, batch_size=1, markup="refuse", **options)


def test_shuffled_is_a_permutation():
    order = shuffled(1000, 3)
    assert order.dtype == np.uint32
    assert sorted(order.tolist()) == list(range(1000))


def test_fingerprint_of_a_file_dataset_follows_its_content(chat_file, tmp_path):
    train, test = build(chat_file, test_size=6)
    assert test is not None
    assert train.fingerprint == test.fingerprint
    other = write_rows(tmp_path / "other.jsonl", [f"reply {i}" for i in range(1, 31)])
    assert build_train(other).fingerprint not in (None, train.fingerprint)
