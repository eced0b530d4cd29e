"""What lanes cannot draw: models of captions and of latents, an image after the other."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import dar_jax
from dar_jax.common.image import to_pixels
from dar_jax.models.text.encoder import open_encoder
from dar_jax.serving.drawing import ImageInWork
from dar_jax.serving.errors import ApiError
from dar_jax.serving.inputs import Offer, read
from dar_jax.serving.streams import ImageBatch
from tests import tiny_model, tiny_text, tiny_transdiff

T = 8
TEXT = "a red apple"
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A model of captions."""
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("text")
    encoder = str(tiny_text.save(directory / "encoder"))
    text = dict(caption_dim=tiny_text.DIM, condition_tokens=T, text_encoder=encoder)
    text["text_digest"] = open_encoder(encoder, T).digest
    prior = dataclasses.replace(tiny_model.PRIOR, **text)
    return dar_jax.from_pretrained(tiny_model.save(directory, prior=prior))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A model of latents."""
    directory = tmp_path_factory.mktemp("latents")
    tiny_transdiff.save_vae(directory)
    path = tiny_transdiff.save(directory, "mrar", tiny_transdiff.MRAR)
    pipeline = dar_jax.from_pretrained(path)
    pipeline.sampling = dataclasses.replace(pipeline.sampling, num_steps=2)
    return pipeline


def offer(pipeline, batch):
    return Offer.of(pipeline, pipeline.sampling, "own", batch.steps[:-1], 10)


def pieces(batch, request, index=0):
    image = ImageInWork(request, index)
    while image.group < batch.num_groups:
        yield batch.fetch(*batch.draw({0: image}))


def test_a_text_is_drawn_as_by_the_pipeline_and_compiles_nothing(captions):
    batch = ImageBatch(captions, captions.sampling, TEXT)
    fields = {"prompt": f" {TEXT}\n", "n": 2, "seed": 5, "guidance": [1, 4]}
    request = read(fields, offer(captions, batch)).request
    assert request.labels == (TEXT, TEXT)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, *_, **__: compiled.append(name) if name == COMPILED else None
    )
    drawn = [list(pieces(batch, request, index)) for index in range(2)]
    size = captions.image_size
    known, mask = np.ones((size, size, 3), np.float32), np.ones((size, size), bool)
    flat = dataclasses.replace(request.sampling, guidance_scale=(1.0,))
    edit = dataclasses.replace(request, known=known, mask=mask, sampling=flat)
    *_, edited = pieces(batch, edit)
    jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled
    assert (edited.pixels == 255).all()
    assert [piece.group for piece in drawn[0]] == [*batch.steps]
    assert [piece.is_last for piece in drawn[0]] == [False] * len(batch.steps[1:]) + [True]
    for index in range(2):
        how = {"sampling": request.sampling, "guidance_scale": (1.001, 4.0)}
        alone = captions.generate([TEXT], rng=5, first_index=index, **how)
        np.testing.assert_array_equal(
            drawn[index][-1].pixels, to_pixels(np.asarray(alone.images))[0]
        )


def test_a_model_of_latents_is_drawn_and_edits_nothing(latents):
    batch = ImageBatch(latents, latents.sampling, 0)
    has = offer(latents, batch)
    assert not has.edits and batch.steps == (2, 4, 6, 8)
    request = read({"prompt": 2, "seed": 3, "guidance": 2, "stream": True}, has).request
    *_, last = pieces(batch, request)
    alone = latents.generate([2], rng=3, sampling=request.sampling)
    np.testing.assert_array_equal(last.pixels, to_pixels(np.asarray(alone.images))[0])
    for fields, says in (
        ({"temperature": 1.0}, "temperature=1.0: expected none"),
        ({"guidance": [1, 2]}, "must be one scale or 4, one for each pass"),
    ):
        with pytest.raises(ApiError, match=says):
            read({"prompt": 2, **fields}, has)


@pytest.mark.parametrize("prompt", [None, 3, " ", "a" * 1001])
def test_a_prompt_that_is_no_short_text_is_refused(captions, prompt):
    has = offer(captions, types.SimpleNamespace(steps=(1, 2)))
    with pytest.raises(ApiError, match="prompt=.*: expected a text of at most 1000 letters"):
        read({"prompt": prompt}, has)
