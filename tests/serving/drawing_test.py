"""Images at different groups in one batch: the same as alone, and as the pipeline draws them."""

import dataclasses

import jax
import numpy as np
import pytest

from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.lanes import Drawing
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.search import Search
from dar_jax.serving.drawing import CoresBatch, ImageInWork, LaneBatch, Request
from tests import tiny_model

SIZE = 8
ROUNDING = 1e-4  # other programs than the pipeline's, in float32; images reach 1
COMPILED = "/jax/core/compile/backend_compile_duration"
MASK = np.arange(32) < 12


@pytest.fixture(scope="module")
def dar():
    return from_pretrained("package://mnist", compute=Compute(cache="off"))


@pytest.fixture(scope="module")
def batch(dar):
    batch = LaneBatch(dar, dar.sampling, SIZE)
    batch.warm_up()
    return batch


def request(dar, *labels, seed=0, known=None, **options):
    sampling = dataclasses.replace(dar.sampling, **options)
    mask = None if known is None else np.broadcast_to(MASK, known.shape[:2])
    return Request(labels, seed, sampling, known=known, mask=mask)


def draw(batch, schedule):
    """Draw images that begin at given turns; return previews and tokens of each, by group.

    Args:
        batch: draws.
        schedule: (turn, lane, image).
    """
    drawn = {id(image): [] for _, _, image in schedule}
    for turn in range(batch.num_groups + max(turn for turn, _, _ in schedule)):
        active = {
            lane: image
            for begin, lane, image in schedule
            if begin <= turn and image.group < batch.num_groups
        }
        for one in batch.draw(active):
            tokens = np.asarray(one.tokens)[one.row, : one.group * batch.drawing.group_size]
            drawn[id(one.image)].append((np.asarray(one.previews)[one.row], tokens))
    return [drawn[id(image)] for _, _, image in schedule]


def test_an_image_is_bitwise_the_same_alone_and_among_others(dar, batch):
    wanted = request(dar, 3, 7, seed=5)
    (alone,) = draw(batch, [(0, 0, ImageInWork(wanted, 1))])
    others = request(dar, 1, 2, 0, 4, 6, seed=9, temperature=0.5)
    _, _, among, *_ = draw(
        batch,
        [
            (0, 0, ImageInWork(others, 0)),
            (0, 7, ImageInWork(others, 1)),
            (1, 5, ImageInWork(wanted, 1)),
            (1, 2, ImageInWork(others, 2)),
            (2, 3, ImageInWork(others, 3)),
            (4, 0, ImageInWork(others, 4)),
        ],
    )
    assert len(alone) == len(among) == batch.num_groups
    for (image, tokens), (other_image, other_tokens) in zip(alone, among, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        np.testing.assert_array_equal(image, other_image)


def test_images_are_those_of_the_pipeline(dar, batch):
    options = dict(guidance_scale=(1.0, 3.0), temperature=0.9)
    previews = list(dar.stream([3, 7], rng=5, **options))
    asked = request(dar, 3, 7, seed=5, **options)
    rows = draw(batch, [(0, 0, ImageInWork(asked, 0)), (1, 1, ImageInWork(asked, 1))])
    for index, row in enumerate(rows):
        for (image, tokens), expected in zip(row, previews, strict=True):
            np.testing.assert_array_equal(tokens, expected.indices[index])
            np.testing.assert_allclose(image, expected.images[index], atol=ROUNDING)


def test_images_in_int8_are_those_of_the_pipeline():
    stores = dict(decode_weights="int8", decode_cache="int8")
    dar = from_pretrained("package://mnist", compute=Compute(cache="off", **stores))
    batch = LaneBatch(dar, dar.sampling, SIZE)
    batch.reset()
    ((*_, (_, tokens)),) = draw(batch, [(0, 0, ImageInWork(request(dar, 3, seed=5), 0))])
    np.testing.assert_array_equal(tokens, dar.generate([3], rng=5).indices[0])


def test_known_pixels_are_kept_in_their_lane_only(dar, batch):
    known = np.linspace(-1, 1, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    mask = np.broadcast_to(MASK, (32, 32))
    expected = dar.generate([3], rng=5, known=known[None], mask=mask)
    kept = ImageInWork(request(dar, 3, seed=5, known=known), 0)
    free = ImageInWork(request(dar, 3, seed=5), 0)
    (*_, (inpainted, _)), (*_, (drawn, _)) = draw(batch, [(0, 0, kept), (1, 1, free)])
    np.testing.assert_array_equal(inpainted[mask], known[mask])
    np.testing.assert_allclose(inpainted, expected.images[0], atol=ROUNDING)
    np.testing.assert_allclose(drawn, dar.generate([3], rng=5).images[0], atol=ROUNDING)


def test_pieces_are_pixels_and_say_which_is_the_image(dar, batch):
    image = ImageInWork(request(dar, 3), 0)
    pieces = []
    for _ in range(batch.num_groups):
        pieces += [batch.fetch(one) for one in batch.draw({0: image})]
    assert [piece.group for piece in pieces] == [1, 2, 3, 4]
    assert [piece.is_last for piece in pieces] == [False, False, False, True]
    assert pieces[0].pixels.dtype == np.uint8 and pieces[0].pixels.shape == (32, 32, 3)


def test_weights_that_are_not_finite_are_an_error(dar, batch):
    broken = LaneBatch(dar, dar.sampling, SIZE)
    broken._params = jax.tree.map(lambda leaf: leaf * np.nan, broken._params)
    broken.reset()
    (drawn,) = broken.draw({0: ImageInWork(request(dar, 3), 0)})
    with pytest.raises(ValueError, match="not finite"):
        broken.fetch(drawn)


def test_nothing_is_compiled_after_the_warm_up(dar, batch):
    compiled = []

    def listener(event, duration, **_):
        if event == COMPILED:
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    for size in (1, 3, SIZE):
        draw(batch, [(0, n, ImageInWork(request(dar, 3, seed=n), 0)) for n in range(size)])
    batch.reset()
    assert not compiled
    jax.jit(lambda x: x + size)(0)
    assert len(compiled) == 1, "what is listened to is not told"
    jax.monitoring.unregister_event_duration_listener(listener)


def test_what_lanes_cannot_draw_is_refused():
    prior = FunctionalModel(Llama, tiny_model.PRIOR)
    tokenizer = FunctionalModel(Tokenizer, tiny_model.TOKENIZER)
    searching = DarSampling(search=Search("end", num=2))
    with pytest.raises(ValueError, match="search.method='end'"):
        Drawing(prior, tokenizer, searching)
    odd = dataclasses.replace(tiny_model.TOKENIZER, num_groups=3)
    with pytest.raises(ValueError, match="8 tokens of an image make no 3 groups"):
        Drawing(prior, FunctionalModel(Tokenizer, odd), DarSampling())
    with pytest.raises(ValueError, match="num_steps=1 leaves the last tokens .* unused"):
        Drawing(prior, tokenizer, DarSampling(num_steps=1))
    captions = dataclasses.replace(tiny_model.PRIOR, caption_dim=4)
    with pytest.raises(ValueError, match="draws from captions"):
        Drawing(FunctionalModel(Llama, captions), tokenizer, DarSampling())


def test_batches_of_two_threads_draw_what_one_draws(dar, batch):
    images = [ImageInWork(request(dar, label, seed=label), 0) for label in range(5)]
    alone = [ImageInWork(image.request, 0) for image in images]
    other = LaneBatch(dar, dar.sampling, SIZE)
    other.warm_up()
    cores = CoresBatch([batch, other])
    batch.reset()
    assert cores.size == 2 * SIZE
    both = draw(cores, [(0, lane, image) for lane, image in enumerate(images)])
    batch.reset()
    one = draw(batch, [(0, lane, image) for lane, image in enumerate(alone)])
    for drawn, expected in zip(both, one, strict=True):
        for (preview, tokens), again in zip(drawn, expected, strict=True):
            np.testing.assert_array_equal(preview, again[0])
            np.testing.assert_array_equal(tokens, again[1])
