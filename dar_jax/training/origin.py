"""What a run is made from, and what of it may change while the run goes on.

A checkpoint holds the configuration that it is bound to and, as `made_from`, fingerprints: of the
models and files that the run needs, of its data, and the names of its classes. What differs when
the run goes on is refused, unless `train.allow_change` names it; it is then recorded in
`WORKDIR/history.jsonl`.
"""

import datetime
import difflib
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from dar_jax.common import digests, model_dir, storage, tree
from dar_jax.common.version import version
from dar_jax.data import identity
from dar_jax.data.base import Source

MADE_FROM = "made_from"
CLASSES, DATA, FILES = "classes", "data", "files"
TIMES = "data.times"
"""A change of which is told and nothing more: files that were copied have new times."""
HISTORY_NAME = "history.jsonl"
ABSENT = "(absent)"
FIXED = ("task", "seed", "model", "loss", *(f"optimizer.{n}" for n in ("name", "trained")))
"""Keys that may never change: the state would have another form or another meaning."""
AVERAGE = "optimizer.ema_decay"
"""Without it, there is no average to go on with."""
DIGEST_LENGTH = 64
MAX_SHOWN = 60
"""Characters of a value that are shown."""


def made_from(
    companions: Mapping[str, str], files: Mapping[str, str], source: Source, num_threads: int
) -> dict[str, Any]:
    """Fingerprints of what a run is made from, as JSON types.

    Args:
        companions: paths of model directories, by the name of their key in the configuration.
        files: paths of other model directories, and of files, likewise.
        source: what is trained on.
        num_threads: readers.

    Raises:
        ValueError: a model directory cannot be read.
        OSError: a file cannot be read.
    """
    models = {n: model_dir.fingerprint(model_dir.locate(path)) for n, path in companions.items()}
    contents = {name: content_of(path) for name, path in files.items()}
    data = identity.identify(source, num_threads)
    return {**models, CLASSES: list(source.class_names), DATA: data, FILES: contents}


def content_of(path: str) -> str:
    """Fingerprint of a file or model directory.

    Raises:
        ValueError: the model directory cannot be read.
        OSError: the file cannot.
    """
    if pathlib.Path(path).is_file():
        return digests.of_file(path)
    return model_dir.fingerprint(model_dir.locate(path))


def find_changes(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Compare what a checkpoint is bound to with what a run asks for: old and new values by key.

    A model or file that is known by its fingerprint may lie anywhere. What a checkpoint that is
    older than the fingerprints was made from is not known, and no change.

    Args:
        saved: of the checkpoint, as JSON types.
        wanted: of the run.
        defaults: of both, for keys that `saved` does not know yet.
    """
    old, new = dict(saved), dict(wanted)
    old_made, new_made = old.pop(MADE_FROM, None), new.pop(MADE_FROM, None)
    if old_made is None and new_made is not None:
        logging.warning("The checkpoint does not say which data and models it was made from")
    old_made, new_made = old_made or {}, new_made or {}
    for name in old_made.keys() & new_made.keys():
        if isinstance(new.get(name), str):
            old[name], new[name] = old_made[name], new_made[name]
    old_flat, new_flat = _flatten(old), _flatten(new)
    known = _flatten(defaults)
    old_files, new_files = old_made.get(FILES, {}), new_made.get(FILES, {})
    for name in old_files.keys() & new_files.keys():
        old_flat[name], new_flat[name] = old_files[name], new_files[name]
    if old_made and new_made:
        old_flat |= _flatten({DATA: old_made[DATA], CLASSES: old_made[CLASSES]})
        new_flat |= _flatten({DATA: new_made[DATA], CLASSES: new_made[CLASSES]})
    pairs = {
        name: (old_flat.get(name, known.get(name, ABSENT)), new_flat.get(name, ABSENT))
        for name in sorted(old_flat.keys() | new_flat.keys())
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_allowed(
    changes: Mapping[str, tuple[Any, Any]], allowed: Collection[str], where: str
) -> None:
    """Say what has changed, and refuse what is not allowed to.

    Args:
        changes: see `find_changes`.
        allowed: keys, or blocks of keys.
        where: directory of the checkpoint.

    Raises:
        ValueError: a change is not allowed.
    """
    refused = []
    for name, pair in changes.items():
        text = _describe(name, *pair)
        if name == TIMES:
            logging.warning(
                "The files of the data have other times than when the run began, with the same "
                "names and sizes; as far as they were read, their contents are the same"
            )
        elif _is_below(name, allowed) and not _is_fixed(name, *pair):
            logging.warning("Changed, as config.train.allow_change says: %s", text)
        else:
            refused.append(name)
    if not refused:
        return
    # Other names have other contents.
    told = [n for n in refused if n != f"{DATA}.contents" or f"{DATA}.names" not in refused]
    texts = "; ".join(_describe(name, *changes[name]) for name in told)
    fixed = [name for name in refused if _is_fixed(name, *changes[name])]
    keys = ",".join([*allowed, *dict.fromkeys(map(_key_of, refused))])
    remedy = "" if fixed else f", or allow it by --config.train.allow_change={keys}"
    raise ValueError(
        f"{where} holds a checkpoint with {texts}; use the same config, models and data or another "
        f"workdir{remedy}"
    )


def check_keys(keys: Collection[str], bound: Mapping[str, Any]) -> None:
    """Check what may change by name.

    Args:
        keys: of `train.allow_change`.
        bound: the part of a configuration that a checkpoint is bound to.

    Raises:
        ValueError: one is no key of it, or one that may not change.
    """
    names = {CLASSES, *_flatten(bound)}
    names |= {name.partition(".")[0] for name in names}
    names = {name for name in names if not _is_below(name, FIXED)}
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1) or sorted(names)[:3]
            raise ValueError(
                f"config.train.allow_change names {key!r}, which can never change or may change "
                f"anyway; it is for keys such as {', '.join(near)}"
            )


def record(workdir: storage.Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Append what has changed to the history of a workdir.

    Raises:
        OSError: it cannot be written.
    """
    if not changes:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"time": now, "version": version(), "step": step, "changes": changes}
    storage.append(workdir / HISTORY_NAME, f"{json.dumps(line)}\n".encode())


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace(tree.SEPARATOR, "."): value
        for name, value in tree.flatten(dict(values)).items()
    }


def _is_below(name: str, keys: Collection[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _is_fixed(name: str, old: Any, new: Any) -> bool:
    """Tell whether a change leaves no way to go on."""
    is_count = name == CLASSES and ABSENT not in (old, new) and len(old) != len(new)
    is_average = name == AVERAGE and not (old and new)
    return is_count or is_average or _is_below(name, FIXED)


def _key_of(name: str) -> str:
    """The key that allows a change: fingerprints of data have none of their own."""
    return DATA if name.removeprefix(f"{DATA}.") in identity.KEYS else name


def _describe(name: str, old: Any, new: Any) -> str:
    what = identity.KEYS.get(name.removeprefix(f"{DATA}."))
    if name == CLASSES and isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} classes, where the data have {len(new)}"
        label = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        return f"other classes: label {label} was {old[label]!r} and is {new[label]!r}"
    if what is not None:
        return f"another {what} ({_short(old)}, now {_short(new)})"
    if _is_digest(old) and _is_digest(new):
        return f"another {name} ({_short(old)}, now {_short(new)})"
    return f"{name}={_short(old)}, the config has {_short(new)}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == DIGEST_LENGTH


def _short(value: Any) -> str:
    if _is_digest(value):
        return value[: digests.SHORT]
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
