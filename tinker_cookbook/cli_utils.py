"""What the command lines of recipes have in common."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tinker_cookbook
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
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
from tinker_cookbook.utils.disk_errors import describe_disk_error
from tinker_cookbook.utils.ml_log import recording_recipe_config
from tinker_cookbook.utils.nearest_name import nearest_name

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
]

# The first module of the toolkit that a recipe imports; the rest takes a moment.
interrupts.hide_import_traceback()

C = TypeVar("C")
HELP_WIDTH = 100
EXIT_DISK_ERROR = 1
INTERRUPTED = "interrupted"
FILE_KEY = "config"
HELP_INTRODUCTION = """Settings are given as key=value. config=FILE takes them from a YAML or JSON \
file,
or from the config.json of an earlier run; what is on the command line wins."""

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

    Exits with status 2 on what the user can mend, 1 where the disk is full or broken, and 130 when
    interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    # Without torch, transformers would print that it found none; recipes do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if {"--help", "-h", "help"} & set(words):
            print(_help_text(main))
            return
        with interrupts.end_on_interrupt(describe_interruption, forget_failed_starts):
            _run_or_tell(main, words)
    except (TinkerCookbookError, NotImplementedError) as error:
        raise SystemExit(_report(error)) from error
    except BrokenPipeError:
        # The reader (`| head`) has gone; with stdout moved the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For scripts with a command line of their own: what the user can mend takes one line.

    Exits with status 2 then, and with 130 when interrupted.
    """
    with interrupts.end_on_interrupt(lambda: INTERRUPTED, lambda: None):
        try:
            yield
        except (TinkerCookbookError, NotImplementedError) as error:
            raise SystemExit(_report(error)) from error
        except KeyboardInterrupt:
            interrupts.tell(INTERRUPTED)
            raise SystemExit(interrupts.EXIT_INTERRUPTED) from None


def _run_or_tell(main: Callable[[Any], object], words: list[str]) -> None:
    try:
        config = parse_config(_config_class(main), words)
        with recording_recipe_config(config):
            main(config)
    except OSError as error:
        problem = describe_disk_error(error)
        if problem is None:
            raise
        print(f"OSError: {problem} Free some space; {describe_next_start()}.", file=sys.stderr)
        raise SystemExit(EXIT_DISK_ERROR) from error
    except KeyboardInterrupt:
        interrupts.tell(describe_interruption())
        raise SystemExit(interrupts.EXIT_INTERRUPTED) from None


def parse_config(config_class: type[C], words: list[str]) -> C:
    """Make a chz config from `key=value` words; `--key=value` and `key-name=` work too.

    `config=FILE` takes settings from a file (see `settings_file.read_settings`); those given as
    words win over it.

    Raises:
        ConfigurationError: for an unknown key (with the nearest), a value of the wrong type (with
            the right one), or a missing key.
    """
    import chz
    from chz import blueprint as chz_blueprint

    blueprint = chz.Blueprint(config_class)
    help_rows = _help_rows(blueprint)
    settings = _read_words(words, list(help_rows))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return blueprint.make_from_argv([f"{key}={value}" for key, value in settings.items()])
    except chz_blueprint.InvalidBlueprintArg as error:
        raise ConfigurationError(_wrong_type(str(error), settings, help_rows)) from error
    except chz_blueprint.MissingBlueprintArg as error:
        raise ConfigurationError(f"a setting is missing: {_one_line(error)}") from error
    except TinkerCookbookError:
        raise  # from the config's own checks
    except chz_blueprint.ExtraneousBlueprintArg as error:
        raise ConfigurationError(_no_such_part(settings, list(help_rows))) from error
    except ValueError as error:
        nested = " ".join(f"{key}={value}" for key, value in settings.items() if "." in key)
        raise ConfigurationError(f"{nested} cannot be used: {_one_line(error)}") from error


def _read_words(words: list[str], known: list[str]) -> dict[str, str]:
    """Values by key: those of a file, under those of the words."""
    given = dict(_split_word(word) for word in words)
    path = None if FILE_KEY in known else given.pop(FILE_KEY, None)
    stored = {} if path is None else read_settings(path)
    for settings, where in ((stored, f"{path}: "), (given, "")):
        for key, value in settings.items():
            if key not in known and key.partition(".")[0] not in known:
                raise ConfigurationError(where + _unknown_key(key, value, known))
    return stored | given


def _split_word(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.strip("-"):
        raise ConfigurationError(f"{word!r} is no setting; write key=value. --help lists the keys.")
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
    return f"{key}={value} is no setting of this recipe; --help lists them.{hint}"


def _no_such_part(settings: dict[str, str], known: list[str]) -> str:
    """About a key with dots, such as `log_path.name`, where nothing has parts of that name."""
    wrong = next((key for key in settings if key not in known), "")
    return (
        f"{wrong}={settings.get(wrong, '')} is no setting of this recipe; "
        f"{wrong.partition('.')[0]} has no part of that name. --help lists the keys."
    )


def _wrong_type(message: str, settings: dict[str, str], rows: dict[str, list[str]]) -> str:
    found = re.search(r"param '([^']+)'", message)
    key = found.group(1) if found else ""
    if key not in settings:
        return message.strip().splitlines()[0]
    wanted, _, doc = rows.get(key, ["of another type", "", ""])
    problem = f"{key}={settings[key]} has the wrong type; it must be {_readable_type(wanted)}."
    choices = _choices(wanted)
    if not choices:
        return problem
    nearest = nearest_name(settings[key], choices, cutoff=0.5)
    hint = f" Did you mean {nearest}?" if nearest else ""
    return f"{problem}{hint} {key}: {doc}"


def _help_rows(blueprint: Any) -> dict[str, list[str]]:
    """Type, default and doc of every key, by key, from the columns that chz prints."""
    lines = blueprint.get_help().partition("Arguments:\n")[2].splitlines()
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=3) for line in lines if line.strip()]
    return {row[0]: [*row[1:], "", "", ""][:3] for row in rows}


def _readable_type(text: str) -> str:
    choices = _choices(text)
    return f"one of {', '.join(choices)}" if choices else text


def _choices(type_text: str) -> list[str]:
    """The values of a `Literal`; empty for other types."""
    found = re.fullmatch(r"Literal\[(.*)\]", type_text)
    return [value.strip(" '") for value in found.group(1).split(",")] if found else []


def _help_text(main: Callable[[Any], object]) -> str:
    import chz

    config_class = _config_class(main)
    rows = _help_rows(chz.Blueprint(config_class))
    lines = [inspect.getdoc(inspect.getmodule(main)) or "", "", HELP_INTRODUCTION]
    for title, names in _help_groups(config_class, list(rows)):
        lines += ["", f"{title}:", *(_help_entry(name, *rows[name]) for name in names)]
    return "\n".join(lines)


def _help_groups(config_class: type, names: list[str]) -> list[tuple[str, list[str]]]:
    """The recipe's own keys first, then the shared ones, in the order in which they are declared.

    Of the shared classes the outermost comes first: the model, and where it is trained.
    """
    own, *shared = config_class.__mro__[:-1]
    parents = [*shared[-1:], *shared[:1], *reversed(shared[1:-1])]
    seen: set[str] = set()
    found: list[tuple[str, list[str]]] = []
    for owner in dict.fromkeys([own, *parents]):
        title = "Keys of this recipe" if owner is own else _first_sentence(owner)
        declared = vars(owner).get("__annotations__", {})
        members = [name for name in declared if name in names and name not in seen]
        seen.update(members)
        found.append((title, members))
    rest = [name for name in names if name not in seen]
    return [(title, members) for title, members in [*found, ("Other keys", rest)] if members]


def _first_sentence(owner: type) -> str:
    return (
        (inspect.getdoc(owner) or owner.__name__).partition("\n")[0].partition(";")[0].rstrip(".")
    )


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
