"""Settings of a recipe from a file: JSON, YAML, or the config.json of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.ml_log import CONFIG_FILE, RECIPE_SETTINGS

__all__ = ["read_settings"]

YAML_ENDINGS = (".yaml", ".yml")
NOT_REPEATED = ("behavior_if_log_dir_exists", "dry_run")
"""Settings of a past run that applied only to that start."""


def read_settings(path: str) -> dict[str, str]:
    """Return the settings in a file, as text values like those of the command line.

    Args:
        path: A YAML file (.yaml or .yml) or a JSON file with an object of settings. From a run's
            config.json, only the settings given to its recipe are read. A folder means its
            config.json.

    Returns:
        Values by key; keys of nested objects are joined by dots.

    Raises:
        ConfigurationError: if the file cannot be read or does not hold settings.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= CONFIG_FILE
    try:
        text = file.read_text(encoding="utf-8")
        value = _parse_yaml(text) if file.suffix in YAML_ENDINGS else json.loads(text)
    except OSError as error:
        raise ConfigurationError(
            f"config={path} cannot be read ({error.strerror}); give a YAML or JSON file, or the "
            f"folder of a run, which has a {CONFIG_FILE}."
        ) from error
    except ValueError as error:
        kind = "YAML" if file.suffix in YAML_ENDINGS else "JSON"
        problem = " ".join(str(error).split())
        raise ConfigurationError(
            f"config={path} is not {kind} ({problem}); write KEY: VALUE lines in a .yaml file, or "
            "an object in a .json file."
        ) from error
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"config={path} holds a {type(value).__name__}; it must hold settings by their keys."
        )
    recorded = value.get(RECIPE_SETTINGS)
    if isinstance(recorded, dict):
        value = {key: item for key, item in recorded.items() if key not in NOT_REPEATED}
    return dict(_flatten(value, path))


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(
            "a config= file in YAML needs the package pyyaml, which is not installed. Run `pip "
            "install pyyaml`, or write JSON."
        ) from error
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _flatten(value: dict[Any, Any], path: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            yield from _flatten(item, path, f"{name}.")
        elif isinstance(item, list):
            if not all(isinstance(part, str | int | float) for part in item):
                raise ConfigurationError(
                    f"config={path}: {name} is a list with values other than text and numbers; "
                    "set it in the recipe's code."
                )
            if item:  # leaving the key out also gives an empty list
                yield name, ",".join(map(str, item))
        else:
            yield name, str(item)
