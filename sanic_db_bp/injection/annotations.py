"""The types of a callable's parameters, as what is injected goes by them."""

from __future__ import annotations

import functools
import inspect
from inspect import isclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..exceptions import ConfigurationError

UNIONS = (Union, UnionType)


def hints_of(function: Any, name: str | None = None) -> dict[str, Any]:
    """Return the types of a callable's parameters, without those that are bound already.

    Args:
        function: a function, method, class, callable object or ``functools.partial`` of one.
        name: what to call it in an error; without it, what cannot be resolved is left out.

    Raises:
        ConfigurationError: an annotation that names a session or a database cannot be resolved.
    """
    left = _unbound(function) if isinstance(function, functools.partial) else None
    while isinstance(function, functools.partial):
        function = function.func
    target = function
    if isclass(function):
        target = function.__init__
    elif not inspect.isroutine(function) and "__annotations__" not in getattr(
        function, "__dict__", {}
    ):
        target = type(function).__call__
    try:
        hints = get_type_hints(target)
    except (NameError, TypeError) as error:
        if name is not None:
            _explain(target, name, error)
        return {}
    hints.pop("return", None)
    return hints if left is None else {name: hints[name] for name in left & hints.keys()}


def _unbound(partial: functools.partial[Any]) -> set[str]:
    parameters = inspect.signature(partial).parameters.values()
    return {each.name for each in parameters if each.name not in partial.keywords}


def _explain(target: Any, name: str, error: Exception) -> None:
    annotations = getattr(target, "__annotations__", {})
    if any("Session" in str(text) or "Database" in str(text) for text in annotations.values()):
        raise ConfigurationError(
            f"The annotations of {name} cannot be resolved: {error}. What is "
            "injected must be imported where the app runs, not under TYPE_CHECKING alone.",
            entry="unresolved-annotations",
        ) from error


def without_none(annotation: Any) -> Any:
    """Return X for ``X | None``, anything else as it is."""
    if get_origin(annotation) in UNIONS:
        rest = [argument for argument in get_args(annotation) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation
