"""Warn about deprecated names, and refuse them from the version in which they are removed."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar, cast, overload

__all__ = ["deprecated", "make_deprecated_module_getattr", "warn_deprecated"]

F = TypeVar("F", bound=Callable[..., object])


def warn_deprecated(
    name: str, *, removal_version: str | None = None, message: str = "", stacklevel: int = 2
) -> None:
    """Warn that `name` is deprecated.

    Args:
        name: Deprecated name.
        removal_version: Version of the package from which using the name is an error.
        message: What to use instead.
        stacklevel: `stacklevel` of `warnings.warn`, counted from the caller.

    Raises:
        RuntimeError: if the installed package has reached `removal_version`.
    """
    until = f" and will be removed in version {removal_version}" if removal_version else ""
    text = f"{name} is deprecated{until}. {message}".rstrip()
    if removal_version is not None and _version_key(_installed()) >= _version_key(removal_version):
        raise RuntimeError(f"{name} was removed in version {removal_version}. {message}")
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel + 1)


@overload
def deprecated(_func: F, *, message: str = "", removal_version: str | None = None) -> F: ...
@overload
def deprecated(
    _func: None = None, *, message: str = "", removal_version: str | None = None
) -> Callable[[F], F]: ...
def deprecated(
    _func: F | None = None,
    *,
    message: str = "",
    removal_version: str | None = None,
) -> F | Callable[[F], F]:
    """Decorate a function or class so that each call warns. Works with and without arguments."""

    def decorate(target: F) -> F:
        warn = functools.partial(
            warn_deprecated,
            target.__qualname__,
            removal_version=removal_version,
            message=message,
            stacklevel=2,
        )
        if isinstance(target, type):
            original = target.__init__

            @functools.wraps(original)
            def init(self: object, *args: object, **kwargs: object) -> None:
                warn()
                original(self, *args, **kwargs)

            target.__init__ = init
            return cast("F", target)

        @functools.wraps(target)
        def wrapper(*args: object, **kwargs: object) -> object:
            warn()
            return target(*args, **kwargs)

        return cast("F", wrapper)

    return decorate(_func) if _func is not None else decorate


def make_deprecated_module_getattr(
    module_name: str, attrs: dict[str, tuple[str, str | None]]
) -> Callable[[str], object]:
    """Build a module `__getattr__` that forwards moved names with a warning.

    Args:
        module_name: Name of the old module.
        attrs: Old name -> (`new.module.name`, removal version or None).
    """

    def module_getattr(name: str) -> object:
        if name not in attrs:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        target, removal_version = attrs[name]
        new_module, _, new_name = target.rpartition(".")
        warn_deprecated(
            f"{module_name}.{name}", removal_version=removal_version, message=f"Use {target}."
        )
        return getattr(importlib.import_module(new_module), new_name)

    return module_getattr


def _installed() -> str:
    try:
        return version("tinker-cookbook")
    except PackageNotFoundError:
        return "0"


def _version_key(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
