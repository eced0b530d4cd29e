"""The configuration: read once, strictly, and every key of it from the command line."""

import dataclasses
import sys
import typing
from unittest import mock

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, mnist
from dar_jax import config as config_lib
from dar_jax.config import build as read_config
from tests.configs_test import CONFIGS


def keys_of(config, prefix="config"):
    """Path and key type of every key that is not a block."""
    for name in config:
        path, value = f"{prefix}.{name}", config[name]
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys_of(value, path)
        else:
            yield path, config.get_type(name)


def parse(config, arguments):
    """What a command line makes of a configuration."""
    values, argv = flags.FlagValues(), ["program", *arguments]
    with mock.patch.object(sys, "argv", argv):  # where the flags of keys are looked for
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values)
        values(argv)
    return holder.value


EXAMPLES = {int: "7", float: "0.25", str: "text", bool: "True", tuple: "(1,2)"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_can_be_set_on_the_command_line(name):
    """One flag for each, also for those whose default is None."""
    config = CONFIGS[name]()
    keys = list(keys_of(config))
    assert len(keys) > 100
    parsed = parse(config, [f"--{path}={EXAMPLES[kind]}" for path, kind in keys])
    expected = {int: 7, float: 0.25, str: "text", bool: True, tuple: (1, 2)}
    for path, kind in keys:
        value = parsed
        for part in path.split(".")[1:]:
            value = value[part]
        assert value == expected[kind], path


def test_keys_that_are_none_by_default_reach_the_model():
    arguments = (
        "--config.model.caption_dim=16 --config.model.num_kv_heads=2 --config.sample.num_steps=4 "
        "--config.sample.guidance_scale=(1.5,3) --config.sample.guidance_interval=(0,7)"
    )
    config = read_config(parse(mnist.get_config("dar"), arguments.split()))
    assert (config.model.caption_dim, config.model.num_kv_heads) == (16, 2)
    assert config.sample.options == {
        "guidance_scale": (1.5, 3.0),
        "guidance_interval": (0, 7),
        "num_steps": 4,
        "solver": "euler",
    }
    tokenizer = parse(
        mnist.get_config("tokenizer"),
        ["--config.model.tokens_per_step=8", "--config.model.decoder.feature_layer=2"],
    )
    model = read_config(tokenizer).model
    assert (model.tokens_per_step, model.decoder.feature_layer) == (8, 2)


MISTAKES = {
    "block": ({"sampel": {}}, r"config: unknown key 'sampel'; did you mean 'sample'"),
    "block of another task": ({"vae": "x"}, r"config: unknown key 'vae'; "),
    "key": ({"train.step": 3}, r"config\.train: unknown key 'step'; did you mean 'steps'"),
    "option": (
        {"sample.temprature": 1.0},
        r"config\.sample: unknown key 'temprature'; did you mean 'temperature'",
    ),
    "nested key": (
        {"model.num_head": 3},
        r"config\.model: unknown key 'num_head'; did you mean 'num_heads'",
    ),
    "seed": ({"seed": "a"}, r"config\.seed: expected int, got 'a'"),
    "task": ({"task": "dance"}, r"config\.task='dance': unknown kind 'dance' must be one of dar_"),
}


def with_values(values):
    """The config of D-AR with other values, by path, whatever their types."""
    config = mnist.get_config("dar").to_dict()
    for path, value in values.items():
        *blocks, key = path.split(".")
        place = config
        for block in blocks:
            place = place[block]
        place[key] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_as_it_is_typed(name):
    values, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_config(with_values(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", {"dar": 1}, r"config\.task: expected str, got \{'dar': 1\}"),
        ("task", 0, r"config\.task: expected str, got 0"),
        ("train.steps", "many", r"config\.train\.steps: expected int, got 'many'"),
        ("sample.temperature", "hot", r"config\.sample\.temperature: expected float, got 'hot'"),
        ("sample.labels", 3, r"config\.sample\.labels: expected a list, got 3"),
        ("model.num_layers", 2.5, r"config\.model\.num_layers: expected int, got 2\.5"),
        ("data", 3, r"config\.data: expected a block of keys, got 3"),
    ],
)
def test_value_of_another_type_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(with_values({path: value}))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learning_rate", float("nan"), r"expected a finite number, got nan"),
        ("optimizer.learning_rate", 1e39, r"expected a number within \+-3.4e\+38, got 1e\+39"),
        ("optimizer.learning_rate", 10**400, r"learning_rate: expected float, got 1000"),
        ("sample.temperature", float("nan"), r"expected a finite number, got nan"),
        ("sample.guidance_scale", float("inf"), r"expected a finite number, got inf"),
        ("sample.guidance_scale", (1.0, float("inf")), r"expected a finite number, got inf"),
        ("seed", -1, r"config\.seed=-1 must be in 0\.\.4294967295"),
        ("seed", 2**32, r"config\.seed=4294967296 must be in 0\.\.4294967295"),
        (
            "sample.seed",
            10**20,
            r"config\.sample\.seed: expected an int of at most 32 bits, got 1000000",
        ),
    ],
)
def test_number_that_would_be_misread_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(with_values({path: value}))


def test_missing_companion_is_one_line():
    config = mnist.get_config("dar")
    del config.tokenizer
    with pytest.raises(ValueError, match=r"config\.tokenizer is missing: name the model directory"):
        read_config(config)


def test_bare_config_needs_no_task():
    config = read_config(common.base())
    assert (config.task, config.model, config.companions) == ("", None, {})
    assert config == config_lib.Config()


def test_block_of_every_class_stands_once():
    """What a checkpoint is bound to is said of every block."""
    blocks = {f.name for f in dataclasses.fields(config_lib.Config) if "bound" in f.metadata}
    assert blocks == set(config_lib.BLOCKS) == set(common.base()) - {"task", "seed"}


def test_what_a_run_is_bound_to():
    config = read_config(mnist.get_config("dar"))
    blocks = {"model", "data", "optimizer", "train"}
    assert config.bound().keys() == {"task", "seed", "tokenizer", *blocks}
    assert "path" not in config.bound()["data"] and config.bound()["train"] == {"init_from": ""}
    defaults = config.bound_defaults()
    assert defaults.keys() == blocks
    hints = typing.get_type_hints(type(config.data))
    assert defaults["data"].keys() == hints.keys()


def test_json_has_the_layout_of_a_config_file():
    config = mnist.get_config("dar")
    values = read_config(config).to_dict()
    assert values["tokenizer"] == config.tokenizer
    assert values["sample"]["solver"] == "euler" and "options" not in values["sample"]
    assert read_config(ml_collections.ConfigDict(values)) == read_config(config)
