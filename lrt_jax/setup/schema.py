"""From nested mappings to typed dataclasses, with one clear sentence for every name, type or value that does not fit.

What a field may be stands beside it, in its annotation: ``keep: Positive[int] = 2``.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from lrt_jax.setup.errors import UserError

T = TypeVar("T")


class ConfigError(UserError, ValueError):
    """A config field is unknown, has the wrong type or value, or contradicts another; one sentence says which."""


class Must(NamedTuple):
    """A bound, as the annotation of a field: ``Annotated[int, Must("be even", lambda n: n % 2 == 0)]``."""

    what: str
    holds: Callable[[Any], object]


def within(low: float, high: float) -> Must:
    """The bound of a number that lies between two others, or is one of them."""
    return Must(f"be {low:,} or more, and at most {high:,}", lambda value: low <= value <= high)


Positive = Annotated[T, Must("be above 0", lambda value: value > 0)]
NotNegative = Annotated[T, Must("be 0 or more", lambda value: value >= 0)]
NotEmpty = Annotated[T, Must("not be empty", bool)]


def build(kind: type, values: Any, path: str) -> Any:
    """A dataclass from nested mappings, or from one that code has made, with every field checked.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    if isinstance(values, kind):
        values = {name: getattr(values, name) for name in fields}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} is {values!r}; it must be a group of fields")
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown_field(path, name, list(fields)))
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = checked(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name} is not set; it has no default")
    return kind(**built)


def _unknown_field(path: str, name: str, allowed: list[str]) -> str:
    """The sentence for a field that does not exist, with the nearest one that does."""
    if not allowed:
        return f"{path}.{name} is not a field; {path} is a single value"
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{path}.{name} is not a field; {hint}allowed are: {', '.join(allowed)}"


def checked(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``, within its bounds; the only conversions are int → float, list → tuple.

    Raises:
      ConfigError: naming ``where``, what was found and what is allowed.
    """
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = checked(arguments[0], value, where)
        for bound in arguments[1:]:
            if isinstance(bound, Must) and not bound.holds(value):
                raise ConfigError(f"{where} is {value!r}; it must {bound.what}")
        return value
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; allowed are: {', '.join(map(str, arguments))}")
        return value
    if origin is dict and isinstance(value, dict):
        names, items = arguments
        return {checked(names, name, where): checked(items, item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(checked(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    wanted = hint if isinstance(hint, type) else None
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value, where)
    if wanted is None or not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{where} is {value!r}; it must be {getattr(wanted, '__name__', hint)}")
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number past the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {value!r}; it must be a finite number")
    return number


def marked(kind: Any, mark: str) -> list[str]:
    """The fields of the dataclass ``kind`` with a mark among their annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())]


def field_type(kind: Any, path: str) -> Any:
    """The type of a field of the dataclass ``kind``, by its dotted path: ``model.layers`` → ``int``.

    Raises:
      ConfigError: there is no such field.
    """
    where = "config"
    for name in path.split("."):
        names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        if name not in names:
            raise ConfigError(_unknown_field(where, name, names))
        kind, where = typing.get_type_hints(kind)[name], f"{where}.{name}"
    return kind
