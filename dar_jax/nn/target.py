"""The devices that a program is traced for, which need not exist."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax

_DEVICES = contextvars.ContextVar[Sequence[Any] | None]("devices", default=None)


@contextlib.contextmanager
def traced_for(devices: Sequence[Any]) -> Iterator[None]:
    """Trace for these devices instead of those at hand."""
    here = list(devices) == jax.devices()
    if not here:
        jax.clear_caches()  # traces of the devices at hand
    token = _DEVICES.set(devices)
    try:
        yield
    finally:
        _DEVICES.reset(token)
        if not here:
            jax.clear_caches()


def traced_devices() -> Sequence[Any]:
    """Return the devices that a program is traced for."""
    return _DEVICES.get() or jax.devices()
