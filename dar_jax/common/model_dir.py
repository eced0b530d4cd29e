"""The model directory: a released model as `{config.json, model.safetensors}`.

`config.json` holds `kind`, `model` (the architecture) and whatever else sampling needs;
`model.safetensors` holds the parameters under names such as "encoder/blocks/mlp/up/kernel".
`digests.json` holds the digests of both (`common.digests`): damaged weights are refused, and of a
changed config a warning is given. A directory without it is taken as it is.
A model that needs another one, as a prior its tokenizer, holds that one's directory inside.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from absl import logging

from dar_jax.common import bucket_models, digests, hub, storage, tree
from dar_jax.common.checks import check_finite
from dar_jax.common.files import parse_json, read_regular, temporary_path, write_safetensors
from dar_jax.common.model_card import CARD_NAME, model_card
from dar_jax.common.tensors import Tensor, open_tensors, read_whole, what_is
from dar_jax.common.typing import Params

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WORKDIR_NAME = "model"
"""Subdirectory of a workdir that holds the model directory."""
SHIPPED_SCHEME = "package://"
SHIPPED = pathlib.Path(__file__).parents[1] / "shipped"
"""Small trained models that are part of the package, by name."""
MAX_CONFIG_BYTES = 2**26
MAX_LISTED = 5
MIN_FITTING = 0.5
"""Share of the parameters that a model has to have in common with another that starts from it."""


def save_model(
    directory: str | os.PathLike,
    kind: str,
    model_config: Mapping[str, Any],
    params: Params,
    extra: Mapping[str, Any],
    *,
    companions: Mapping[str, str | os.PathLike] = types.MappingProxyType({}),
    about: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Write a model directory, whole or not at all; one that exists is replaced.

    Args:
        directory: the path; its parent must exist.
        kind: the task's kind, which says how to build the model.
        model_config: the architecture, as JSON types.
        params: nested dict of arrays that this process can read whole.
        extra: further entries of `config.json`, e.g. `class_names` and `sampling`.
        companions: other model directories to copy in, by subdirectory name.
        about: facts for its card, `README.md`, by what they are called.

    Raises:
        ValueError: a parameter is not finite.
    """
    config = {"kind": kind, "model": model_config, **extra}
    arrays = {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    for name, array in arrays.items():
        check_finite(f"{directory}: parameter {name}", array)
    card = model_card(
        pathlib.PurePath(directory).name,
        kind,
        num_parameters=sum(array.size for array in arrays.values()),
        about=about,
        class_names=extra.get("class_names", ()),
        sampling=extra.get("sampling"),
    )
    with _replacing(directory) as content:
        (content / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(content / WEIGHTS_NAME, arrays)
        (content / CARD_NAME).write_text(card)
        for name, companion in companions.items():
            shutil.copytree(companion, content / name)
        digests.write(content)


@contextlib.contextmanager
def _replacing(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a folder to write to that takes the place of `directory` at the end."""
    target = storage.to_path(directory)
    if not isinstance(target, pathlib.Path):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            storage.upload_tree(pathlib.Path(folder), target, last=digests.DIGESTS_NAME)
        return
    target = target.absolute()
    temporary = temporary_path(target)
    content = temporary / "new"
    content.mkdir(parents=True)
    try:
        yield content
        if target.exists():
            # A directory cannot be renamed over another one that has files in it.
            os.rename(target, temporary / "old")
        os.rename(content, target)
    finally:
        shutil.rmtree(temporary)


def locate(path: str | os.PathLike) -> pathlib.Path:
    """Find a model directory.

    Args:
        path: the model directory, a workdir that has one, `hf://owner/name[/directory]`,
            `gs://BUCKET/DIR` or `s3://BUCKET/DIR`, which are downloaded, or
            `package://NAME[/directory]`, which comes with the package.

    Raises:
        ValueError: the download failed, the package ships no such model, or the path is none.
    """
    if not isinstance(path, str | os.PathLike) or str(path) == "" or "\0" in str(path):
        raise ValueError(f"{path!r} is no path of a model directory; pass WORKDIR/model")
    if str(path).startswith(SHIPPED_SCHEME):
        return _locate_shipped(str(path))
    path = os.path.expanduser(path)
    if hub.is_address(path):
        names = [CONFIG_NAME, WEIGHTS_NAME, digests.DIGESTS_NAME]
        names += [f"*/{name}" for name in names]  # companions
        return pathlib.Path(hub.download_directory(str(path), names))
    outer = storage.to_path(path, "model directory")
    if not isinstance(outer, pathlib.Path):
        return bucket_models.download(outer, WORKDIR_NAME)
    inner = outer / WORKDIR_NAME
    return inner if inner.is_dir() else outer


def _locate_shipped(address: str) -> pathlib.Path:
    directory = SHIPPED / address.removeprefix(SHIPPED_SCHEME)
    if not (directory / CONFIG_NAME).is_file():
        names = sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_NAME}"))
        shipped = ", ".join(f"{SHIPPED_SCHEME}{name}" for name in names)
        raise ValueError(f"{address} is not shipped; there is {shipped}")
    return directory


def load_model(directory: str | os.PathLike) -> tuple[dict[str, Any], Params]:
    """Read a model directory: its config and its parameters as NumPy arrays.

    Raises:
        ValueError: it is missing, unreadable or incomplete, or a parameter is not finite.
    """
    config = load_config(directory)
    with _open_weights(directory) as tensors:
        arrays = {name: read_whole(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        check_finite(f"{directory}: parameter {name}", array)
    return config, tree.unflatten(arrays)


def load_config(directory: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """Read the `config.json` of a model directory.

    Raises:
        ValueError: it is missing, unreadable or not of the kind that is asked for.
    """
    path = pathlib.Path(directory) / CONFIG_NAME
    try:
        config = parse_json(read_regular(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise _unreadable(directory, f"{CONFIG_NAME}: {what_is(path) or error}") from error
    if not (
        isinstance(config, dict)
        and isinstance(config.get("model"), dict)
        and isinstance(config.get("kind"), str)
    ):
        raise _unreadable(directory, f"{CONFIG_NAME} has no kind and model")
    if kind not in (None, config["kind"]):
        raise ValueError(f"{directory} holds a {config['kind']}, expected a {kind}")
    if damage := _find_damage(path.parent, CONFIG_NAME):
        logging.warning("%s: %s; what it says is taken as it is", directory, damage)
    return config


def _find_damage(directory: pathlib.Path, name: str) -> str:
    return digests.find_damage(directory, [name]) if digests.has(directory) else ""


def companion(directory: str | os.PathLike, name: str) -> pathlib.Path:
    """Return the model directory that a model directory holds as `name`.

    Raises:
        ValueError: it was written without one, or with another one.
    """
    nested = pathlib.Path(directory) / name
    if not nested.is_dir():
        raise ValueError(
            f"{directory} holds a model without its {name}: put the {name}'s model directory at "
            f"{nested}, or convert again with --config.{name}=DIR"
        )
    if damage := _find_damage(nested.parent, f"{name}/{WEIGHTS_NAME}"):
        raise ValueError(
            f"{directory} holds another {name} than it was made with ({damage}): bring that one "
            f"back, or delete {digests.DIGESTS_NAME} there if you changed it yourself"
        )
    return nested


def fingerprint(directory: str | os.PathLike) -> str:
    """Digest of a model directory and of those inside: equal if every byte is.

    Raises:
        ValueError: the directory is unreadable.
    """
    digest = hashlib.sha256()
    nested = sorted(path.parent for path in pathlib.Path(directory).glob(f"*/{CONFIG_NAME}"))
    for folder in (pathlib.Path(directory), *nested):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            try:
                digest.update(bytes.fromhex(digests.of_file(folder / name)))
            except OSError as error:
                raise _unreadable(folder, error) from error
    return digest.hexdigest()


def load_params(
    directory: str | os.PathLike,
    like: Params,
    shardings: Params | None = None,
) -> Params:
    """Read the parameters of a model directory one by one.

    Args:
        directory: the model directory.
        like: names, shapes and dtypes that they must have (dtypes are converted).
        shardings: of every parameter; each device then gets its own part of it, and nothing holds
            a whole model. None returns NumPy arrays.

    Raises:
        ValueError: the directory is unreadable, or its parameters are others than `like` or not
            finite.
    """
    leaves = tree.flatten(like)
    flat_shardings = {} if shardings is None else tree.flatten(shardings)
    with _open_weights(directory) as tensors:
        _check_fit(directory, leaves, tensors)
        return tree.unflatten(
            {
                name: _read(
                    f"{directory}: parameter {name}", tensors[name], leaf, flat_shardings.get(name)
                )
                for name, leaf in leaves.items()
            }
        )


class Fitting(NamedTuple):
    """What a model takes from another one.

    Attributes:
        params: those that fit.
        adapted: names of those of them that had to be made fit.
        lacking: the leaves that are not among them, with their shapes and what was found instead.
        unused: names of tensors that are no leaves.
    """

    params: Params
    adapted: list[str]
    lacking: list[str]
    unused: list[str]


def load_fitting(
    directory: str | os.PathLike,
    like: Params,
    shardings: Params,
    adapters: Mapping[str, Callable[..., np.ndarray]],
) -> Fitting:
    """Read those parameters of another model that fit.

    Args:
        directory: of that model.
        like: the parameters that are wanted.
        shardings: of each.
        adapters: by name, make a parameter of another shape fit: (array, shape) to an array.

    Raises:
        ValueError: the directory is unreadable, or less than half of the parameters fit.
    """
    leaves, flat_shardings = tree.flatten(like), tree.flatten(shardings)
    with _open_weights(directory) as found:
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
        fitting = {n: found[n] for n, leaf in leaves.items() if shapes.get(n) == leaf.shape}
        adapted = {
            name: adapt(read_whole(found[name]), leaves[name].shape)
            for name, adapt in adapters.items()
            if name in found and name not in fitting
        }
        adapted = {n: array for n, array in adapted.items() if array.shape == leaves[n].shape}
        fitting |= adapted
        lacking = [
            f"{name} {leaf.shape}, there {shapes.get(name, 'none')}"
            for name, leaf in leaves.items()
            if name not in fitting
        ]
        share = tree.num_parameters([leaves[n] for n in fitting]) / tree.num_parameters(like)
        if share < MIN_FITTING:
            raise ValueError(
                f"{directory} is of another architecture: {share:.0%} of the parameters fit; "
                f"lacking are {_listed(lacking)}"
            )
        params = {
            n: _read(f"{directory}: parameter {n}", part, leaves[n], flat_shardings[n])
            for n, part in fitting.items()
        }
    unused = [name for name in found if name not in leaves]
    return Fitting(tree.unflatten(params), list(adapted), lacking, unused)


def _read(
    name: str, tensor: Any, leaf: Any, sharding: jax.sharding.Sharding | None
) -> np.ndarray | jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        array = tensor[index].astype(leaf.dtype, copy=False)
        check_finite(name, array)
        return array

    if sharding is None:
        return part((slice(None),) * len(leaf.shape))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _check_fit(
    directory: str | os.PathLike, leaves: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    expected = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(f"{directory}: the weights do not fit the config: {_listed(wrong)}")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{'; '.join(items[:MAX_LISTED])}{more}"


@contextlib.contextmanager
def _open_weights(directory: str | os.PathLike) -> Iterator[dict[str, Tensor]]:
    path = pathlib.Path(directory) / WEIGHTS_NAME
    if damage := _find_damage(path.parent, WEIGHTS_NAME):
        way_out = f"delete {digests.DIGESTS_NAME} there if you changed it yourself"
        raise _unreadable(directory, f"{what_is(path) or damage}; {way_out}")
    try:
        with open_tensors(path) as tensors:
            yield tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(directory, f"{WEIGHTS_NAME}: {what_is(path) or error}") from error


def _unreadable(directory: str | os.PathLike, reason: Exception | str) -> ValueError:
    return ValueError(
        f"{directory} is not a readable model directory ({reason}); pass the one that training "
        "and convert write to WORKDIR/model"
    )
