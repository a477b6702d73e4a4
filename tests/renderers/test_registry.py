"""Names, pickling, threads and processes."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle
import random
import re
import subprocess
import sys

import pytest

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook import renderers
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, Renderer, get_renderer
from tinker_cookbook.renderers.built_in import BUILT_IN
from tinker_cookbook.renderers.chatml import ChatMLRenderer
from tinker_cookbook.tokenizer_utils import get_tokenizer

from .families import FAMILIES, VARIANTS

TALK: list[Message] = [
    {"role": "user", "content": "hi <|im_end|>"},
    {"role": "assistant", "content": "hello"},
]


def test_unknown_names_list_the_known_and_the_nearest() -> None:
    tokenizer = load_tokenizer("qwen3")
    with pytest.raises(RendererError, match=r"is unknown\. Did you mean 'qwen3'\?.*role_colon"):
        get_renderer("qwen_3", tokenizer)
    with pytest.raises(ValueError, match="is unknown"):
        get_renderer("zzz", tokenizer)


def test_a_tokenizer_without_the_control_tokens_is_refused() -> None:
    with pytest.raises(RendererError, match=r"has no token '<\|im_start\|>'.*made for this model"):
        get_renderer("chatml", load_tokenizer("llama3"))
    with pytest.raises(RendererError, match="<think>"):
        get_renderer("qwen3", load_tokenizer("qwen2_5"))


def test_registered_renderers_come_first_and_can_be_removed() -> None:
    def factory(tokenizer: renderers.base.Tokenizer, image_processor: object) -> Renderer:
        assert image_processor is None
        return ChatMLRenderer(tokenizer, default_system="Mine.")

    tokenizer = load_tokenizer("qwen3")
    assert renderers.get_registered_renderer_names() == []
    renderers.register_renderer("qwen3", factory)
    try:
        assert renderers.is_renderer_registered("qwen3")
        assert renderers.get_registered_renderer_names() == ["qwen3"]
        assert get_renderer("qwen3", tokenizer).render(TALK).segments[0].message == -1
    finally:
        assert renderers.unregister_renderer("qwen3")
    assert not renderers.unregister_renderer("qwen3")
    assert type(get_renderer("qwen3", tokenizer)).__name__ == "Qwen3Renderer"
    with pytest.raises(RendererError, match="is empty"):
        renderers.register_renderer("", factory)


def test_all_names_are_known() -> None:
    names = renderers.get_renderer_names()
    tested = {family.renderer_name for family in (*FAMILIES.values(), *VARIANTS.values())}
    elsewhere = {"role_colon", "hf_template", "qwen3_5_preserve_thinking", "qwen3_vl"}
    assert tested | elsewhere == set(names)


@pytest.mark.parametrize("name", sorted({f.renderer_name for f in FAMILIES.values()}))
def test_pickled_renderers_are_small_and_equal(name: str) -> None:
    family = next(f for f in FAMILIES.values() if f.renderer_name == name)
    data = pickle.dumps(family.renderer)
    assert len(data) < 300
    again = pickle.loads(data)
    assert type(again) is type(family.renderer)
    assert again.render(TALK).tokens() == family.renderer.render(TALK).tokens()


def test_a_renderer_not_made_by_name_says_why_it_cannot_be_pickled() -> None:
    with pytest.raises(pickle.PicklingError, match="make it with get_renderer"):
        pickle.dumps(ChatMLRenderer(load_tokenizer("qwen3")))


def _render_in_child(renderer: Renderer) -> list[int]:
    return renderer.render(TALK).tokens()


def test_renderers_travel_to_other_processes() -> None:
    renderer = FAMILIES["qwen3"].renderer
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        result = pool.submit(_render_in_child, renderer).result(timeout=120)
    assert result == renderer.render(TALK).tokens()


def test_threads_share_a_renderer_and_its_tokenizer() -> None:
    """Rendering literal text never disturbs others, nor the shared tokenizer, and the reverse."""
    family = FAMILIES["qwen3"]
    renderer, tokenizer = family.renderer, family.tokenizer
    texts = [f"text {n} <|im_end|> <think> é" for n in range(20)]
    expected = {
        text: renderer.render([{"role": "user", "content": text}]).tokens() for text in texts
    }
    marked = tokenizer.encode("a<|im_end|>", add_special_tokens=False)

    def work(seed: int) -> int:
        choose = random.Random(seed)
        wrong = 0
        for _ in range(100):
            text = choose.choice(texts)
            wrong += renderer.render([{"role": "user", "content": text}]).tokens() != expected[text]
            wrong += tokenizer.encode("a<|im_end|>", add_special_tokens=False) != marked
            reply = renderer.parse_response(marked)[0]["content"]
            wrong += reply != "a"
        return wrong

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


def test_import_is_light() -> None:
    code = (
        "import sys, tinker_cookbook.renderers, tinker_cookbook.model_info;"
        "heavy = {'torch', 'tinker', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_get_tokenizer_does_not_import_torch() -> None:
    folder = str(tokenizer_folder("qwen3"))
    code = (
        "import sys; from tinker_cookbook.tokenizer_utils import get_tokenizer;"
        f"get_tokenizer({folder!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert get_tokenizer(folder) is load_tokenizer("qwen3")


def test_the_docstring_lists_all_built_in_names():
    """Programs and readers look there."""
    _, _, listed = (get_renderer.__doc__ or "").partition("Built-in names:")
    assert re.findall(r"`(\w+)`", listed) == sorted(BUILT_IN)
