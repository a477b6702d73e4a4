"""The runs of a sweep: every combination of the given values, or random ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["PlannedRun", "SweepPlan", "plan_sweep"]

RANGE = re.compile(r"(-?[\d.eE+-]+?)\.\.(-?[\d.eE+-]+)")
RANGE_DIGITS = 3
"""Significant digits of a value that is drawn from a range."""
MAX_NAME = 120
MAX_RUNS = 1_000
FORBIDDEN = {
    "log_path": "every run gets its own folder; --folder sets where they are",
    "behavior_if_log_dir_exists": "a sweep resumes its unfinished runs",
    "dry_run": "--dry-run lists the runs",
}
"""Settings that a sweep sets itself, and what to use instead."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """Name of its folder."""
    settings: dict[str, str]
    """Values of the settings that differ between runs, as they are written on a command line."""


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, in the order in which they start."""

    recipe: str
    fixed: dict[str, str]
    """Settings that all runs have."""
    axes: list[str]
    """Names of the settings that differ."""
    runs: list[PlannedRun]

    @property
    def default_name(self) -> str:
        """Name of the sweep's folder; the same command gives the same name."""
        content = [self.recipe, self.fixed, [run.settings for run in self.runs]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.recipe.rpartition('/')[2]}-{'-'.join(self.axes)[:40]}-{digest}"

    def words(self, run: PlannedRun) -> list[str]:
        """Return the settings of a run as words of a command line."""
        return [f"{key}={value}" for key, value in (self.fixed | run.settings).items()]


def plan_sweep(
    recipe: str, words: Sequence[str], *, num_random: int | None = None, seed: int = 0
) -> SweepPlan:
    """Read the words `key=value` of a command line.

    Args:
        recipe: Name of the recipe.
        words: `key=a,b,c` lists values; `key=low..high` is a range for random search, drawn evenly
            on a logarithmic scale if both ends are above 0; `key=a` is the same in all runs.
        num_random: Number of runs with random values; None: all combinations.
        seed: Seed of the random values.

    Raises:
        ConfigurationError: if a word is malformed, or nothing differs between the runs.
    """
    fixed: dict[str, str] = {}
    axes: dict[str, list[str] | tuple[float, float]] = {}
    for word in words:
        key, values = _read_word(word, num_random is not None)
        if key in fixed or key in axes:
            raise ConfigurationError(f"{key} is given twice; give all its values in one word.")
        if isinstance(values, list) and len(values) == 1:
            fixed[key] = values[0]
        else:
            axes[key] = values
    if not axes:
        raise ConfigurationError(
            "no setting has several values; write for example learning_rate=1e-4,3e-4,1e-3."
        )
    chosen = _draw(axes, num_random, seed) if num_random is not None else _combine(axes)
    if len(chosen) > MAX_RUNS:
        raise ConfigurationError(
            f"these values give {len(chosen)} runs, more than {MAX_RUNS}; give fewer values, or "
            "draw some of them with --random N."
        )
    return SweepPlan(recipe, fixed, list(axes), [PlannedRun(_name(each), each) for each in chosen])


def _read_word(word: str, is_random: bool) -> tuple[str, list[str] | tuple[float, float]]:
    key, separator, text = word.partition("=")
    if not separator or not key or not text:
        raise ConfigurationError(f"{word!r} is not a setting; write key=value or key=a,b,c.")
    if key in FORBIDDEN:
        raise ConfigurationError(f"{key} cannot be set in a sweep: {FORBIDDEN[key]}.")
    found = RANGE.fullmatch(text)
    if found is None:
        return key, _split(word, text)
    if not is_random:
        raise ConfigurationError(f"{word} is a range, which needs --random N; or list the values.")
    try:
        low, high = float(found[1]), float(found[2])
    except ValueError as error:
        raise ConfigurationError(
            f"{word} is not a range of two numbers, such as 1e-5..1e-3."
        ) from error
    if not low < high:
        raise ConfigurationError(f"{word}: the first number must be below the second one.")
    return key, (low, high)


def _split(word: str, text: str) -> list[str]:
    """Split at the commas that are not in brackets."""
    values, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            values.append(text[start:place])
            start = place + 1
    values.append(text[start:])
    if not all(values) or len(set(values)) < len(values):
        raise ConfigurationError(f"{word} has an empty value or a value twice; remove it.")
    return values


def _combine(axes: dict[str, list[str] | tuple[float, float]]) -> list[dict[str, str]]:
    lists = [values for values in axes.values() if isinstance(values, list)]
    return [dict(zip(axes, each, strict=True)) for each in itertools.product(*lists)]


def _draw(
    axes: dict[str, list[str] | tuple[float, float]], number: int, seed: int
) -> list[dict[str, str]]:
    """Return different random combinations; fewer than asked for if there are not enough."""
    if number < 1:
        raise ConfigurationError(f"random={number} must be 1 or greater.")
    generator = random.Random(seed)
    found: list[dict[str, str]] = []
    for _ in range(100 * number):
        each = {key: _draw_value(values, generator) for key, values in axes.items()}
        if each not in found:
            found.append(each)
        if len(found) == number:
            break
    return found


def _draw_value(values: list[str] | tuple[float, float], generator: random.Random) -> str:
    if isinstance(values, list):
        return generator.choice(values)
    low, high = values
    if low > 0:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return f"{value:.{RANGE_DIGITS}g}"


def _name(settings: dict[str, str]) -> str:
    """Return the name of a run's folder; a value that cannot be a file name gets a digest."""
    text = ",".join(f"{key}={value}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "-", text)
    if name == text and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
