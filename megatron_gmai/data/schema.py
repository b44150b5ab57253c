"""JSON of our own files, checked against the dataclass that it is read into."""

import typing
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")


def from_json(kind: type[T], value: Any, where: str = "it") -> T:
    """An object of a dataclass, or a NamedTuple, from parsed JSON.

    Fields are such classes, `tuple[X, ...]`, `dict[str, X]`, `list[X]`, str, int (0 or more), float
    (finite, 0 or more) and bool. Raises ValueError that names the field with a wrong, a missing or
    an unknown one; nothing is converted.
    """
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return _object(kind, value, where)
    origin = get_origin(kind)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        inner = get_args(kind)[0]
        return origin(_read(inner, item, f"{where}[{n}]") for n, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no object")
        inner = get_args(kind)[1]
        return {name: _read(inner, item, f"{where}.{name:.40}") for name, item in value.items()}
    return _number_or_text(kind, value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    hints = typing.get_type_hints(kind)
    optional = getattr(kind, "_field_defaults", {})  # a NamedTuple's fields that were left out
    for name in hints.keys() - optional.keys() - value.keys():
        raise ValueError(f"{where} has no {name!r}")
    for name in value.keys() - hints.keys():
        raise ValueError(f"{where} has an unknown {name[:60]!r}")
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in value})


def _number_or_text(kind: Any, value: Any, where: str) -> Any:
    fitting = type(value) is kind or (kind is float and type(value) is int)
    if fitting and kind in (int, float):
        fitting = 0 <= value < 2**63  # false for NaN too
    if not fitting:
        raise ValueError(f"{where} cannot be {value!r:.60}")
    if kind is str:
        value.encode()  # a lone surrogate would fail later, when it is written
    return kind(value)
