"""Options that travel with a model, and classes by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import dar_jax
from dar_jax.common import model_dir
from dar_jax.generation import batches
from dar_jax.generation.config import SampleConfig
from dar_jax.kinds.loading import open_model
from tests import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tiny_model.save(tmp_path_factory.mktemp("model"))
    config = json.loads((path / "config.json").read_text())
    config["batch_size"] = 4
    config["sampling"] = {"guidance_scale": [1.0, 3.0], "temperature": 0.5, "solver": "euler"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "digests.json").unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def dar(directory):
    return dar_jax.from_pretrained(directory)


def test_options_of_the_directory_are_used_unless_others_are_given(dar, directory):
    assert dar.sampling.guidance_scale == (1.0, 3.0) and dar.sampling.temperature == 0.5
    own = dar.generate([1, 0], rng=0).indices
    same = dar.generate([1, 0], rng=0, guidance_scale=(1, 3), temperature=0.5, solver="euler")
    np.testing.assert_array_equal(own, same.indices)
    other = dar.generate([1, 0], rng=0, temperature=5.0).indices
    assert np.any(other != own)
    config = SampleConfig(options={"temperature": 2.0})
    assert config.sampling(open_model(directory).sampling).guidance_scale == (1.0, 3.0)
    assert config.sampling(dar.sampling).temperature == 2.0


def test_batch_size_of_the_directory_is_used_unless_another_is_given(dar):
    settings = SampleConfig()
    assert batches.batch_size(settings, dar, 100) == 4
    assert batches.batch_size(settings, dar, 3) == 3
    assert batches.batch_size(dataclasses.replace(settings, batch_size=7), dar, 100) == 7


def test_more_images_than_a_batch_are_drawn_in_turns(dar, monkeypatch):
    labels, sizes = np.arange(10) % 3, []
    turns = [dar.generate(labels[i : i + 4], rng=5, first_index=i).images for i in (0, 4, 8)]
    draw = dar.stream

    def stream(labels, **options):
        sizes.append(len(labels))
        return draw(labels, **options)

    monkeypatch.setattr(dar, "stream", stream)
    out = dar.generate(labels, rng=5)
    assert sizes == [4, 4, 4]
    np.testing.assert_array_equal(out.images[:8], np.concatenate(turns[:2]))
    np.testing.assert_array_equal(
        out.indices[8:], dar.generate(labels[8:], rng=5, first_index=8).indices
    )
    assert len(out.images) == len(out.indices) == 10


@pytest.mark.parametrize("size", [0, -3, 2.5, "4", True, None])
def test_wrong_batch_size_of_a_directory_is_one_line(directory, tmp_path, size):
    config = json.loads((directory / "config.json").read_text()) | {"batch_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="batch_size=.* must be an integer of at least 1"):
        open_model(tmp_path)


def test_wrong_recommendation_is_one_line(directory, tmp_path):
    config = json.loads((directory / "config.json").read_text())
    config["sampling"]["heat"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sampling: unknown key 'heat'"):
        open_model(tmp_path)


def test_classes_go_by_name_index_and_alone(dar):
    names = [dar.generate(label, rng=3).indices for label in ("dog", 1, np.int32(1), ["dog"])]
    for indices in names[1:]:
        np.testing.assert_array_equal(indices, names[0])
    mixed = dar.generate(["cat", 1], rng=3).indices
    np.testing.assert_array_equal(mixed, dar.generate(np.array([0, 1]), rng=3).indices)
    with pytest.raises(ValueError, match="no class is called 'dgo'; there is dog"):
        dar.generate("dgo", rng=0)


def test_seed_is_that_of_its_key(dar):
    np.testing.assert_array_equal(
        dar.generate([2], rng=7).indices, dar.generate([2], rng=jax.random.key(7)).indices
    )
    with pytest.raises(ValueError, match="rng=-1 must be in 0"):
        dar.generate([2], rng=-1)


def test_pipeline_says_what_it_is(dar):
    text = repr(dar)
    assert text.startswith("DarPipeline(PriorPipeline of ") and "10 classes, 16 pixels" in text
    assert "guidance_scale=(1.0, 3.0)" in text


def test_directory_has_a_card(tmp_path):
    sampling = {"temperature": 0.5}
    model_dir.save_model(
        tmp_path / "m",
        "toy",
        {},
        {"a": np.zeros((2, 3), np.float32)},
        {"class_names": ["cat", "dog"], "sampling": sampling},
        about={"steps": "7"},
    )
    card = (tmp_path / "m" / "README.md").read_text()
    for text in (
        "# m",
        "`toy`",
        "| parameters | 6 |",
        "| steps | 7 |",
        "cat, dog",
        "from_pretrained",
    ):
        assert text in card
    assert "`temperature=0.5`" in card
