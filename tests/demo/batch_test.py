"""Requests of the demo: what they give, what is refused, and that none compiles anything."""

import dataclasses
import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs import mnist
from dar_jax.common import image as images
from dar_jax.config import build as read_config
from dar_jax.demo.batch import MEGABYTE, BatchGenerator, Request, read_upload
from dar_jax.generation import batches
from tests import tiny_model, tiny_transdiff

NUM_KEPT = 3
REQUEST = Request((3, 1), (1.5, 2.0), 1.0, 7)
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    config = mnist.get_config("dar")
    config.sample.model = str(tiny_model.save(tmp_path_factory.mktemp("model")))
    config.sample.prefix_tokens = (NUM_KEPT, 5, 32)
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    return BatchGenerator(pipeline, settings, batch_size=5)


@pytest.fixture(scope="module")
def layout():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (tiny_model.SIZE, tiny_model.SIZE, 3), np.uint8)


def last(generator, request):
    *_, preview = generator.stream(request)
    return preview.pixels


def options(generator):
    """Those of `REQUEST`, as the pipeline takes them."""
    return {"sampling": generator.sampling, "guidance_scale": REQUEST.guidance_scale}


@pytest.fixture
def compiled():
    """Names of the compilations since the test began, of which there has been one."""
    names = []

    def listen(name, *_, **__):
        if name == COMPILED:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 41)(1)
    assert len(names) == 1  # such events are heard
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_no_request_compiles_anything(generator, layout, compiled):
    for changes in (
        {},
        {"labels": (0,), "guidance_scale": (1.0, 1.0), "temperature": 0.0},
        {"labels": tuple(range(8)), "guidance_scale": (1.0, 9.0), "temperature": 0.5},
        {"layout": layout, "num_kept": NUM_KEPT},
        {"layout": layout, "num_kept": 5, "labels": (9,), "seed": 2**31 - 1},
    ):
        assert len(last(generator, dataclasses.replace(REQUEST, **changes)))
    assert len(compiled) == 1


def test_previews_end_with_the_images_of_the_api(generator):
    previews = list(generator.stream(REQUEST))
    assert [preview.num_tokens for preview in previews] == [4, 8]
    assert previews[-1].step == generator.num_steps
    assert previews[0].seconds <= previews[-1].seconds
    labels = np.int32([3, 1, 1, 1, 1, 1, 1, 1])
    generated = generator.pipeline.generate(labels, rng=jax.random.key(7), **options(generator))
    expected = images.to_pixels(np.asarray(generated.images))[:2]
    np.testing.assert_array_equal(previews[-1].pixels, expected)


@pytest.mark.slow
def test_model_of_latents_has_steps_and_one_guidance_scale(tmp_path, compiled):
    tiny_transdiff.save_vae(tmp_path)
    config = mnist.get_config("transdiff_mrar")
    config.sample.model = str(tiny_transdiff.save(tmp_path, "mrar", tiny_transdiff.MRAR))
    config.sample.update(num_steps=2, guidance_scale=(1.0, 1.2, 1.4, 3.0))
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    generator = BatchGenerator(pipeline, settings, batch_size=8)
    assert (generator.num_steps, generator.num_tokens, generator.kept_choices) == (8, 0, ())
    request = generator.default_request((2, 0))
    assert request.guidance_scale == (3.0,)
    previews = list(generator.stream(request))
    assert [preview.step for preview in previews] == [2, 4, 6, 8]
    before = len(compiled)
    other = dataclasses.replace(request, guidance_scale=(1.0,), labels=(1,), seed=5)
    assert np.any(last(generator, other) != previews[-1].pixels[:1])
    assert len(compiled) == before
    labels = np.int32([2, *[0] * 7])
    options = {"sampling": generator.sampling, "guidance_scale": 3.0}
    generated = pipeline.generate(labels, rng=jax.random.key(0), **options)
    expected = images.to_pixels(np.asarray(generated.images))[:2]
    np.testing.assert_array_equal(previews[-1].pixels, expected)


def test_layout_keeps_its_first_tokens(generator, layout):
    kept = dataclasses.replace(REQUEST, layout=layout, num_kept=NUM_KEPT)
    pipeline = generator.pipeline
    batch = np.repeat(images.to_float(layout)[None], 8, axis=0)
    generated = pipeline.generate(
        np.int32([3, 1, 1, 1, 1, 1, 1, 1]),
        rng=jax.random.key(7),
        **options(generator),
        prefix=pipeline.tokenizer.encode(batch)[:, :NUM_KEPT],
    )
    expected = images.to_pixels(np.asarray(generated.images))[:2]
    np.testing.assert_array_equal(last(generator, kept), expected)
    assert np.any(expected != last(generator, REQUEST))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "there are no classes: choose one at least"),
        ({"labels": (0,) * 9}, "9 images are asked for, at most 8"),
        ({"labels": (0, 10)}, "10 is out of range, expected 0..9"),
        ({"guidance_scale": (0.5, 2.0)}, "guidance 0.5, 2 must be between 1 and 20"),
        ({"guidance_scale": (1.0, float("nan"))}, "guidance 1, nan must be"),
        ({"temperature": 2.5}, "temperature 2.5 must be between 0 and 2"),
        ({"seed": -1}, "seed -1 must be between 0 and"),
        ({"layout": np.zeros((16, 16, 3), np.uint8), "num_kept": 4}, "4 tokens .* one of 3, 5"),
    ],
)
def test_request_out_of_range_is_refused(generator, changes, message):
    with pytest.raises(ValueError, match=message):
        next(generator.stream(dataclasses.replace(REQUEST, **changes)))


def write(path, data):
    path.write_bytes(data)
    return str(path)


def picture(size, kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, "red").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_uploaded_picture_is_cropped_whatever_its_name(tmp_path, kind):
    path = write(tmp_path / "picture.dat", picture((40, 30), kind))
    pixels = read_upload(path, 16, MEGABYTE)
    assert pixels.shape == (16, 16, 3)
    assert np.all(pixels[..., 0] > 200) and np.all(pixels[..., 1:] < 50)


def test_upload_that_is_no_small_picture_is_refused(tmp_path):
    text = write(tmp_path / "notes.png", b"Dear diary, " * 10)
    with pytest.raises(ValueError, match=r"notes.png: not a picture .* \(expected PNG, JPEG"):
        read_upload(text, 16, MEGABYTE)
    large = write(tmp_path / "large.png", picture((40, 30)) + bytes(2 * MEGABYTE))
    with pytest.raises(ValueError, match="large.png has 2.0 MB, at most 1 MB"):
        read_upload(large, 16, MEGABYTE)
    dense = write(tmp_path / "dense.png", picture((9000, 9000), mode="L"))
    assert pathlib.Path(dense).stat().st_size < MEGABYTE
    with pytest.raises(ValueError, match="dense.png: 9000 x 9000 pixels, more than"):
        read_upload(dense, 16, MEGABYTE)
    script = write(tmp_path / "script.png", picture((40, 30), "EPS"))
    with pytest.raises(ValueError, match="script.png: not a picture of a known format"):
        read_upload(script, 16, MEGABYTE)
    cut = write(tmp_path / "cut.png", picture((400, 300))[:200])
    with pytest.raises(ValueError, match="cut.png: "):
        read_upload(cut, 16, MEGABYTE)
