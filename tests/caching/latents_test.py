"""Caching latents: what is written, drawn and refused; and the published layout."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist
from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.config import build as read_config
from dar_jax.data import latents, pipeline, references, shards
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_source
from dar_jax.data.transforms import center_crop, mirror
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.modes import cache
from dar_jax.nn.functional_model import FunctionalModel
from tests.data import tiny_sets

SIZE = 16
VAE = KlVaeConfig(
    width=4,
    width_factors=(1, 2),
    num_blocks=1,
    attention_levels=(),
    latent_channels=2,
    num_groups=2,
)
SHAPE = (8, 8, 4)
ROUNDING = 1e-5  # another batch size may be computed in another order


def save_vae(path, seed):
    params = FunctionalModel(KlVae, VAE).init(jax.random.key(seed))
    model_dir.save_model(path, "kl_vae", dataclasses.asdict(VAE), params, {})
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "model", seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures of noise in each of three classes: none is its own mirror image."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(tiny_sets.NUM_PICTURES):
        path = root / tiny_sets.CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE + number % 5, SIZE + number % 3, 3), dtype=np.uint8)
        path.write_bytes(tiny_sets.to_png(pixels))
    return root


def make_config(folder, vae, **data):
    config = mnist.get_config("transdiff")
    config.vae = str(vae)
    config.data.update(source="folder", path=str(folder), image_size=SIZE, batch_size=12, padding=0)
    config.data.update(**{"test_fraction": 0.1, "num_threads": 2, **data})
    config.cache.update(kind="latents", pictures_per_shard=10)
    return config


@pytest.fixture(scope="module")
def whole(folder, vae, tmp_path_factory):
    """A complete cache; not to be changed."""
    path = tmp_path_factory.mktemp("latents")
    cache.cache(read_config(make_config(folder, vae)), str(path))
    return path


def data_of(config, **changes):
    return dataclasses.replace(build(DataConfig, config.data.to_dict(), "config.data"), **changes)


def from_cache(config, path, **changes):
    return data_of(config, source="latents", path=str(path), **changes)


@pytest.fixture(scope="module")
def published(folder, vae, tmp_path_factory):
    """The training pictures' latents in the published layout."""
    root = tmp_path_factory.mktemp("published")
    config = make_config(folder, vae)
    source, cached = load_source(data_of(config), "train"), None
    path = tmp_path_factory.mktemp("source")
    cache.cache(read_config(config), str(path))
    cached = load_source(from_cache(config, path), "train")
    for index, name in enumerate(source.paths):
        file = root / f"{name}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        moments = cached[index]["moments"].transpose(0, 3, 1, 2)
        np.savez(file, moments=moments[0], moments_flip=moments[1])
    return root


def test_moments_are_those_of_the_crop_and_its_mirror(folder, vae, whole):
    config = make_config(folder, vae)
    loaded, params = model_dir.load_model(vae)
    model = FunctionalModel(KlVae, build(KlVaeConfig, loaded["model"], "model"))
    encode = jax.jit(lambda p, pixels: model.bind(p).encode(images.to_float(pixels)))
    for split in ("train", "test"):
        pictures = load_source(data_of(config), split)
        cached = load_source(from_cache(config, whole), split)
        assert (len(cached), cached.class_names) == (len(pictures), tiny_sets.CLASSES)
        for i in (0, len(pictures) - 1):
            crop = center_crop(pictures[i]["pixels"], SIZE)
            found = cached[i]
            expected = encode(params, jnp.stack([crop, mirror(crop)]))
            assert found["moments"].shape == (2, *SHAPE) and found["moments"].dtype == np.float32
            np.testing.assert_allclose(found["moments"], expected, atol=ROUNDING)
            assert found["label"] == pictures[i]["label"]


def test_command_resumes_and_repeats_nothing(folder, vae, whole, tmp_path):
    config = make_config(folder, vae)
    cache.cache(read_config(config), str(tmp_path))
    names = sorted(path.name for path in tmp_path.glob("*.array_record"))
    assert names == sorted(path.name for path in whole.glob("*.array_record")) and len(names) > 2
    kept, lost = (tmp_path / name for name in names[:2])
    lost.unlink()
    sidecar = json.loads((tmp_path / shards.SIDECAR_NAME).read_text())
    (tmp_path / shards.SIDECAR_NAME).write_text(json.dumps({**sidecar, "complete": False}))
    before = os.stat(kept).st_mtime_ns
    cache.cache(read_config(config), str(tmp_path))
    assert os.stat(kept).st_mtime_ns == before and lost.exists()
    assert json.loads((tmp_path / shards.SIDECAR_NAME).read_text()) == sidecar


@pytest.mark.parametrize("source", ["latents", "latent_folder"])
def test_training_draws_one_of_the_two_versions(folder, vae, whole, published, source):
    path = whole if source == "latents" else published
    config = from_cache(make_config(folder, vae), path, flip=True)
    config = dataclasses.replace(config, source=source)
    records = load_source(config, "train")
    both = np.stack([records[i]["moments"] for i in range(len(records))])

    def versions(batch):
        """Which version of which record every row is."""
        gaps = np.abs(both[None] - batch["moments"][:, None, None]).max(axis=(3, 4, 5))
        assert (gaps.min(axis=(1, 2)) == 0).all()
        return [np.unravel_index(np.argmin(gap), gap.shape) for gap in gaps]

    iterator = pipeline.train_iterator(config, seed=0)
    batches = [next(iterator) for _ in range(4)]
    iterator.close()
    assert batches[0]["moments"].shape == (12, *SHAPE)
    drawn = [version for batch in batches for _, version in versions(batch)]
    assert 0.2 < np.mean(drawn) < 0.8
    plain = pipeline.train_iterator(dataclasses.replace(config, flip=False), seed=0)
    assert {version for _, version in versions(next(plain))} == {0}
    plain.close()
    held_out = next(pipeline.eval_batches(config, "test"))
    assert held_out["moments"].shape[1:] == SHAPE


def test_published_layout_takes_the_index_of_its_pictures(folder, vae, published, tmp_path):
    config = make_config(folder, vae)
    config.cache.kind = "references"
    cache.cache(read_config(config), str(tmp_path))
    data = data_of(config, source="latent_folder", path=str(published), num_references=4)
    source = load_source(data, "train")
    assert sorted(source.paths) == sorted(load_source(data_of(config), "train").paths)
    index = tmp_path / "references.jsonl"
    batch = next(pipeline.train_iterator(dataclasses.replace(data, references=str(index)), seed=0))
    assert batch["moments"].shape == (12, 4, *SHAPE)
    first = json.loads(index.read_text().splitlines()[0])
    named = [source.paths[i] for i in references.read_index(index, source, 4)[0]]
    assert named == [f"{first['cate']}/{name}" for name in first["files"]]


def test_references_of_recorded_latents(folder, vae, whole, tmp_path):
    config = make_config(folder, vae)
    config.data.update(source="latents", path=str(whole), num_references=4)
    with pytest.raises(ValueError, match="num_references=4 of source 'latents' needs an index"):
        pipeline.train_iterator(data_of(config), seed=0)
    config.cache.kind = "references"
    cache.cache(read_config(config), str(tmp_path))
    data = data_of(config, references=str(tmp_path / "references.jsonl"))
    batch = next(pipeline.train_iterator(data, seed=0))
    assert batch["moments"].shape == (12, 4, *SHAPE)
    groups = references.read_index(data.references, load_source(data, "train"), 4)
    assert len(groups) == references.ROUNDS * 6


def test_latents_of_another_vae_or_size_are_refused(folder, vae, whole, published, tmp_path):
    config = make_config(folder, vae)
    data = from_cache(config, whole)
    latents.check_latents(data, str(vae), SHAPE)
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"holds latents of another vae \(\w+\) than .*other"):
        latents.check_latents(data, str(other), SHAPE)
    with pytest.raises(ValueError, match="holds latents of 16 pixels, not of data.image_size=32"):
        load_source(dataclasses.replace(data, image_size=32), "train")
    layout = dataclasses.replace(data, source="latent_folder", path=str(published))
    latents.check_latents(layout, str(vae), SHAPE)
    with pytest.raises(ValueError, match=r"holds moments of \(8, 8, 4\), but .* makes \(4, 4, 8\)"):
        latents.check_latents(layout, str(vae), (4, 4, 8))
    with pytest.raises(ValueError, match="data.padding=1: latents cannot be moved"):
        load_source(dataclasses.replace(data, padding=1), "train")


def test_broken_file_of_the_published_layout_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            np.savez(tmp_path / name / f"{i}.png.npz", moments=np.zeros((4, 8, 8), np.float32))
    data = DataConfig(source="latent_folder", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read .*\.npz: .*moments_flip"):
        load_source(data, "train")


def test_config_without_a_vae_is_refused(tmp_path):
    config = mnist.get_config("dar")
    config.cache.kind = "latents"
    with pytest.raises(ValueError, match="kind='latents' needs a config .* names config.vae"):
        cache.cache(read_config(config), str(tmp_path))
