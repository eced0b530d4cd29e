"""Captions from the folder to the picture: written with codes, trained on, drawn from prompts."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.caching import codes as code_cache
from dar_jax.config import build as read_config
from dar_jax.data import codes, pipeline, shards
from dar_jax.data.sources import load_source
from dar_jax.kinds.loading import build_task
from dar_jax.models.text.encoder import open_encoder
from dar_jax.modes import cache, train
from tests import tiny_text
from tests.caching import codes_test

T = 8
"""Tokens of a caption."""
BFLOAT16_RTOL = 2**-8
make_config, from_codes, data_of = codes_test.make_config, codes_test.from_codes, codes_test.data_of
folder, tokenizer = codes_test.folder, codes_test.tokenizer


def texts_of(name, number):
    """Captions of a picture, of which there are one or two."""
    return [f"a {name} {tiny_text.WORDS[number]}", "the big one"][: 1 + number % 2]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return tiny_text.save(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def captioned(folder):
    for path in folder.glob("*/*.png"):
        path.with_suffix(".txt").write_text("\n".join(texts_of(path.parent.name, int(path.stem))))
    return folder


def text_config(folder, tokenizer, encoder, **data):
    config = make_config(folder, tokenizer, crop="ten_crop", captions=True, **data)
    config.model.update(
        caption_dim=tiny_text.DIM, condition_tokens=T, text_encoder=str(encoder), num_classes=1
    )
    return config


@pytest.fixture
def config(captioned, tokenizer, encoder):
    return text_config(captioned, tokenizer, encoder)


@pytest.fixture(scope="module")
def whole(captioned, tokenizer, encoder, tmp_path_factory):
    """A complete cache; not to be changed."""
    path = tmp_path_factory.mktemp("codes")
    cache.cache(read_config(text_config(captioned, tokenizer, encoder)), str(path))
    return path


def test_cache_has_the_features_of_every_caption(config, whole, encoder):
    text_encoder = open_encoder(str(encoder), T)
    for split in ("train", "test"):
        pictures = load_source(data_of(config), split)
        cached = load_source(data_of(from_codes(config, whole)), split)
        assert len(cached) == len(pictures) > 0
        for index in range(len(pictures)):
            name, number = pictures.path(index).parts[-2], int(pictures.path(index).stem)
            expected, mask = text_encoder.encode(texts_of(name, number))
            found = cached[index]
            np.testing.assert_array_equal(found["caption_mask"], mask)
            assert found["captions"].dtype == jnp.bfloat16
            np.testing.assert_allclose(
                found["captions"].astype(np.float32), expected, rtol=BFLOAT16_RTOL
            )


def test_codes_are_those_of_a_cache_without_captions(config, whole, tmp_path):
    config.data.captions = False
    config.model.update(caption_dim=None, condition_tokens=1)
    cache.cache(read_config(config), str(tmp_path))
    plain = load_source(data_of(from_codes(config, tmp_path)), "train")
    config.data.captions = True
    cached = load_source(data_of(from_codes(config, whole)), "train")
    for index in range(len(plain)):
        for name in ("codes", "label"):
            np.testing.assert_array_equal(cached[index][name], plain[index][name])


def test_one_caption_is_drawn_for_every_picture(config, whole):
    data = data_of(from_codes(config, whole))
    batches = pipeline.train_iterator(data, seed=0)
    lengths = {}
    for _ in range(8):
        batch = next(batches)
        assert batch["captions"].shape == (8, T, tiny_text.DIM)
        for code, mask in zip(batch["codes"], batch["caption_mask"], strict=True):
            lengths.setdefault(code.tobytes(), set()).add(int(mask.sum()))
    assert {len(seen) for seen in lengths.values()} <= {1, 2}
    (held_out,) = pipeline.eval_batches(data, "test")
    assert held_out["captions"].shape[1:] == (T, tiny_text.DIM)


def test_interrupted_cache_is_finished_and_the_same(config, whole, tmp_path, monkeypatch):
    write_shard, written = shards.write_shard, []

    def killed_after_two(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, records)

    monkeypatch.setattr(shards, "write_shard", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        cache.cache(read_config(config), str(tmp_path))
    monkeypatch.setattr(shards, "write_shard", write_shard)
    before = {path: os.stat(path).st_mtime_ns for path in written}
    cache.cache(read_config(config), str(tmp_path))
    assert {path: os.stat(path).st_mtime_ns for path in written} == before
    assert codes_test.files(tmp_path) == codes_test.files(whole)


def test_task_trains_on_captions_and_knows_their_encoder(config, whole, encoder):
    task = build_task(read_config(from_codes(config, whole)))
    assert task.model_config()["text_digest"] == open_encoder(str(encoder), T).digest
    batch = next(pipeline.train_iterator(data_of(from_codes(config, whole)), seed=0))
    expected = task.abstract_batch(8)
    assert {n: a.dtype for n, a in batch.items()} == {n: s.dtype for n, s in expected.items()}
    batch = jax.tree.map(jnp.asarray, batch)
    params = task.init(jax.random.key(0))
    value, outputs = jax.jit(task.loss)(params, batch, jax.random.key(1), task.frozen())
    assert np.isfinite(value) and set(outputs) == {"token_accuracy"}
    (panel,) = task.pictures(params, batch, jax.random.key(0), task.frozen()).values()
    assert len(panel.cells) == len(panel.labels) == 8 and panel.draw(["x"]).any()


@pytest.mark.slow
def test_classes_of_captioned_pictures_do_not_matter(config, whole, tmp_path):
    assert len(load_source(data_of(from_codes(config, whole)), "train").class_names) == 2
    assert config.model.num_classes == 1
    config = from_codes(config, whole)
    config.train.update(steps=2, image_every=0)
    train.train_and_evaluate(read_config(config), str(tmp_path))
    assert (tmp_path / "model" / "config.json").exists()


MISTAKES = {
    "pictures": (
        lambda config, whole: config.data.update(source="folder"),
        "captions are encoded before training",
    ),
    "classes": (lambda c, _: c.data.update(captions=False), "captions=False do not fit"),
    "model": (
        lambda c, _: c.model.update(caption_dim=None, condition_tokens=1),
        "caption_dim=None and",
    ),
    "width": (lambda c, _: c.model.update(caption_dim=13), "makes 12 features .*caption_dim=13"),
    "length": (
        lambda c, _: c.model.update(condition_tokens=9),
        "condition_tokens=8, .*condition_tokens=9",
    ),
    "none": (lambda c, _: c.model.update(text_encoder=""), "the model names no text encoder"),
    "unknown": (lambda c, _: c.model.update(text_encoder="clip"), "unknown text encoder 'clip'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line(name, config, captioned, whole):
    change, message = MISTAKES[name]
    config = from_codes(config, whole)
    change(config, whole)
    if config.data.source == "folder":
        config.data.path = str(captioned)
    with pytest.raises(ValueError, match=message) as caught:
        build_task(read_config(config))
    assert "\n" not in str(caught.value)


def test_captions_of_another_encoder_are_refused(config, whole, tmp_path):
    pytest.importorskip("tokenizers")
    config.model.text_encoder = str(tiny_text.save(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"were encoded with text_digest=\w+, but the model has"):
        build_task(read_config(from_codes(config, whole)))
    with pytest.raises(ValueError, match="holds a cache with other captions"):
        cache.cache(read_config(config), str(whole))


def test_cache_of_the_other_form_is_refused(config, whole):
    config.data.captions = False
    with pytest.raises(ValueError, match="captions=False, but the codes in .* with captions"):
        load_source(data_of(from_codes(config, whole)), "train")


def test_damaged_records_are_refused(tmp_path, whole, config):
    sidecar = json.loads((whole / shards.SIDECAR_NAME).read_text())
    source = load_source(data_of(from_codes(config, whole)), "train")
    record = source.records[0]
    for damaged in (record[:-2], record + b"xx", b"", record[:9], b"\xff" * len(record)):
        broken = dataclasses.replace(source, records=[damaged])
        with pytest.raises(ValueError, match="record 0 of the codes .*--mode=cache"):
            broken[0]
    sidecar["captions"]["caption_dim"] = "many"
    (tmp_path / shards.SIDECAR_NAME).write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match="expected what their encoder is") as caught:
        load_source(data_of(from_codes(config, tmp_path)), "train")
    assert "\n" not in str(caught.value)


def test_record_keeps_codes_and_captions():
    rng = np.random.default_rng(0)
    values, mask = rng.integers(0, 65536, (3, 5)), np.arange(4) >= [[1], [3], [0]]
    features = rng.normal(size=(3, 4, 2)).astype(jnp.bfloat16) * mask[..., None]
    record = codes.pack_captioned(values, 1, features.astype(np.float32), mask)
    source = codes.CaptionedSource([record], codes.FORM, (5,), ("a", "b"), text_shape=(4, 2))
    found = source[0]
    np.testing.assert_array_equal(found["codes"], values)
    np.testing.assert_array_equal(found["captions"], features)
    np.testing.assert_array_equal(found["caption_mask"], mask)
    assert found["label"] == 1 and code_cache.CAPTIONS in found
