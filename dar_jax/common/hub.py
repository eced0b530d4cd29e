"""Addresses `hf://owner/name/path` of the Hugging Face hub, resolved to local files.

The client keeps downloads in its cache and honours its environment (`HF_HOME`, `HF_HUB_OFFLINE`,
`HF_TOKEN`).
"""

import os
from collections.abc import Sequence
from typing import Any

SCHEME = "hf://"


def is_address(path: str | os.PathLike) -> bool:
    """Whether the path is an address of the hub."""
    return str(path).startswith(SCHEME)


def download_file(address: str) -> str:
    """Return the local path of the file `hf://owner/name/path/to/file`.

    Raises:
        ValueError: it names no file, or the file cannot be had.
    """
    repository, path = _split(address)
    if not path:
        raise ValueError(f"{address} names no file; expected hf://owner/name/file")
    return _download("hf_hub_download", address, repo_id=repository, filename=path)


def download_directory(address: str, files: Sequence[str]) -> str:
    """Return the local path of `hf://owner/name` or a directory in it.

    Args:
        address: the repository, or `hf://owner/name/directory`.
        files: names below the directory that are downloaded, as far as they exist.

    Raises:
        ValueError: there is no such repository, or it cannot be had.
    """
    repository, path = _split(address)
    patterns = [os.path.join(path, name) for name in files]
    root = _download("snapshot_download", address, repo_id=repository, allow_patterns=patterns)
    return os.path.join(root, path)


def _split(address: str) -> tuple[str, str]:
    """`hf://owner/name/a/b` -> `owner/name`, `a/b`."""
    owner, _, rest = address.removeprefix(SCHEME).partition("/")
    name, _, path = rest.partition("/")
    return f"{owner}/{name}", path.strip("/")


def _download(function: str, address: str, **arguments: Any) -> str:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"{address} needs huggingface_hub, which is not installed; "
            "run pip install 'dar-jax[hub]'"
        ) from error
    try:
        return getattr(huggingface_hub, function)(**arguments)
    except (OSError, ValueError, EntryNotFoundError) as error:
        # Every failure of the network or the server is an OSError in old and new clients.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot get {address}: check its name and the network, or download it by other means "
            f"and pass its path ({reason})"
        ) from error
