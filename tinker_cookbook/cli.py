"""The `tinker-cookbook` command: one subcommand for each module of `tinker_cookbook.commands`.

A subcommand is a module with `add_arguments(parser)`, `run(args) -> int` and a docstring whose
first line is its help line. Only the module asked for is imported, so `--help` answers at once.
"""

import argparse
import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tinker_cookbook import __version__
from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.runs import interrupts
from tinker_cookbook.utils.nearest_name import did_you_mean
from tinker_cookbook.utils.sdk_compat import hide_reported_errors

__all__ = ["main"]

# Active from here until `main` begins.
interrupts.hide_import_traceback()

PROGRAM = "tinker-cookbook"
EXIT_USER_ERROR = 2
INTERRUPTED = "interrupted"
_COMMANDS_PACKAGE = "tinker_cookbook.commands"
_FIRST_SHOWN = (
    *("doctor", "recipes", "copy", "serve", "status", "runs", "view", "sweep"),
    *("chat", "sample", "eval", "export", "import", "render", "check", "clean"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: The words after the program's name; by default those of `sys.argv`.

    Returns:
        0 after success, 2 after an error that the user can fix, 130 after Ctrl-C, otherwise the
        status of the command.
    """
    hide_reported_errors()
    try:
        return _find_and_run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before the command handles interrupts itself
        interrupts.tell(INTERRUPTED)
        return interrupts.EXIT_INTERRUPTED


def _find_and_run(words: list[str]) -> int:
    commands = find_commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(format_help(commands))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    # Without torch, transformers would print that it found none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    name = words[0]
    if name not in commands:
        print(f"error: {unknown_command_message(name, list(commands))}", file=sys.stderr)
        return EXIT_USER_ERROR
    return _run_command(name, words[1:])


def find_commands() -> dict[str, str]:
    """Return the help line of each subcommand, without importing the subcommands."""
    folder = Path(__file__).parent / "commands"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    names.sort(key=lambda name: _FIRST_SHOWN.index(name) if name in _FIRST_SHOWN else 99)
    return {name: _help_line(folder / f"{name}.py") for name in names}


def format_help(commands: dict[str, str]) -> str:
    """Return the text of `tinker-cookbook --help`."""
    width = max((len(name) for name in commands), default=0) + 2
    rows = [f"  {name:<{width}}{line}" for name, line in commands.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Fine-tune language models through the Tinker API, on this machine or elsewhere.",
            "",
            "commands:",
            *rows,
            "",
            f"`{PROGRAM} COMMAND --help` explains a command; "
            f"`{PROGRAM} --version` prints the version.",
        ]
    )


def unknown_command_message(name: str, known: list[str]) -> str:
    """Return the error for an unknown command, with the nearest one and the list."""
    return f"COMMAND={name} is unknown.{did_you_mean(name, known)} Use one of {', '.join(known)}."


def _help_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.strip().partition("\n")[0]


def _run_command(name: str, words: list[str]) -> int:
    # `serve` handles interrupts itself.
    guard = contextlib.nullcontext() if name == "serve" else _end_on_interrupt()
    try:
        with guard:
            return _run_or_report(name, words)
    except TinkerCookbookError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has ended. Without a valid stdout, the interpreter's
        # last flush would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _end_on_interrupt() -> contextlib.AbstractContextManager[None]:
    return interrupts.end_on_interrupt(lambda: INTERRUPTED, lambda: None)


def _run_or_report(name: str, words: list[str]) -> int:
    try:
        return _parse_and_run(name, words)
    except KeyboardInterrupt:
        interrupts.tell(INTERRUPTED)
        return interrupts.EXIT_INTERRUPTED


def _parse_and_run(name: str, words: list[str]) -> int:
    module = importlib.import_module(f"{_COMMANDS_PACKAGE}.{name}")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return module.run(args)


if __name__ == "__main__":
    sys.exit(main())
