"""The settings that stored replies belong to: a change of one is found before anything is mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.eval.benchmarks._types import BenchmarkBuilder, BenchmarkConfig
from tinker_cookbook.eval.endpoint import EndpointClient, EndpointFormat
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.sdk_compat import model_path_of

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "SETTINGS_FILE",
    "UNKNOWN_WEIGHTS",
    "Settings",
    "collect_settings",
    "grader_name",
    "hash_messages",
    "open_folder",
    "read_settings",
]

SETTINGS_FILE = "settings.json"
UNKNOWN_WEIGHTS = "unknown"
Settings = dict[str, object]
_SAMPLING = (
    "max_tokens",
    "temperature",
    "num_samples",
    "seed",
    "context_window",
    "max_trajectory_tokens",
    "max_generation_tokens",
    "system_prompt",
)


async def collect_settings(
    benchmark: BenchmarkBuilder,
    client: tinker.SamplingClient | EndpointClient,
    renderer: Renderer,
    config: BenchmarkConfig,
) -> Settings:
    """Return everything that a stored reply and its grade depend on, other than its prompt."""
    base_model = getattr(client, "get_base_model", None)
    model = base_model() if base_model is not None else type(client).__name__
    return {
        "benchmark": benchmark.name,
        "data": benchmark.data_key(config),
        "grader": grader_name(benchmark, config),
        "model": model,
        "weights": config.weights or await _weights(client, model),
        "chat_format": _chat_format(renderer),
        **{name: getattr(config, name) for name in _SAMPLING},
    }


def grader_name(benchmark: BenchmarkBuilder, config: BenchmarkConfig) -> str:
    """Return the name and version of what grades the replies."""
    if config.grade_fn is not None:
        return f"{config.grade_fn.__module__}.{config.grade_fn.__qualname__}"
    return f"{benchmark.name} {benchmark.grader_version}"


def open_folder(folder: Path, settings: Settings, config: BenchmarkConfig) -> None:
    """Prepare the folder of a benchmark: new, or with replies of the same settings.

    Raises:
        ConfigurationError: if it holds replies of other settings; every difference is listed.
    """
    known = read_settings(folder)
    differences = [] if known is None else _differences(known, settings)
    if differences and config.if_settings_differ == "refuse":
        regrade = ""
        if known is not None and _differing(known, settings) == ["grader"]:
            regrade = " The replies can be kept: regrade_trajectories grades them again."
        raise ConfigurationError(
            f"{folder} holds replies with other settings: {'; '.join(differences)}.{regrade} Use "
            "another save_dir, or if_settings_differ='restart' (the command: --restart) to start "
            "anew; the old replies are then moved aside."
        )
    if differences:
        folder.rename(_free_name(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if known is None or differences:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_atomically(folder / SETTINGS_FILE, text + "\n")


def read_settings(folder: Path) -> Settings | None:
    """Return the settings of the stored replies; None if nothing is stored."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(f"{path}: not JSON ({error}); delete the folder.") from error
    return found


def hash_messages(messages: object) -> str:
    """Return a short hash of a conversation."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _differing(known: Mapping[str, object], settings: Mapping[str, object]) -> list[str]:
    names = [name for name in settings if known.get(name) != settings[name]]
    if settings["weights"] == UNKNOWN_WEIGHTS and "weights" not in names:
        names.append("weights")  # two unknown ones need not be the same
    return names


def _differences(known: Mapping[str, object], settings: Mapping[str, object]) -> list[str]:
    found = []
    for name in _differing(known, settings):
        if settings[name] == UNKNOWN_WEIGHTS and name == "weights":
            found.append("weights: the client cannot tell which ones it has; name them in weights=")
        else:
            found.append(f"{name}: {known.get(name)!r} there, {settings[name]!r} now")
    return found


def _free_name(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    return target


async def _weights(client: tinker.SamplingClient | EndpointClient, model: str) -> str:
    """Return the checkpoint of a client; the model's name for its base weights."""
    if isinstance(client, EndpointClient):
        return client.weights_name
    if not hasattr(client, "_get_sampler_submit"):
        return UNKNOWN_WEIGHTS
    return await model_path_of(client) or model


def _chat_format(renderer: Renderer) -> str:
    """Return the renderer's name and a hash of the tokens that it makes."""
    if isinstance(renderer, EndpointFormat):
        return EndpointFormat._renderer_name
    probe = renderer.build_generation_prompt([{"role": "user", "content": "1 + 1 = ?"}])
    return f"{renderer._renderer_name} {hash_messages(probe.to_ints())}"
