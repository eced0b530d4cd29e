"""Addresses of buckets: which are read, which are not, and what they need."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Service(NamedTuple):
    """Of buckets: what its client needs, and what is told to users of it.

    Attributes:
        package: that the client stands on.
        extra: of this package, which installs that.
        client: module of the client, beside this one.
        login: how to get at credentials.
        mount: command that shows a bucket as a folder.
    """

    package: str
    extra: str
    client: str
    login: str
    mount: str


SERVICES = {
    "gs": Service(
        package="gcsfs",
        extra="gcs",
        client="google_buckets",
        login="run gcloud auth application-default login",
        mount="gcsfuse BUCKET DIR",
    ),
    "s3": Service(
        package="s3fs",
        extra="s3",
        client="amazon_buckets",
        login="set AWS_PROFILE or run aws configure; AWS_ENDPOINT_URL names a service that is not "
        "AWS's",
        mount="mount-s3 BUCKET DIR",
    ),
}
"""By scheme, the buckets that are read and written."""
BUCKETS = tuple(SERVICES)
ELSEWHERE = ("hf", "package")
"""Schemes of addresses that others read: `common.hub` and `common.model_dir`."""
MODEL_KEYS = (
    *("tokenizer", "vae", "train.init_from", "sample.model", "sample.untrained_model"),
    *("benchmark.model", "evaluate.weights", "loss.dinov2", "loss.lpips"),
)
"""Keys of a configuration that name a model directory."""
FILE_KEYS = ("data.classes", "data.references", "evaluate.reference", "evaluate.images")
"""Keys of a configuration that name a file."""
DATA_KEY = "data.path"
"""Key of the data, which are read through a local copy (`data.mirror`)."""
_ADDRESS = re.compile(r"(?:^|,)\s*(([A-Za-z][A-Za-z0-9+.-]*):/+[^,]*)")
_IN_BUCKET = re.compile(r"[a-z0-9]+://[a-z0-9][\w.-]+(/|$)")


def check_path(path: str | os.PathLike, name: str, *, known: tuple[str, ...] = ()) -> None:
    """Refuse an address that would be taken for a local path.

    Args:
        path: a path or address, or several, joined by commas.
        name: what it is, as on the command line.
        known: schemes that are read here.

    Raises:
        ValueError: it has another scheme, names no bucket, or needs what is not installed.
    """
    for address, scheme in _ADDRESS.findall(os.fspath(path)):
        if scheme not in known:
            raise ValueError(f"{name}={address}: {_advice(scheme.lower())}")
        if scheme in BUCKETS and not _IN_BUCKET.match(address):
            raise ValueError(f"{name}={address}: expected {scheme}://BUCKET/DIR")
        if scheme in BUCKETS and importlib.util.find_spec(SERVICES[scheme].package) is None:
            package, extra, *_ = SERVICES[scheme]
            raise ValueError(
                f"{name}={address} needs {package}, which is not installed; run pip install "
                f"'dar-jax[{extra}]'"
            )


def _advice(scheme: str) -> str:
    if scheme in SERVICES:
        return (
            f"no {scheme}:// here: mount the bucket ({SERVICES[scheme].mount}) and give the path "
            "below DIR"
        )
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
    models = [f"{prefix}.{key}" for key in MODEL_KEYS]
    convert = values.get("convert")
    if isinstance(convert, Mapping) and convert.get("to") == "torch":
        models.append(f"{prefix}.convert.source")
    readable = (*models, *(f"{prefix}.{key}" for key in (*FILE_KEYS, DATA_KEY)))
    for name, text in _texts(values, prefix):
        known = (*ELSEWHERE, *BUCKETS) if name in readable else ELSEWHERE
        check_path(text, f"--{name}", known=known)


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)


def scheme_of(path: str | os.PathLike) -> str:
    """Return the scheme of an address of a bucket; "" of a local path."""
    scheme, colon, _ = os.fspath(path).partition("://")
    return scheme if colon else ""


def service_of(path: str | os.PathLike) -> Service:
    """Return the service that an address of a bucket names."""
    return SERVICES[scheme_of(path)]
