"""Functions that a configuration names: where they are, and whether its arguments are ones that they take.

What an argument may be is read from its annotation: int, float, str, bool, None, unions of these, ``Literal``, or one
of them ``Annotated`` with `Limits`. Anything is allowed where there is no annotation, or another one.
"""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from sophon.errors import UserError, choose, one_line
from sophon.ranges import check

T = TypeVar("T")


class Limits(NamedTuple):
    """What an argument may be: in words that complete "it must be", and as a test of a value of the right type."""

    words: str
    fits: Callable[[Any], bool]


def function_at(path: str, key: str) -> Callable[..., Any]:
    """Import the function at a dotted path, such as ``package.module.function`` or ``package.module:function``.

    Raises:
        UserError: there is no such module, importing it fails, or it has no such function.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module may raise anything
        hint = "; give its folder as PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{key}: '{path}' cannot be imported: {one_line(error)}{_place(error)}{hint}") from error
    if not callable(function):
        raise UserError(f"{key}: '{path}' is not allowed; {module} has no function '{name}'")
    return function  # type: ignore[no-any-return]


def _place(error: Exception) -> str:
    """Return the file and line of the user's own code at which an import failed; nothing where none of it ran."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename not in _IMPORTING]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


_IMPORTING = (__file__, importlib.__file__)


def check_arguments(
    key: str, name: str, function: Callable[..., Any], given: Sequence[str], arguments: Mapping[str, Any]
) -> None:
    """Raise a `UserError` unless ``function`` can be called with ``arguments``.

    Args:
        key: the configuration key of the mapping that names the function and its arguments.
        given: names for its first, positional arguments, which it gets from elsewhere.
    """
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    except Exception as error:  # evaluating an annotation may raise anything
        raise UserError(f"{key}: the arguments of '{name}' cannot be read: {one_line(error)}") from error
    first = parameters[: len(given)]
    if len(first) < len(given) or any(parameter.kind not in _POSITIONAL for parameter in first):
        raise UserError(f"{key}: '{name}' is not allowed; it must be a function of ({', '.join(given)}, ...)")
    named = {parameter.name: parameter for parameter in parameters[len(given) :] if parameter.kind in _NAMED}
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    for argument, value in arguments.items():
        if argument in named:
            limits = _limits(named[argument].annotation)
            if not limits.fits(value):
                raise UserError(f"{key}.{argument}: {value} is not allowed; it must be {limits.words}")
        elif not anything or argument in {parameter.name for parameter in first}:
            allowed = ", ".join(sorted(named)) or "none"
            raise UserError(f"{key}.{argument}: '{name}' has no such argument; allowed: {allowed}")
    for argument, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and argument not in arguments:
            raise UserError(
                f"{key}.{argument}: missing; '{name}' needs it; it must be {_limits(parameter.annotation).words}"
            )


def named(key: str, name: str, shipped: Mapping[str, Any], kind: type | None = None) -> Any:
    """Return the function or class that a name stands for: one of ours, or that at a dotted path.

    Args:
        shipped: by name the thing itself, or the dotted path of one that is imported only when named.
        kind: the class that it must be a subclass of, if it must.

    Raises:
        UserError: it is not known, cannot be imported, or is not of that kind.
    """
    if "." not in name and ":" not in name:
        choose(key, name, [*shipped, *([] if name in shipped else ["PACKAGE.MODULE.NAME"])])
    thing = shipped.get(name, name)
    thing = function_at(thing, key) if isinstance(thing, str) else thing
    if kind is not None and not (isinstance(thing, type) and issubclass(thing, kind)):
        raise UserError(f"{key}: '{name}' is not allowed; it must be a subclass of {kind.__module__}.{kind.__name__}")
    return thing


def make(key: str, name: str, entry: Any, word: str, shipped: Mapping[str, Any], kind: type[T]) -> T:
    """Make an object of the class that an entry of a configuration names, with its arguments.

    Args:
        key: the configuration key of the entry.
        name: of the entry; of the class, too, unless the entry says which.
        entry: a mapping: under ``word`` the class, a key of ``shipped`` or a dotted path; its arguments.

    Raises:
        UserError: see `named`; or it does not take the arguments.
    """
    if not isinstance(entry, Mapping):
        raise UserError(f"{key}: {entry} is not allowed; give a mapping, such as {{{word}: {name}}}")
    arguments = {str(argument): value for argument, value in entry.items() if argument != word}
    path = str(entry.get(word, name))
    maker = named(f"{key}.{word}" if word in entry else key, path, shipped, kind)
    return filled(key, path, maker, arguments)  # type: ignore[no-any-return]


def filled(key: str, name: str, kind: type[T], arguments: Mapping[str, Any]) -> T:
    """Make a dataclass of its fields, each as `sophon.ranges` allows it.

    Raises:
        UserError: it has no such field, or one may not have its value.
    """
    check_arguments(key, name, kind, (), arguments)
    instance = kind(**arguments)
    check(instance, key)
    return instance


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KINDS = {
    bool: Limits("true or false", lambda value: isinstance(value, bool)),
    int: Limits("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: Limits(
        "a finite number",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    ),
    str: Limits("a word", lambda value: isinstance(value, str)),
    NoneType: Limits("null", lambda value: value is None),
}


def _limits(kind: Any) -> Limits:
    """Return what an annotation allows; one that is not known allows anything."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        plain = _limits(parts[0])
        own = next((part for part in parts[1:] if isinstance(part, Limits)), plain)
        return Limits(own.words, lambda value: plain.fits(value) and own.fits(value))
    if get_origin(kind) is Literal:
        return Limits(" or ".join(str(part) for part in parts), lambda value: value in parts)
    if get_origin(kind) in (Union, UnionType):
        several = [_limits(part) for part in parts]
        words = " or ".join(limits.words for limits in several)
        return Limits(words, lambda value: any(limits.fits(value) for limits in several))
    return _KINDS.get(kind, Limits("anything", lambda value: True))
