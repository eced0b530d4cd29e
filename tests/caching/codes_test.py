"""Caching codes: what is written, interrupted, refused; and training from it."""

import dataclasses
import json
import os
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import mnist
from dar_jax.caching import codes as code_cache
from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.config import build as read_config
from dar_jax.data import codes, encoded, pipeline, shards
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_source
from dar_jax.data.transforms import center_crop, ten_crop
from dar_jax.kinds.loading import build_task
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.modes import cache
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.training.step import flops_per_image
from tests.random_params import random_params

PER_CLASS = 5
SIZE = 16
NUM_TOKENS = 16
CODEBOOK_SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of small pictures of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            ramp = np.linspace(0, 1, 24)[:, None] * rng.uniform(0, 255, 3)
            pixels = (ramp + rng.uniform(0, 20, (20 + i, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def save_tokenizer(path, seed):
    model = mnist.get_config("tokenizer").model
    model.image_size = SIZE
    model.update(num_tokens=NUM_TOKENS, max_tokens=NUM_TOKENS, codebook_size=CODEBOOK_SIZE)
    model.encoder.update(dim=32, depth=1)
    model.condition.update(dim=32)
    model.decoder.update(dim=16, depth=1)
    config = build(TokenizerConfig, model.to_dict(), "model")
    params = random_params(FunctionalModel(Tokenizer, config).abstract_params(), seed)
    model_dir.save_model(path, "dar_tokenizer", dataclasses.asdict(config), params, {})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    save_tokenizer(path, seed=0)
    return path


def make_config(folder, tokenizer, **data):
    config = mnist.get_config("dar")
    config.tokenizer = str(tokenizer)
    config.model.update(num_layers=1, dim=32, num_heads=2, ffn_dim=32, num_classes=2)
    config.model.update(num_tokens=NUM_TOKENS, vocab_size=CODEBOOK_SIZE)
    config.data.update(source="folder", path=str(folder), image_size=SIZE, batch_size=8)
    config.data.update(**{"test_fraction": 0.2, **data})
    config.cache.update(kind="codes", pictures_per_shard=3)
    return config


@pytest.fixture(scope="module")
def whole(folder, tokenizer, tmp_path_factory):
    """A complete cache of ten crops; not to be changed. A workdir stands for its tokenizer."""
    path = tmp_path_factory.mktemp("codes")
    cache.cache(read_config(make_config(folder, tokenizer.parent, crop="ten_crop")), str(path))
    return path


def from_codes(config, path):
    config = config.copy_and_resolve_references()
    config.data.update(source="codes", path=str(path))
    return config


def data_of(config):
    return build(DataConfig, config.data.to_dict(), "config.data")


def files(path):
    return {p.name: p.read_bytes() for p in pathlib.Path(path).glob("*.array_record")}


def test_codes_are_those_of_all_crops_in_their_order(folder, tokenizer, whole):
    config = make_config(folder, tokenizer, crop="ten_crop")
    loaded, params = model_dir.load_model(tokenizer)
    params = jax.device_put(params)
    model = FunctionalModel(Tokenizer, build(TokenizerConfig, loaded["model"], "model"))
    encode = jax.jit(lambda pixels: model.bind(params).encode(images.to_float(pixels)).indices)
    distinct = set()
    for split, crops in (("train", ten_crop), ("test", lambda p, n: center_crop(p, n)[None])):
        pictures = load_source(data_of(config), split)
        cached = load_source(data_of(from_codes(config, whole)), split)
        assert (len(cached), cached.class_names) == (len(pictures), ("cat", "dog"))
        for i in range(len(pictures)):
            expected, found = pictures[i], cached[i]
            assert found["label"] == expected["label"]
            np.testing.assert_array_equal(
                found["codes"], encode(jnp.asarray(crops(expected["pixels"], SIZE)))
            )
            distinct |= {tuple(row) for row in found["codes"].tolist()}
    assert len(distinct) > 4  # else any order of pictures and crops would do


@pytest.mark.parametrize("crop", ["center", "ten_crop"])
def test_padding_caches_every_place_that_training_draws(folder, tokenizer, tmp_path, crop):
    config = make_config(folder, tokenizer, crop=crop, padding=1, flip=True)
    data = data_of(config)
    pixels = load_source(data, "train")[0]["pixels"]
    views = code_cache.crops_of(pixels, data)
    rng = np.random.default_rng(0)
    drawn = {pipeline.augment(pixels, data, rng).tobytes() for _ in range(3000)}
    assert {view.tobytes() for view in views} == drawn
    assert len(views) == {"center": 18, "ten_crop": 180}[crop]
    cache.cache(read_config(config), str(tmp_path))
    cached = data_of(from_codes(config, tmp_path))
    assert load_source(cached, "train")[0]["codes"].shape == (len(views), NUM_TOKENS)
    assert load_source(cached, "test")[0]["codes"].shape == (1, NUM_TOKENS)
    for change in (dict(padding=0), dict(flip=False), dict(crop="random")):
        (name, value), *_ = change.items()
        with pytest.raises(ValueError, match=f"data.{name}={value!r}, but the codes in .* were"):
            load_source(dataclasses.replace(cached, **change), "train")
    config.data.padding = 0
    with pytest.raises(ValueError, match="padding"):
        cache.cache(read_config(config), str(tmp_path))


def test_loss_from_codes_equals_the_loss_of_encoding_on_the_fly(folder, tokenizer, tmp_path):
    config = make_config(folder, tokenizer, crop="center")
    cache.cache(read_config(config), str(tmp_path))
    cached = from_codes(config, tmp_path)
    batches = [next(iter(pipeline.train_iterator(data_of(c), seed=3))) for c in (config, cached)]
    assert batches[1]["codes"].shape == (8, 1, NUM_TOKENS)
    live, stored = build_task(read_config(config)), build_task(read_config(cached))
    params = jax.device_put(random_params(jax.eval_shape(live.init, jax.random.key(0))))
    frozen = jax.device_put(live.frozen())
    losses = [
        jax.jit(task.loss)(params, batch, jax.random.key(1), frozen)[0]
        for task, batch in zip((live, stored), batches, strict=True)
    ]
    assert losses[0] == losses[1] != pytest.approx(np.log(CODEBOOK_SIZE), rel=0.01)
    assert flops_per_image(stored) < flops_per_image(live)


def test_task_draws_one_crop_of_every_picture(folder, tokenizer, whole):
    task = build_task(read_config(from_codes(make_config(folder, tokenizer), whole)))
    stack = jnp.arange(3 * 10)[:, None] * jnp.ones((1, 16), jnp.int32)
    batch = {"codes": stack.reshape(3, 10, 16).astype(jnp.uint16)}
    draws = np.stack([task._indices(batch, jax.random.key(i), {})[:, 0] for i in range(40)])
    assert (draws // 10 == [0, 1, 2]).all()
    assert len(np.unique(draws[:, 0])) > 5
    assert not np.array_equal(draws[:, 0], draws[:, 1] % 10)


def test_flip_doubles_the_crops():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    config = DataConfig(image_size=SIZE, crop="center", flip=True)
    crops = code_cache.crops_of(pixels, config)
    assert len(crops) == code_cache.views_of(config).count == 2
    np.testing.assert_array_equal(crops[1], crops[0][:, ::-1])


def test_interrupted_cache_is_refused_and_finished_by_the_same_command(
    folder, tokenizer, whole, tmp_path, monkeypatch
):
    config = make_config(folder, tokenizer, crop="ten_crop")
    written = []

    def killed_after_two(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, records)

    write_shard = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        cache.cache(read_config(config), str(tmp_path))
    with pytest.raises(ValueError, match="was cut short"):
        build_task(read_config(from_codes(config, tmp_path)))
    monkeypatch.setattr(shards, "write_shard", write_shard)
    before = {path: os.stat(path).st_mtime_ns for path in written}
    cache.cache(read_config(config), str(tmp_path))
    assert {path: os.stat(path).st_mtime_ns for path in written} == before
    assert files(tmp_path) == files(whole) and len(files(tmp_path)) == 4


def test_codes_of_another_tokenizer_are_refused(folder, tokenizer, whole, tmp_path):
    save_tokenizer(tmp_path / "other", seed=1)
    config = make_config(folder, tmp_path / "other", crop="ten_crop")
    with pytest.raises(ValueError, match="codes of another tokenizer") as caught:
        build_task(read_config(from_codes(config, whole)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a cache with other tokenizer"):
        cache.cache(read_config(config), str(whole))


def test_truncated_shard_is_refused(folder, tokenizer, whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("train-*"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    config = data_of(from_codes(make_config(folder, tokenizer, crop="ten_crop"), tmp_path))
    with pytest.raises(ValueError, match="train-00000") as caught:
        load_source(config, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.source": "latents"}, "data.source='latents' has no pictures"),
        ({"data.crop": "random"}, "data.crop='random' never repeats"),
        ({"data.padding": 5}, "data.padding=5 moves a picture to 121 places"),
        ({"data.image_size": 32}, "image_size=32, but .* takes images of 16"),
        ({"tokenizer": "/nowhere"}, "/nowhere is not a readable model directory"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, tokenizer, tmp_path, change, message):
    config = make_config(folder, tokenizer)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message) as caught:
        cache.cache(read_config(config), str(tmp_path / "new"))
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_sidecar_says_what_the_codes_are(whole, tokenizer):
    sidecar = json.loads((whole / shards.SIDECAR_NAME).read_text())
    assert sidecar["tokenizer"] == model_dir.fingerprint(tokenizer)
    assert sidecar["counts"] == {"train": [3, 3, 2], "test": [2]}
    assert (sidecar["crop"], sidecar["class_names"]) == ("ten_crop", ["cat", "dog"])


def test_record_keeps_all_16_bits(tmp_path):
    values = np.array([[0, 1, 65535], [7, 256, 32768]])
    path = tmp_path / "one.array_record"
    shards.write_shard(path, [codes.FORM.pack(values, label=3)])
    records = grain.sources.ArrayRecordDataSource([str(path)])
    source = encoded.CachedSource(records, codes.FORM, (3,), class_names=("a", "b", "c", "d"))
    np.testing.assert_array_equal(source[0]["codes"], values)
    assert source[0]["label"] == 3
