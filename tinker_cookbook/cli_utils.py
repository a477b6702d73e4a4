"""What the command lines of recipes have in common."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tinker_cookbook
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.run_directory import (
    DEFAULT_RUNS_DIR,
    RUNS_DIR_ENV_VAR,
    prepare_log_dir,
    runs_path,
)
from tinker_cookbook.run_options import LogdirBehavior

__all__ = [
    "DEFAULT_RUNS_DIR",
    "RUNS_DIR_ENV_VAR",
    "LogdirBehavior",
    "bundled_file",
    "check_log_dir",
    "entrypoint",
    "model_name_from_argv",
    "parse_config",
    "runs_path",
]

C = TypeVar("C")
HELP_WIDTH = 100

# What people type first, and the key that is meant.
_COMMON_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "steps": "max_steps",
    "model": "model_name",
    "renderer": "renderer_name",
    "rank": "lora_rank",
    "url": "base_url",
    "dataset": "data",
    "file": "data",
    "data": "file_path",
    "output_dir": "log_path",
    "log_dir": "log_path",
    "bs": "batch_size",
}


def check_log_dir(log_dir: str, behavior_if_exists: LogdirBehavior) -> None:
    """Apply a policy to a run directory that exists: delete, resume, ask or raise.

    Train loops check their own directory, and know the settings too; this is for programs that
    want to decide earlier.

    Raises:
        ConfigurationError: if the run is refused.
    """
    if Path(log_dir).expanduser().exists():
        prepare_log_dir(log_dir, behavior_if_exists)


def model_name_from_argv(argv: list[str], default: str) -> str:
    """The last `model_name=` among the arguments, for defaults that depend on it."""
    names = [word.partition("=")[2] for word in argv if re.match(r"(--)?model[_-]name=", word)]
    return names[-1] if names else default


def bundled_file(name: str, *, beside: str) -> Path:
    """A data file of the recipes: beside the recipe's own file, else as installed.

    Args:
        name: File name in the folder `data`.
        beside: The recipe's `__file__`.

    Raises:
        ConfigurationError: if it is nowhere.
    """
    package = Path(tinker_cookbook.__file__).parent
    folders = (Path(beside).parent, package / "recipes", package.parent / "recipes")
    for folder in folders:
        if (folder / "data" / name).is_file():
            return folder / "data" / name
    raise ConfigurationError(
        f"data/{name} is missing beside {beside}; give your own file with data=..., or copy "
        "the recipe with `tinker-cookbook copy`."
    )


def entrypoint(main: Callable[[Any], object], argv: list[str] | None = None) -> None:
    """Run a recipe from the command line: parse `key=value`, run, and report errors in one line.

    Args:
        main: Takes a chz config, whose class its annotation names. `--help` prints the docstring
            of its module and the doc of every key.
        argv: Arguments; those of this process by default.

    Exits with status 2 on what the user can mend, and 130 when interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    # Without torch, transformers would print that it found none; recipes do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if {"--help", "-h", "help"} & set(words):
            print(_help_text(main))
            return
        main(parse_config(_config_class(main), words))
    except (TinkerCookbookError, NotImplementedError) as error:
        raise SystemExit(_report(error)) from error
    except BrokenPipeError:
        # The reader (`| head`) has gone; with stdout moved the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def parse_config(config_class: type[C], words: list[str]) -> C:
    """Make a chz config from `key=value` words; `--key=value` and `key-name=` work too.

    Raises:
        ConfigurationError: for an unknown key (with the nearest), a value of the wrong type (with
            the right one), or a missing key.
    """
    import chz
    from chz import blueprint as chz_blueprint

    blueprint = chz.Blueprint(config_class)
    help_rows = _help_rows(blueprint)
    settings = dict(_split_word(word) for word in words)
    for key, value in settings.items():
        if key not in help_rows and "." not in key:
            raise ConfigurationError(_unknown_key(key, value, list(help_rows)))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return blueprint.make_from_argv([f"{key}={value}" for key, value in settings.items()])
    except chz_blueprint.InvalidBlueprintArg as error:
        raise ConfigurationError(_wrong_type(str(error), settings, help_rows)) from error
    except chz_blueprint.MissingBlueprintArg as error:
        raise ConfigurationError(f"a setting is missing: {_one_line(error)}") from error
    except TinkerCookbookError:
        raise  # from the config's own checks
    except (chz_blueprint.ExtraneousBlueprintArg, ValueError) as error:
        nested = " ".join(f"{key}={value}" for key, value in settings.items() if "." in key)
        raise ConfigurationError(f"{nested} cannot be used: {_one_line(error)}") from error


def _split_word(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.strip("-"):
        raise ConfigurationError(f"{word!r} is no setting; write key=value. --help lists the keys.")
    return key.removeprefix("--").replace("-", "_"), value


def _unknown_key(key: str, value: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    meant = _COMMON_NAMES.get(key)
    if meant not in known:
        meant = _COMMON_NAMES.get(meant or "")
    if meant in known:
        nearest = [meant]
    hint = f" Did you mean {nearest[0]}={value}?" if nearest else ""
    return f"{key}={value} is no setting of this recipe; --help lists them.{hint}"


def _wrong_type(message: str, settings: dict[str, str], rows: dict[str, list[str]]) -> str:
    found = re.search(r"param '([^']+)'", message)
    key = found.group(1) if found else ""
    if key not in settings:
        return message.strip().splitlines()[0]
    wanted = _readable_type(rows[key][0]) if key in rows else "of another type"
    return f"{key}={settings[key]} has the wrong type; it must be {wanted}."


def _help_rows(blueprint: Any) -> dict[str, list[str]]:
    """Type, default and doc of every key, by key, from the columns that chz prints."""
    lines = blueprint.get_help().partition("Arguments:\n")[2].splitlines()
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=3) for line in lines if line.strip()]
    return {row[0]: [*row[1:], "", "", ""][:3] for row in rows}


def _readable_type(text: str) -> str:
    choices = re.fullmatch(r"Literal\[(.*)\]", text)
    return "one of " + choices.group(1).replace("'", "") if choices else text


def _help_text(main: Callable[[Any], object]) -> str:
    import chz

    rows = _help_rows(chz.Blueprint(_config_class(main)))
    doc = inspect.getdoc(inspect.getmodule(main)) or ""
    entries = [_help_entry(name, *columns) for name, columns in rows.items()]
    return "\n".join([doc, "", "Keys, as key=value:", *entries])


def _help_entry(name: str, type_text: str, default: str, doc: str) -> str:
    """`name=default  (type)`, and the doc below it."""
    value = default.removesuffix("(default)").strip().strip("'")
    text = textwrap.fill(doc, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {name}={value}  ({_readable_type(type_text)})\n{text}"


def _config_class(main: Callable[[Any], object]) -> type:
    import chz

    return chz.get_nested_target(main)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _report(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2
