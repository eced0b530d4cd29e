"""Where runs, models and data are kept: which addresses are paths, and which are refused."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

ELSEWHERE = ("hf", "package")
"""Schemes of addresses that others read: `common.hub` and `common.model_dir`."""
MOUNTS = {
    "gs": "gcsfuse BUCKET DIR",
    "s3": "mount-s3 BUCKET DIR",
}
"""Commands that show a bucket as a folder."""
_ADDRESS = re.compile(r"(?:^|,)\s*(([A-Za-z][A-Za-z0-9+.-]*):/+[^,]*)")


def check_path(path: str | os.PathLike, name: str, *, known: tuple[str, ...] = ()) -> None:
    """Refuse an address that would be taken for a local path.

    Args:
        path: a path or address, or several, joined by commas.
        name: what it is, as on the command line.
        known: schemes that are read here.

    Raises:
        ValueError: it has another scheme.
    """
    for address, scheme in _ADDRESS.findall(os.fspath(path)):
        if scheme.lower() not in known:
            raise ValueError(f"{name}={address}: {_advice(scheme.lower())}")


def _advice(scheme: str) -> str:
    if scheme in MOUNTS:
        return f"no {scheme}:// here: mount the bucket ({MOUNTS[scheme]}) and give the path in DIR"
    if scheme == "file":
        return "give the path alone, without file://"
    return f"{scheme}:// is not known; give the path of a local or mounted folder"


def check_config(values: Mapping[str, Any], prefix: str) -> None:
    """Refuse addresses in a configuration that are not read.

    Args:
        values: nested, with JSON types and tuples as leaves.
        prefix: of their names on the command line.

    Raises:
        ValueError: see `check_path`.
    """
    for name, text in _texts(values, prefix):
        check_path(text, f"--{name}", known=ELSEWHERE)


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)
