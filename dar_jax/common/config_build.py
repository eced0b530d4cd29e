"""Strict construction of frozen dataclasses from nested mappings (config blocks, JSON)."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SIZE = 2**15
MAX_SIZES = {"num_classes": 2**20, "codebook_size": 2**20, "vocab_size": 2**20}
"""Largest sizes of an architecture: of tables with a row per class or code, and of all else."""
MAY_BE_ZERO = (
    *("depth", "encoder_depth", "decoder_depth", "feature_layer", "attention_levels"),
    *("num_classes", "buffer_size", "codebook_size", "output_size"),
)
MAX_INT = 2**32
"""No setting is as large, and some libraries stop at 32 bits, in silence or with a traceback."""
MAX_FLOAT = 3.4e38
"""More is infinite in float32."""


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `values`; absent keys keep the dataclass's defaults.

    Args:
        cls: a dataclass; fields that are dataclasses themselves are built from nested mappings.
        values: a mapping such as a block of a config or parsed JSON. Lists become tuples.
        where: name of the block in error messages, e.g. `"config.model"`.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a missing key, or a value that
            the dataclass refuses.
    """
    types_by_name = typing.get_type_hints(cls)
    fields = _fields(cls)
    arguments = {}
    check_keys(values, [field.name for field in fields], where)
    for key in values:
        arguments[key] = read_value(types_by_name[key], values[key], f"{where}.{key}")
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(arguments))
    if missing:
        raise ValueError(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"{where}: a size is 0, expected 1 or more: {values}") from error


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def check_keys(values: Iterable[str], valid: Sequence[str], where: str) -> None:
    """Raise ValueError, with the nearest valid key, if one of `values` is none of them."""
    for key in values:
        if key not in valid:
            nearest = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(valid)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def check_sizes(block: Any, where: str) -> None:
    """Check all whole numbers of an architecture, a dataclass, before anything is made of them.

    Raises:
        ValueError: one is zero, negative or larger than anything that can be meant.
    """
    for field in _fields(type(block)):
        name, value = f"{where}.{field.name}", getattr(block, field.name)
        if dataclasses.is_dataclass(value):
            check_sizes(value, name)
            continue
        least = 0 if field.name in MAY_BE_ZERO else 1
        most = MAX_SIZES.get(field.name, MAX_SIZE)
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not least <= size <= most:
                raise ValueError(f"{name}={size} is out of range, expected {least} to {most:,}")


def defaults_of(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that have a default, as JSON types."""
    defaults = {}
    for field in dataclasses.fields(cls):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is not dataclasses.MISSING:
            is_block = dataclasses.is_dataclass(value)
            defaults[field.name] = dataclasses.asdict(value) if is_block else value
    return defaults


def without_none(annotation: Any) -> Any:
    """The first type of a union that is not None; other annotations as they are."""
    if not isinstance(annotation, types.UnionType):
        return annotation
    return next(a for a in typing.get_args(annotation) if a is not types.NoneType)


def read_value(annotation: Any, value: Any, where: str) -> Any:
    """Check a value of a config or of JSON against an annotation; lists become tuples.

    Raises:
        ValueError: it is of another type, or no finite number.
    """
    if isinstance(annotation, types.UnionType) and type(value) in typing.get_args(annotation):
        annotation = type(value)
    annotation = without_none(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a block of keys, got {value!r}")
        return build(annotation, value, where)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        element = typing.get_args(annotation)[0]
        return tuple(read_value(element, item, where) for item in value)
    if annotation is float and type(value) is int and abs(value) <= MAX_FLOAT:
        return float(value)
    if annotation in (bool, int, float, str) and type(value) is not annotation:
        raise ValueError(f"{where}: expected {annotation.__name__}, got {value!r}")
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError(f"{where}: expected an int of at most 32 bits, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value!r}")
    if isinstance(value, float) and abs(value) > MAX_FLOAT:
        raise ValueError(f"{where}: expected a number within +-{MAX_FLOAT}, got {value!r}")
    return value
