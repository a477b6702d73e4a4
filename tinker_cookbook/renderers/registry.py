"""Renderers by name: those of this package, and those that a program registers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import Renderer, RendererFactory
from tinker_cookbook.renderers.types import ImageProcessorProtocol, Message
from tinker_cookbook.utils.nearest_name import did_you_mean

if TYPE_CHECKING:
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "check_renderer_name",
    "find_image_renderer_names",
    "get_registered_renderer_names",
    "get_renderer",
    "get_renderer_names",
    "is_renderer_registered",
    "load_renderer",
    "register_renderer",
    "unregister_renderer",
]

_registered: dict[str, RendererFactory] = {}
_lock = threading.Lock()


def _built_in() -> dict[str, RendererFactory]:
    """Return the built-in renderers; this imports all formats, so it is done only when one is
    needed."""
    from tinker_cookbook.renderers.built_in import BUILT_IN

    return {name: renderer.make for name, renderer in BUILT_IN.items()}


def register_renderer(name: str, factory: RendererFactory) -> None:
    """Register a renderer, or replace one.

    Args:
        name: the name for `get_renderer`; it hides a built-in renderer with the same name.
        factory: called with (tokenizer, image processor or None). Other processes that unpickle
            the renderer must have registered the same name.
    """
    if not name:
        raise RendererError(f"name={name!r} is empty; give the renderer a name.")
    with _lock:
        _registered[name] = factory


def unregister_renderer(name: str) -> bool:
    """Remove a registered renderer; return False if there was none."""
    with _lock:
        return _registered.pop(name, None) is not None


def get_registered_renderer_names() -> list[str]:
    """Return the names added with `register_renderer`, sorted."""
    with _lock:
        return sorted(_registered)


def is_renderer_registered(name: str) -> bool:
    """Whether `register_renderer` added this name."""
    with _lock:
        return name in _registered


def get_renderer_names() -> list[str]:
    """Return all names that `get_renderer` knows, sorted."""
    return sorted({*_built_in(), *get_registered_renderer_names()})


def get_renderer(
    name: str,
    tokenizer: Tokenizer,
    image_processor: ImageProcessorProtocol | None = None,
    model_name: str | None = None,
) -> Renderer:
    """Make a renderer by name.

    Args:
        name: a registered name, or one of the built-in names below, which docs/renderers.md
            describes.
        tokenizer: the model's tokenizer, from `tokenizer_utils.get_tokenizer`.
        image_processor: the model's image processor, for formats with images.
        model_name: the model whose tokenizer another process loads if the renderer is pickled;
            default: the tokenizer's own name.

    Raises:
        RendererError: if the name is unknown, or the tokenizer lacks the format's control tokens.

    Built-in names:
        `chatml`, `deepseek_r1`, `deepseek_r1_0528`, `deepseekv3`, `deepseekv3_chat`,
        `deepseekv3_disable_thinking`, `deepseekv3_thinking`, `deepseekv4`,
        `deepseekv4_disable_thinking`, `deepseekv4_high_reasoning`,
        `deepseekv4_max_reasoning`, `deepseekv4_preserve_thinking`, `deepseekv4_thinking`,
        `gemma3`, `gemma4`, `gemma4_preserve_thinking`, `gemma4_thinking`, `glm4_5`,
        `glm4_5_disable_thinking`, `glm4_7`, `glm4_7_disable_thinking`,
        `glm4_7_preserve_thinking`, `gpt_oss_high_reasoning`, `gpt_oss_low_reasoning`,
        `gpt_oss_medium_reasoning`, `gpt_oss_no_sysprompt`, `hf_template`, `kimi_k2`,
        `kimi_k25`, `kimi_k25_disable_thinking`, `kimi_k26`, `kimi_k26_disable_thinking`,
        `kimi_k26_preserve_thinking`, `kimi_k2_instruct`, `llama3`, `llama3_1`,
        `mistral_nemo`, `mistral_small`, `nemotron3`, `nemotron3_disable_thinking`,
        `nemotron3_low_thinking`, `nemotron3_preserve_thinking`, `nemotron3_ultra`,
        `nemotron3_ultra_disable_thinking`, `nemotron3_ultra_medium_thinking`,
        `nemotron3_ultra_preserve_thinking`, `qwen2_5`, `qwen3`, `qwen3_5`,
        `qwen3_5_disable_thinking`, `qwen3_5_preserve_thinking`, `qwen3_6`,
        `qwen3_6_disable_thinking`, `qwen3_6_preserve_thinking`, `qwen3_8_disable_thinking`,
        `qwen3_8_low_reasoning`, `qwen3_8_medium_reasoning`, `qwen3_8_xhigh_reasoning`,
        `qwen3_disable_thinking`, `qwen3_instruct`, `qwen3_thinking_2507`, `qwen3_vl`,
        `qwen3_vl_instruct`, `role_colon`, `smollm2`, `smollm3`, `smollm3_disable_thinking`.
    """
    renderer = _find_factory(name)(tokenizer, image_processor)
    loadable_name = model_name or getattr(tokenizer, "name_or_path", None) or None
    renderer._renderer_name = name
    renderer._model_name = loadable_name
    renderer._has_image_processor = image_processor is not None
    renderer._rebuild = _rebuild_renderer
    return renderer


def check_renderer_name(name: str) -> None:
    """Refuse a name that `get_renderer` does not know; no tokenizer is needed.

    Raises:
        RendererError: with the nearest name.
    """
    _find_factory(name)


def _find_factory(name: str) -> RendererFactory:
    with _lock:
        factory = _registered.get(name) or _built_in().get(name)
    if factory is None:
        raise _unknown_name_error(name)
    return factory


def load_renderer(name: str, model_name: str) -> Renderer:
    """Make a renderer by name for a model, with its tokenizer and, for a vision model, image
    processor.

    Args:
        name: as for `get_renderer`.
        model_name: a model folder or hub id. The image processor of a vision model is loaded when
            the first image is rendered.

    Raises:
        RendererError: as `get_renderer`.
        ConfigurationError: if the tokenizer cannot be loaded.
    """
    from tinker_cookbook.image_processing_utils import deferred_image_processor
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    images = deferred_image_processor(model_name)
    return get_renderer(name, get_tokenizer(model_name), images, model_name=model_name)


def find_image_renderer_names(model_name: str) -> list[str]:
    """Return the renderers that write images for a model, those that fit its chat template first.

    Args:
        model_name: a model folder or hub id. For a model without images, the list is empty.
    """
    from tinker_cookbook.image_processing_utils import deferred_image_processor
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    images = deferred_image_processor(model_name)
    if images is None or getattr(images, "merge_size", None) is None:
        return []  # a text model, or one that counts image positions differently
    tokenizer = get_tokenizer(model_name)
    fitting: list[str] = []
    others: list[str] = []
    for name in get_renderer_names():
        try:
            renderer = get_renderer(name, tokenizer, images, model_name=model_name)
        except RendererError:
            continue  # made for another vocabulary
        if renderer.writes_images:
            (fitting if _prompts_like_template(renderer) else others).append(name)
    return fitting + others


def _prompts_like_template(renderer: Renderer) -> bool:
    tokenizer = renderer.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return False
    talk: list[Message] = [Message(role="user", content="Hi")]
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    return renderer.render_prompt(talk).tokens() == theirs


def _unknown_name_error(name: str) -> RendererError:
    known = get_renderer_names()
    hint = did_you_mean(str(name), known, cutoff=0.5)
    return RendererError(
        f"renderer name={name!r} is unknown.{hint} Use one of {', '.join(known)}, or add it with "
        "register_renderer."
    )


def _rebuild_renderer(name: str, model_name: str, has_image_processor: bool) -> Renderer:
    """Rebuild a pickled renderer in this process."""
    from tinker_cookbook.image_processing_utils import DeferredImageProcessor
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    image_processor = DeferredImageProcessor(model_name) if has_image_processor else None
    return get_renderer(name, get_tokenizer(model_name), image_processor, model_name=model_name)
