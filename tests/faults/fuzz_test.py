"""Every key of every block with values that nobody means: accepted, or one line that names it."""

import dataclasses
import math
import typing

import jax
import ml_collections
import pytest

from dar_jax import config as config_lib
from dar_jax.common import tree
from dar_jax.common.config_build import without_none
from dar_jax.generation.config import SampleConfig, sampling_fields
from dar_jax.kinds import KINDS
from dar_jax.parallel.sharding import make_mesh
from dar_jax.training.optimizer import learning_rate_schedule
from tests.configs_test import CONFIGS

MODELS = (
    "mnist:tokenizer",
    "mnist:dar",
    "mnist:dar_distilled",
    "mnist:dar_reward",
    "mnist:kl_vae",
    "mnist:transdiff_mrar",
)
"""A config of every kind."""
INTS = (0, 1, -1, 2, 3, 7, 255, 10_000, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**20)
FLOATS = (0.0, -0.0, 0.5, -1.0, 1e-300, 1e38, 1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    "",
    " ",
    "1",
    "none",
    "gs://",
    "gs:///a",
    "s3://a/b",
    "hf://a",
    "\0",
    "nowhere",
    "a,b",
    "a\nb",
    "é",
    "\udcff",
    "(",
    "../..",
    "/dev/zero",
    "x" * 10_000,
)
OTHERS = (None, True, False, (), (0,), (-1, 2), (math.nan,), ("a",), ((1.0,), (2.0,)), {}, {"a": 1})
VALUES = (*INTS, *FLOATS, *TEXTS, *OTHERS)


def keys_of(cls, prefix=()):
    """Paths of all fields of a block, those of nested blocks included."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = (*prefix, field.name)
        nested = without_none(hints[field.name])
        if path != ("options",):  # it is made of keys of their own
            yield path
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from keys_of(nested, path)
    if cls is SampleConfig:
        yield from ((name,) for name in sampling_fields())


def variants():
    """(config, block, path of a key) of everything that there is."""
    for name in MODELS:
        kind = KINDS[CONFIGS[name]().task]
        for block, cls in (("model", kind.architecture), ("loss", kind.loss)):
            if cls is not None:
                yield name, block, cls
        if kind.draws_images:
            yield name, "sample", SampleConfig
    for block, cls in config_lib.BLOCKS.items():
        yield None, block, cls


class Values(ml_collections.ConfigDict):
    """What is read of a `ConfigDict`, which takes longer to make than to read."""

    def __init__(self, values):
        super().__init__()
        object.__setattr__(self, "values", values)

    def to_dict(self):
        return dict(self.values)


def outcome(values):
    """Build a configuration and what is made of it alone; return what is refused, or None."""
    try:
        config = config_lib.build(Values(values))
        config.to_dict(), config.bound()
        if config.task:
            config.sample.recommendation(KINDS[config.task])
        learning_rate_schedule(config.optimizer)(1)
        make_mesh(config.mesh, jax.devices()[:1])
    except ValueError as error:
        return str(error)
    return None


def changed(values, path, value):
    """A copy of nested dicts with one value changed."""
    key, *rest = path
    return {**values, key: changed(values.get(key) or {}, rest, value) if rest else value}


@pytest.mark.parametrize(("name", "block", "cls"), list(variants()))
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(name, block, cls):
    base = CONFIGS[name]().to_dict() if name else {}
    kept = ("task", "model", "loss", "tokenizer", "vae", "teacher", "reference")
    base = {key: value for key, value in base.items() if key in kept}
    assert outcome(base) is None
    accepted = refused = 0
    for path in keys_of(cls):
        for value in VALUES:
            message = outcome(changed(base, (block, *path), value))
            accepted, refused = accepted + (message is None), refused + (message is not None)
            if message is not None:
                assert len(message.splitlines()) == 1, message
                assert any(part in message for part in (path[-1], block)), (path, value, message)
    assert accepted and refused


@pytest.mark.parametrize("block", ["model", "loss", *config_lib.BLOCKS])
def test_what_is_no_block_is_refused_in_one_line(block):
    base = CONFIGS["mnist:tokenizer"]().to_dict()
    for value in VALUES:
        if not isinstance(value, dict):
            message = outcome({**base, block: value})
            assert message and len(message.splitlines()) == 1 and block in message, value


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_any_value_of_any_key_of_any_config(name):
    """Of the whole config, as a command is given it: accepted, or refused in one line."""
    base = CONFIGS[name]().to_dict()
    paths = sorted(tree.flatten(base))
    for path in (tuple(path.split(tree.SEPARATOR)) for path in paths):
        for value in VALUES:
            message = outcome(changed(base, path, value))
            if message is not None:
                assert len(message.splitlines()) == 1, message
                assert any(part in message for part in (path[-1], path[0])), (path, value, message)


def test_every_key_has_a_nearest_one():
    """A letter too few, in every block."""
    for block, cls in config_lib.BLOCKS.items():
        for field in dataclasses.fields(cls):
            if len(field.name) > 4 and field.name != "options":
                message = outcome({block: {field.name[:-1]: 0}})
                assert message is not None and "did you mean" in message, message
