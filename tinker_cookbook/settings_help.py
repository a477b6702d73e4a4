"""The text that `--help` prints: a recipe's own settings explained, the shared ones listed."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

__all__ = ["Setting", "help_text", "read_settings_of", "readable_type", "type_choices"]

WIDTH = 100
INTRODUCTION = """Settings are given as key=value. config=FILE reads them from a YAML or JSON file,
or from the config.json of an earlier run; the command line overrides the file."""
OWN_TITLE = "Settings of this recipe"
SHARED_TITLE = "Shared settings (--help-all explains each):"


@dataclass(frozen=True)
class Setting:
    """One key of a config, as help and error messages show it."""

    key: str
    type_text: str
    default: str
    """Empty if the key must be given."""
    doc: str


def read_settings_of(config_class: type) -> dict[str, Setting]:
    """Return the settings of a chz class by key, from the table that chz prints."""
    import chz

    lines = chz.Blueprint(config_class).get_help().partition("Arguments:\n")[2].splitlines()
    found = {}
    for line in filter(str.strip, lines):
        columns = re.split(r"\s{2,}", line.strip(), maxsplit=3)
        key, type_text, default, doc = [*columns, "", "", ""][:4]
        value = default.removesuffix("(default)").strip().strip("'")
        type_text, value = _plain_enum(config_class, key, type_text, value)
        found[key] = Setting(key, type_text, value, doc or _inherited_doc(config_class, key))
    return found


def _plain_enum(config_class: type, key: str, type_text: str, value: str) -> tuple[str, str]:
    """Return type and default of a setting; for an enum as the values that users type."""
    import chz

    field = chz.chz_fields(config_class).get(key)
    kind = None if field is None else field.final_type
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return type_text, value
    member = re.fullmatch(r"<\w+\.(\w+): .*>", value)
    default = str(kind[member.group(1)].value) if member else value
    return f"Literal[{', '.join(repr(each.value) for each in kind)}]", default


def _inherited_doc(config_class: type, key: str) -> str:
    """A recipe that only changes the default of a shared setting keeps its text."""
    import chz

    for base in config_class.__mro__[1:]:
        field = chz.chz_fields(base).get(key) if chz.is_chz(base) else None
        if field is not None and field._doc:
            return field._doc
    return ""


def help_text(config_class: type, description: str, *, everything: bool = False) -> str:
    """Return the help of a recipe.

    Args:
        config_class: Its settings.
        description: Text before them.
        everything: Explain the shared settings too, instead of listing them.
    """
    settings = read_settings_of(config_class)
    own, *shared = _groups(config_class, list(settings))
    lines = [description, "", INTRODUCTION, "", f"{own[0]}:"]
    lines += [_explain(settings[key]) for key in own[1]]
    if everything:
        for title, keys in shared:
            lines += ["", f"{title}:", *(_explain(settings[key]) for key in keys)]
    elif shared:
        lines += ["", SHARED_TITLE]
        lines += [line for title, keys in shared for line in _list_keys(title, keys, settings)]
    return "\n".join(lines)


def _groups(config_class: type, keys: list[str]) -> list[tuple[str, list[str]]]:
    """Keys by the class that declares them, each once; the recipe's own come first.

    Of the shared classes the most general comes first (the model), then the one that the recipe
    names first (its data, or its kind of training).
    """
    classes = config_class.__mro__[:-1]
    own = list(_declared([owner for owner in classes if not _is_shared(owner)], keys))
    shared = [owner for owner in classes if _is_shared(owner)]
    declared: dict[type, list[str]] = {}
    seen = set(own)
    for owner in reversed(shared):  # a changed default stays with the class that declared the key
        declared[owner] = [key for key in _declared([owner], keys) if key not in seen]
        seen.update(declared[owner])
    order = dict.fromkeys([*shared[-1:], *shared[:1], *reversed(shared[1:-1])])
    groups = [(_first_sentence(owner), declared[owner]) for owner in order if declared[owner]]
    return [(OWN_TITLE, own), *groups]


def _is_shared(owner: type) -> bool:
    """Whether a class belongs to the package, and not to a recipe (which may be installed)."""
    return re.match(r"tinker_cookbook\.(?!recipes\b)", owner.__module__) is not None


def _declared(owners: list[type], keys: list[str]) -> Iterator[str]:
    names = [name for owner in owners for name in vars(owner).get("__annotations__", {})]
    return (name for name in dict.fromkeys(names) if name in keys)


def _first_sentence(owner: type) -> str:
    text = inspect.getdoc(owner) or owner.__name__
    return re.split(r"[.;\n]", text, maxsplit=1)[0]


def _explain(setting: Setting) -> str:
    """`key=default  (type)`, and what it is on the lines below."""
    indent = " " * 6
    text = textwrap.fill(setting.doc, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"  {setting.key}={setting.default}  ({readable_type(setting.type_text)})\n{text}"


def _list_keys(title: str, keys: list[str], settings: dict[str, Setting]) -> list[str]:
    """A heading, and the keys with their defaults on as few lines as they fit."""
    words = [_with_default(settings[key]) for key in keys]
    indent = " " * 6
    text = textwrap.fill(
        "  ".join(words),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [f"  {title}:", *text.splitlines()]


def _with_default(setting: Setting) -> str:
    """`key=default`; the key alone where the default is None, made by a function, or long."""
    plain = re.fullmatch(r"[\w.+-]{1,24}", setting.default) is not None
    shown = plain and setting.default != "None"
    return f"{setting.key}={setting.default}" if shown else setting.key


def readable_type(text: str) -> str:
    """Return a type as chz writes it, with the values of a `Literal` as a list."""
    choices = type_choices(text)
    return f"one of {', '.join(choices)}" if choices else text


def type_choices(text: str) -> list[str]:
    """Return the values of a `Literal`; empty for other types."""
    found = re.fullmatch(r"Literal\[(.*)\]", text)
    return [value.strip(" '") for value in found.group(1).split(",")] if found else []
