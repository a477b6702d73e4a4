"""The scope of recorded SDK calls: keys that tell which run, step or rollout a call belongs to.

    with capture(run_id="r1", iteration=3):
        with capture(group_idx=0, traj_idx=5):
            ...                       # calls here carry all four keys

    @capture(purpose="grading")
    async def grade(...): ...

A scope follows the code into tasks of asyncio; `propagate` makes it follow into threads.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType, TracebackType
from typing import ParamSpec, TypeAlias, TypeVar, cast

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["RESERVED_KEYS", "ScopeValue", "capture", "current_scope", "replace_scope"]

ScopeValue: TypeAlias = str | int | float | bool | None
RESERVED_KEYS: frozenset[str] = frozenset(
    {"run_id", "run_attempt", "split", "iteration", "group_idx", "traj_idx", "purpose"}
)
"""Keys whose meaning is fixed; programs may add others."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_EMPTY: Mapping[str, ScopeValue] = MappingProxyType({})
_scope: ContextVar[Mapping[str, ScopeValue]] = ContextVar("capture_scope", default=_EMPTY)


def current_scope() -> Mapping[str, ScopeValue]:
    """Return the keys of all scopes that the code runs in; inner ones win. It cannot be changed."""
    return _scope.get()


class capture:
    """Adds keys to the scope, as a context manager or a decorator of functions."""

    def __init__(self, **pairs: ScopeValue) -> None:
        """Name the keys.

        Raises:
            ConfigurationError: a value is not a text, a number, a truth value or None.
        """
        _check(pairs)
        self._pairs = pairs
        self._tokens: list[Token[Mapping[str, ScopeValue]]] = []

    def __enter__(self) -> Mapping[str, ScopeValue]:
        scope = MappingProxyType({**_scope.get(), **self._pairs})
        self._tokens.append(_scope.set(scope))
        return scope

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _scope.reset(self._tokens.pop())

    def __call__(self, func: Callable[_P, _R]) -> Callable[_P, _R]:
        """Return the function, whose calls run in the scope."""
        pairs = self._pairs
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def run_async(*args: _P.args, **kwargs: _P.kwargs) -> object:
                with capture(**pairs):
                    return await func(*args, **kwargs)

            return cast("Callable[_P, _R]", run_async)

        @functools.wraps(func)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with capture(**pairs):
                return func(*args, **kwargs)

        return run


@contextlib.contextmanager
def replace_scope(pairs: Mapping[str, ScopeValue]) -> Iterator[Mapping[str, ScopeValue]]:
    """Run code in a scope of these keys only, for instance a scope that came from elsewhere.

    Raises:
        ConfigurationError: as `capture`.
    """
    _check(pairs)
    token = _scope.set(MappingProxyType(dict(pairs)))
    try:
        yield _scope.get()
    finally:
        _scope.reset(token)


def _check(pairs: Mapping[str, object]) -> None:
    for key, value in pairs.items():
        if not isinstance(value, str | int | float | bool | None):
            raise ConfigurationError(
                f"{key}={str(value)[:80]} of the capture scope is a {type(value).__name__}; use a "
                "text, a number, a truth value or None."
            )
