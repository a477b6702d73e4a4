"""Renderer classes by the cookbook's names: what they make, what they are, how they pickle."""

from __future__ import annotations

import importlib
import pickle

import pytest

from tests.assets import tokenizer_folder
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ParseTermination, get_renderer
from tinker_cookbook.renderers.base import (
    parse_response_for_stop_token,
    tokens_weights_from_strings_weights,
)
from tinker_cookbook.tokenizer_utils import get_tokenizer

from .families import FAMILIES

TALK: list[Message] = [
    {"role": "user", "content": "Say hi."},
    {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    {"role": "user", "content": "Again."},
]
# Name, module and class; the class made of a tokenizer alone writes what the name writes.
CLASSES = """
deepseekv3 deepseek_v3 DeepSeekV3DisableThinkingRenderer
deepseekv3_thinking deepseek_v3 DeepSeekV3ThinkingRenderer
gpt_oss_no_sysprompt gpt_oss GptOssRenderer
kimi_k2 kimi_k2 KimiK2Renderer
kimi_k25 kimi_k25 KimiK25Renderer
kimi_k25_disable_thinking kimi_k25 KimiK25DisableThinkingRenderer
kimi_k26_preserve_thinking kimi_k26 KimiK26PreserveThinkingRenderer
llama3 llama3 Llama3Renderer
nemotron3 nemotron3 Nemotron3Renderer
nemotron3_disable_thinking nemotron3 Nemotron3DisableThinkingRenderer
nemotron3_low_thinking nemotron3 Nemotron3LowThinkingRenderer
nemotron3_preserve_thinking nemotron3 Nemotron3PreserveThinkingRenderer
nemotron3_ultra nemotron3 Nemotron3UltraRenderer
nemotron3_ultra_disable_thinking nemotron3 Nemotron3UltraDisableThinkingRenderer
nemotron3_ultra_medium_thinking nemotron3 Nemotron3UltraMediumThinkingRenderer
nemotron3_ultra_preserve_thinking nemotron3 Nemotron3UltraPreserveThinkingRenderer
qwen3 qwen3 Qwen3Renderer
qwen3_disable_thinking qwen3 Qwen3DisableThinkingRenderer
qwen3_instruct qwen3 Qwen3InstructRenderer
qwen3_vl_instruct qwen3 Qwen3VLInstructRenderer
qwen3_5 qwen3_5 Qwen3_5Renderer
qwen3_5_disable_thinking qwen3_5 Qwen3_5DisableThinkingRenderer
qwen3_8_xhigh_reasoning qwen3_8 Qwen3_8Renderer
qwen3_8_disable_thinking qwen3_8 Qwen3_8DisableThinkingRenderer
role_colon role_colon RoleColonRenderer
""".split()
ROWS = list(zip(CLASSES[::3], CLASSES[1::3], CLASSES[2::3], strict=True))


def tokenizer_of(name: str):
    """The tokenizer of the name's family, or of one that is written with the same tokens."""
    like = {"kimi": "kimi_k2", "nemotron3": "nemotron3", "qwen3": "qwen3", "role": "qwen3"}
    near = next((family for start, family in like.items() if name.startswith(start)), "")
    return FAMILIES[name if name in FAMILIES else near].tokenizer


@pytest.mark.parametrize(("name", "module", "class_name"), ROWS)
def test_a_class_writes_what_its_name_writes(name: str, module: str, class_name: str):
    made_by = getattr(importlib.import_module(f"tinker_cookbook.renderers.{module}"), class_name)
    tokenizer = tokenizer_of(name)
    by_name, by_class = get_renderer(name, tokenizer), made_by(tokenizer)
    assert type(by_name) is made_by
    assert by_class.build_generation_prompt(TALK) == by_name.build_generation_prompt(TALK)
    assert by_class.disables_thinking is by_name.disables_thinking
    assert by_class.has_extension_property is by_name.has_extension_property


def test_variants_are_kinds_of_their_family():
    from tinker_cookbook.renderers.kimi_k2 import KimiK2Renderer
    from tinker_cookbook.renderers.nemotron3 import (
        Nemotron3DisableThinkingRenderer,
        Nemotron3Renderer,
    )
    from tinker_cookbook.renderers.qwen3 import Qwen3Renderer
    from tinker_cookbook.renderers.qwen3_5 import Qwen3_5Renderer

    kinds = {
        "qwen3_disable_thinking": Qwen3Renderer,
        "qwen3_8_disable_thinking": Qwen3_5Renderer,
        "kimi_k26_preserve_thinking": KimiK2Renderer,
        "nemotron3_low_thinking": Nemotron3Renderer,
        "nemotron3_ultra_disable_thinking": Nemotron3DisableThinkingRenderer,
    }
    for name, kind in kinds.items():
        assert isinstance(get_renderer(name, tokenizer_of(name)), kind), name


def test_python_words_are_those_of_the_model_version():
    tokenizer = tokenizer_of("qwen3_5")
    call = {"function": {"name": "f", "arguments": {"a": True}}}
    talk = [*TALK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for name, word in {
        "qwen3_5": "True",
        "qwen3_6": "true",
        "qwen3_8_low_reasoning": "true",
    }.items():
        renderer = get_renderer(name, tokenizer)
        text = str(tokenizer.decode(renderer.build_supervised_example(talk)[0].to_ints()))
        assert f"<parameter=a>\n{word}\n" in text, name


def test_a_renderer_knows_its_name_and_keeps_it():
    folder = str(tokenizer_folder("qwen3"))
    tokenizer = get_tokenizer(folder)
    renderer = get_renderer("qwen3", tokenizer, model_name=folder)
    for known in (renderer, pickle.loads(pickle.dumps(renderer))):
        assert known._renderer_name == "qwen3"
        assert known._model_name == folder
        assert known._has_image_processor is False
    own = type(renderer)(tokenizer)
    assert own._renderer_name is None
    with pytest.raises(pickle.PicklingError, match="was not made by name"):
        pickle.dumps(own)


def test_one_token_may_end_a_reply_of_ones_own_format():
    tokenizer = tokenizer_of("qwen3")
    hi = tokenizer.encode("hi")
    message, end = parse_response_for_stop_token([*hi, 7], tokenizer, 7)
    assert (message["content"], end) == ("hi", ParseTermination.STOP_SEQUENCE)
    message, end = parse_response_for_stop_token(hi, tokenizer, 7)
    assert (message["content"], end) == ("hi", ParseTermination.MALFORMED)
    with pytest.raises(RendererError, match="stop token 7 2 times"):
        parse_response_for_stop_token([7, 7], tokenizer, 7)


def test_weighted_texts_become_tokens_with_weights():
    tokenizer = tokenizer_of("llama3")
    tokens, weights = tokens_weights_from_strings_weights([("a", 0.0), (" b c", 1.0)], tokenizer)
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=True) == "a b c"
    assert weights.tolist() == [0.0] * (len(tokens) - 2) + [1.0, 1.0]
    assert tokens.tolist()[:-2] == tokenizer.encode("a")
    assert (tokens.dtype, weights.dtype) == ("int64", "float32")
