"""Load tokenizers: cached, fast, without torch, and with a clear error when offline."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from tinker_cookbook.exceptions import ConfigurationError, WeightsDownloadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Tokenizer: TypeAlias = PreTrainedTokenizerFast
else:
    # Importing transformers takes a second, so at run time the name is only a label.
    Tokenizer: TypeAlias = Any

__all__ = [
    "SupportsEncodeOrdinary",
    "Tokenizer",
    "encode_without_special_tokens",
    "get_registered_tokenizer_names",
    "get_tokenizer",
    "is_tokenizer_registered",
    "register_tokenizer",
    "strip_variant",
    "unregister_tokenizer",
]

_registered: dict[str, Callable[[], Tokenizer]] = {}
_loaded: dict[str, Tokenizer] = {}
_lock = threading.RLock()


@runtime_checkable
class SupportsEncodeOrdinary(Protocol):
    """A tokenizer that can encode text without recognizing control tokens in it."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text; control tokens written in the text are encoded as ordinary text."""
        ...


def register_tokenizer(name: str, factory: Callable[[], Tokenizer]) -> None:
    """Make `get_tokenizer(name)` return the result of `factory`, which is called once."""
    with _lock:
        _registered[name] = factory
        _forget(name)


def unregister_tokenizer(name: str) -> bool:
    """Remove a registered tokenizer; False if there was none."""
    with _lock:
        _forget(name)
        return _registered.pop(name, None) is not None


def get_registered_tokenizer_names() -> list[str]:
    """Return the names added with `register_tokenizer`, sorted."""
    with _lock:
        return sorted(_registered)


def is_tokenizer_registered(name: str) -> bool:
    """Return whether `register_tokenizer` added this name."""
    with _lock:
        return name in _registered


def strip_variant(model_name: str) -> str:
    """Return the model name without `:variant` suffixes: all variants share one tokenizer.

    A name may have several: `Qwen/Qwen3.6-35B-A3B:peft:262144`.
    """
    if Path(model_name).exists():
        return model_name
    head, separator, tail = model_name.rpartition(":")
    if not separator or not head or "/" in tail or "\\" in tail:
        return model_name
    return strip_variant(head)


def get_tokenizer(model_name: str) -> Tokenizer:
    """Return the tokenizer of a model, the same object on every call.

    For a model that is neither on this machine nor available from the hub, the tokenizer that the
    connected service names is loaded, if its folder is on this machine.

    Args:
        model_name: a registered name, a local folder, or a Hugging Face model id, which may carry
            a `:variant` suffix.

    Raises:
        ConfigurationError: if the tokenizer does not exist, or is not available offline.
    """
    with _lock:  # two threads must not load the same tokenizer twice
        if model_name not in _loaded:
            _loaded[model_name] = _load(model_name)
        return _loaded[model_name]


def encode_without_special_tokens(
    tokenizer: SupportsEncodeOrdinary | Tokenizer, text: str
) -> list[int]:
    """Encode text without adding tokens such as begin-of-sequence."""
    if isinstance(tokenizer, SupportsEncodeOrdinary):
        return list(tokenizer.encode_ordinary(text))
    return list(tokenizer.encode(text, add_special_tokens=False))


def _forget(name: str) -> None:
    for loaded in [n for n in _loaded if name in (n, strip_variant(n))]:
        del _loaded[loaded]


def _load(model_name: str) -> Tokenizer:
    factory = _registered.get(model_name) or _registered.get(strip_variant(model_name))
    if factory is not None:
        return factory()
    name = strip_variant(model_name)
    tokenizer = _load_folder(_find_folder(name))
    tokenizer.name_or_path = name
    return tokenizer


def _find_folder(name: str) -> Path:
    from tinker_cookbook.model_files import resolve_model_folder

    try:
        return resolve_model_folder(name, weights=False, config=False)
    except WeightsDownloadError:
        from tinker_cookbook.service import find_served_tokenizer

        folder = find_served_tokenizer(name)
        if folder is None:
            raise
        return folder


def _load_folder(folder: Path) -> Tokenizer:
    """Load a folder's tokenizer.json directly, which takes a tenth of AutoTokenizer's time."""
    import transformers

    has_file = (folder / "tokenizer.json").exists()
    loader = transformers.PreTrainedTokenizerFast if has_file else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        if (damaged := _damaged_file(folder)) is not None:
            raise ConfigurationError(
                f"{damaged} does not hold a JSON object; copy or download it again."
            ) from error
        raise ConfigurationError(
            f"model folder {str(folder)!r} has no tokenizer that can be loaded ({error}); it needs "
            "a tokenizer.json. Save one there with tokenizer.save_pretrained."
        ) from error


def _damaged_file(folder: Path) -> Path | None:
    """Return the first file of a tokenizer that does not hold a JSON object; None if all do."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return folder / name
        try:
            is_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            return folder / name
    return None
