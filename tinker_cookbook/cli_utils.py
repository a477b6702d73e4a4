"""Command lines of recipes: parse the settings, print the help, report errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import tinker_cookbook
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError, TrainingError
from tinker_cookbook.runs import interrupts
from tinker_cookbook.runs.directory import (
    DEFAULT_RUNS_DIR,
    RUNS_DIR_ENV_VAR,
    describe_interruption,
    describe_next_start,
    forget_failed_starts,
    prepare_log_dir,
    runs_path,
)
from tinker_cookbook.runs.options import LogdirBehavior
from tinker_cookbook.runs.settings_file import read_settings
from tinker_cookbook.settings_help import (
    Setting,
    help_text,
    read_settings_of,
    readable_type,
    type_choices,
)
from tinker_cookbook.utils.disk_errors import describe_disk_error
from tinker_cookbook.utils.ml_log import recording_recipe_config
from tinker_cookbook.utils.nearest_name import nearest_name
from tinker_cookbook.utils.sdk_compat import hide_reported_errors, is_refusal, service_message

__all__ = [
    "DEFAULT_RUNS_DIR",
    "RUNS_DIR_ENV_VAR",
    "LogdirBehavior",
    "bundled_file",
    "check_log_dir",
    "entrypoint",
    "errors_in_one_line",
    "model_name_from_argv",
    "parse_config",
    "runs_path",
    "start",
]

# A recipe imports this module first; the imports that follow take a moment.
interrupts.hide_import_traceback()

C = TypeVar("C")
EXIT_DISK_ERROR = 1
INTERRUPTED = "interrupted"
FILE_KEY = "config"
HELP_WORDS = {"--help", "-h", "help"}
HELP_ALL_WORDS = {"--help-all", "help-all"}

# Names that people often type, and the settings that they mean.
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
    """Apply a policy to an existing run directory: delete, resume, ask or raise.

    Train loops do this themselves, and compare the settings too. Programs that must decide before
    a train loop starts can call this function.

    Raises:
        ConfigurationError: if the run is refused.
    """
    if Path(log_dir).expanduser().exists():
        prepare_log_dir(log_dir, behavior_if_exists)


def model_name_from_argv(argv: list[str], default: str) -> str:
    """Return the last `model_name=` of the arguments, for defaults that depend on it."""
    names = [word.partition("=")[2] for word in argv if re.match(r"(--)?model[_-]name=", word)]
    return names[-1] if names else default


def bundled_file(name: str, recipe_file: str = "", **older: str) -> Path:
    """Find a data file of the recipes: in the folder of the recipe, or as installed.

    Args:
        name: File name in the folder `data`.
        recipe_file: The recipe's `__file__`.
        older: The same under an older keyword, which copied recipes have.

    Raises:
        ConfigurationError: if the file does not exist.
    """
    recipe_file = recipe_file or next(iter(older.values()), "")
    package = Path(tinker_cookbook.__file__).parent
    folders = (Path(recipe_file).parent, package / "recipes", package.parent / "recipes")
    for folder in folders:
        if (folder / "data" / name).is_file():
            return folder / "data" / name
    raise ConfigurationError(
        f"data/{name} was not found in the folder of {recipe_file}; give your own file with "
        "data=..., or copy the recipe with `tinker-cookbook copy`."
    )


def entrypoint(main: Callable[[C], object], argv: list[str] | None = None) -> None:
    """Run a program from the command line: parse `key=value` settings, run, report errors.

    Args:
        main: Takes a chz config; its annotation gives the class. `--help` prints the docstring of
            its module and the settings.
        argv: Arguments; those of this process by default.
    """
    import chz

    start(chz.get_nested_target(main), main, argv, description=inspect.getmodule(main).__doc__)


def start(
    config_class: type[C],
    main: Callable[[C], object],
    argv: list[str] | None = None,
    *,
    description: str | None = None,
) -> None:
    """Run `main` with the settings of the command line, or print the help.

    Exits with status 2 after an error that the user can fix, which includes a request that the
    service refused and the program did not catch, 1 if the disk is full or fails, and
    130 after an interrupt.

    Args:
        config_class: A chz class with the settings.
        main: The program.
        argv: Arguments; those of this process by default.
        description: Text of the help; by default the docstring of the module of `config_class`.
    """
    words = sys.argv[1:] if argv is None else argv
    # Transformers would print that it found no torch; recipes do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if (HELP_WORDS | HELP_ALL_WORDS) & set(words):
            text = description or sys.modules[config_class.__module__].__doc__ or ""
            everything = bool(HELP_ALL_WORDS & set(words))
            print(help_text(config_class, inspect.cleandoc(text), everything=everything))
            return
        hide_reported_errors()
        with interrupts.end_on_interrupt(describe_interruption, forget_failed_starts):
            _run_or_report(config_class, main, words)
    except (TinkerCookbookError, NotImplementedError) as error:
        raise SystemExit(_report(error)) from error
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has ended. Without a valid stdout, the interpreter's
        # last flush would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Report errors that the user can fix in one line; for scripts that parse their own arguments.

    Exits with status 2 after such an error, and with 130 after an interrupt.
    """
    with interrupts.end_on_interrupt(lambda: INTERRUPTED, lambda: None):
        try:
            yield
        except (TinkerCookbookError, NotImplementedError) as error:
            raise SystemExit(_report(error)) from error
        except KeyboardInterrupt:
            interrupts.tell(INTERRUPTED)
            raise SystemExit(interrupts.EXIT_INTERRUPTED) from None


def _run_or_report(config_class: type[C], main: Callable[[C], object], words: list[str]) -> None:
    try:
        config = parse_config(config_class, words)
        with recording_recipe_config(config):
            main(config)
    except OSError as error:
        problem = describe_disk_error(error)
        if problem is None:
            raise
        print(f"OSError: {problem} Free some space; {describe_next_start()}.", file=sys.stderr)
        raise SystemExit(EXIT_DISK_ERROR) from error
    except Exception as error:
        # Only a program that has loaded the SDK can meet its errors.
        if "tinker" not in sys.modules or not is_refusal(error):
            raise
        raise TrainingError(f"the service refused a request: {service_message(error)}") from error
    except KeyboardInterrupt:
        interrupts.tell(describe_interruption())
        raise SystemExit(interrupts.EXIT_INTERRUPTED) from None


def parse_config(config_class: type[C], words: list[str]) -> C:
    """Make a chz config from `key=value` words; `--key=value` and `key-name=` work too.

    `config=FILE` reads settings from a file (see `settings_file.read_settings`). Settings given as
    words override those of the file.

    Raises:
        ConfigurationError: for an unknown key (the message suggests the nearest one), a value of
            the wrong type (the message names the accepted ones), or a missing key.
    """
    import chz
    from chz import blueprint as chz_blueprint

    blueprint = chz.Blueprint(config_class)
    known = read_settings_of(config_class)
    settings = _read_words(words, known)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return blueprint.make_from_argv([f"{key}={value}" for key, value in settings.items()])
    except chz_blueprint.InvalidBlueprintArg as error:
        raise ConfigurationError(_wrong_type(str(error), settings, known)) from error
    except chz_blueprint.MissingBlueprintArg as error:
        raise ConfigurationError(f"a setting is missing: {_one_line(error)}") from error
    except TinkerCookbookError:
        raise  # from the config's own checks
    except chz_blueprint.ExtraneousBlueprintArg as error:
        raise ConfigurationError(_unknown_part(settings, known)) from error
    except ValueError as error:
        nested = " ".join(f"{key}={value}" for key, value in settings.items() if "." in key)
        raise ConfigurationError(f"{nested} cannot be used: {_one_line(error)}") from error


def _read_words(words: list[str], known: Iterable[str]) -> dict[str, str]:
    """Return the values by key; words override the file that `config=` names."""
    keys = list(known)
    given = dict(_split_word(word) for word in words)
    path = None if FILE_KEY in keys else given.pop(FILE_KEY, None)
    stored = {} if path is None else read_settings(path)
    for settings, where in ((stored, f"{path}: "), (given, "")):
        for key, value in settings.items():
            if key not in keys and key.partition(".")[0] not in keys:
                raise ConfigurationError(where + _unknown_key(key, value, keys))
    return stored | given


def _split_word(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.strip("-"):
        raise ConfigurationError(
            f"{word!r} is not a setting; write key=value. --help lists the keys."
        )
    if not value:
        raise ConfigurationError(f"{word} has no value; give one, or leave the key out.")
    return key.removeprefix("--").replace("-", "_"), value


def _unknown_key(key: str, value: str, known: list[str]) -> str:
    nearest = nearest_name(key, known, cutoff=0.5)
    meant = _COMMON_NAMES.get(key)
    if meant not in known:
        meant = _COMMON_NAMES.get(meant or "")
    if meant in known:
        nearest = meant
    hint = f" Did you mean {nearest}={value}?" if nearest else ""
    return f"{key}={value} is not a setting of this recipe; --help lists them.{hint}"


def _unknown_part(settings: dict[str, str], known: Iterable[str]) -> str:
    """Describe a key with dots, such as `log_path.name`, that names a part that does not exist."""
    wrong = next((key for key in settings if key not in known), "")
    return (
        f"{wrong}={settings.get(wrong, '')} is not a setting of this recipe; "
        f"{wrong.partition('.')[0]} has no part of that name. --help lists the keys."
    )


def _wrong_type(message: str, settings: dict[str, str], known: dict[str, Setting]) -> str:
    found = re.search(r"param '([^']+)'", message)
    key = found.group(1) if found else ""
    if key not in settings:
        return message.strip().splitlines()[0]
    wanted, doc = (known[key].type_text, known[key].doc) if key in known else ("another type", "")
    value, choices = settings[key], type_choices(wanted)
    if not choices:
        return f"{key}={value} has the wrong type; it must be {readable_type(wanted)}."
    nearest = nearest_name(value, choices, cutoff=0.5)
    hint = f" Did you mean {nearest}?" if nearest else ""
    return f"{key}={value} is not accepted; use {readable_type(wanted)}.{hint} {key}: {doc}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _report(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2
