"""Signatures and docstrings that list the options which `**options` stands for."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from dar_jax.common.typing import Any

F = TypeVar("F", bound=Callable)
ATTRIBUTES = "\n\nAttributes:\n"
ARGUMENTS = "\n\nArgs:\n"


def takes_options(
    options: type, like: Callable | None = None, without: Sequence[str] = ()
) -> Callable[[F], F]:
    """List the fields of a dataclass in place of `**options`, for `help` and completion.

    Their default is shown as `...`, since it is the model's own. Types are left to the docstring,
    where their shapes are.

    Args:
        options: the dataclass.
        like: a function whose other arguments `**options` stands for, too.
        without: those of them that it does not stand for.
    """

    def decorate(function: F) -> F:
        shown: Any = function
        parameters = dict(inspect.signature(like or function).parameters)
        parameters.pop("options", None)
        for field in dataclasses.fields(options):
            parameters[field.name] = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=_Own()
            )
        for name in without:
            del parameters[name]
        shown.__signature__ = inspect.Signature(
            [
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in parameters.values()
            ]
        )
        text = inspect.getdoc(function) or ""
        if like is not None:
            text += ARGUMENTS + (inspect.getdoc(like) or "").partition(ARGUMENTS)[2]
        else:
            text += "\n\nOptions, by default the model's own (`pipeline.sampling`):\n"
            text += "\n".join(filter(None, map(_attributes, reversed(options.__mro__))))
        for name in without:
            text = re.sub(rf"\n {{4}}{name}: .*(\n {{8}}.*)*", "", text)
        shown.__doc__ = text
        return function

    return decorate


class _Own:
    """A default that each model has its own of."""

    def __repr__(self) -> str:
        return "..."


def _attributes(cls: type) -> str:
    """What the docstring of a class itself says of its attributes."""
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition(ATTRIBUTES)[2]
