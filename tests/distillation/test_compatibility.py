"""Teachers and data whose tokenizer or chat format is not the student's."""

from __future__ import annotations

import chz
import pytest

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook.distillation.compatibility import (
    check_data_format,
    check_same_format,
    check_same_tokenizer,
    data_format_of,
    describe_differences,
    find_unsuitable_format,
)
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

QWEN, LLAMA = "qwen3_instruct_2507", "llama3"


def test_tokenizers_of_two_families_are_refused():
    student, teacher = str(tokenizer_folder(QWEN)), str(tokenizer_folder(LLAMA))
    with pytest.raises(ConfigurationError, match=r"token ids differ, first id 410 .*has written"):
        check_same_tokenizer(student, teacher)
    check_same_tokenizer(student, student)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ("qwen3", "qwen3_disable_thinking", ["prompts of plain questions", "<think>"]),
        ("qwen3_instruct", "qwen2_5", ["prompts of plain questions", "You are Qwen"]),
        ("qwen3_instruct", "chatml", ["declared tools"]),
        ("qwen3", "role_colon", ["prompts of plain questions", "system prompts", "declared tools"]),
    ],
)
def test_what_differs_is_named(student: str, teacher: str, words: list[str]):
    model = str(tokenizer_folder(QWEN))
    with pytest.raises(ConfigurationError) as error:
        check_same_format(model, student, teacher, "tinker://teacher")
    for word in [*words, f"has the chat format {teacher}", f"student has {student}"]:
        assert word in str(error.value)
    assert f"teacher_config.renderer_name={student}" in str(error.value)


def test_formats_that_write_the_same_agree():
    tokenizer = load_tokenizer(QWEN)
    same = [get_renderer("qwen3_instruct", tokenizer) for _ in range(2)]
    assert describe_differences(*same) == []
    check_same_format("unused", "qwen3", "qwen3", "a teacher")


def test_a_format_that_a_chat_model_does_not_know():
    assert find_unsuitable_format("qwen3_disable_thinking", "Qwen/Qwen3-8B") is None
    assert find_unsuitable_format("llama3", "Qwen/Qwen3-8B") == "qwen3"
    assert find_unsuitable_format("llama3", "Qwen/Qwen3-8B-Base") is None, "it has none to confuse"
    assert find_unsuitable_format("llama3", "someone/unknown") is None


def test_data_in_another_format_are_refused():
    @chz.chz
    class Data:
        renderer_name: str = "llama3"

    @chz.chz
    class Chats:
        common_config: ChatDatasetBuilderCommonConfig

    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer="m", renderer_name="qwen3", max_length=8, batch_size=1
    )
    assert data_format_of(Data()) == "llama3"
    assert data_format_of(Chats(common_config=common)) == "qwen3"
    assert data_format_of(object()) is None
    with pytest.raises(ConfigurationError, match=r"renderer_name=qwen3 is not .*\[0\].* llama3"):
        check_data_format("qwen3", data_format_of(Data()), "dataset_configs[0]")
    check_data_format(None, "llama3", "data")
