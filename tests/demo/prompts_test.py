"""The demo of a model of captions: what somebody writes is text, whatever it looks like."""

import dataclasses
import math

import numpy as np
import pytest

from configs import mnist
from dar_jax.common import image as images
from dar_jax.config import build as read_config
from dar_jax.demo.batch import MAX_PROMPT, BatchGenerator, Request
from dar_jax.generation import batches
from dar_jax.models.text.encoder import open_encoder
from tests import tiny_model, tiny_text

pytest.importorskip("tokenizers")
T = 8
PROMPTS = ("a red apple", "<script>alert(1)</script>", '$(rm -rf /); `car` \'or\' "1"="1"')
REQUEST = Request(PROMPTS, (1.5, 2.0), 1.0, 7)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    encoder = str(tiny_text.save(directory / "encoder"))
    text = dict(caption_dim=tiny_text.DIM, condition_tokens=T, text_encoder=encoder)
    text["text_digest"] = open_encoder(encoder, T).digest
    config = mnist.get_config("dar")
    prior = dataclasses.replace(tiny_model.PRIOR, **text)
    config.sample.model = str(tiny_model.save(directory, prior=prior))
    config.sample.update(prompts="a car; a blue car", prefix_tokens=())
    config = read_config(config)
    pipeline = batches.load(config.sample, "", compute=config.compute, mesh=config.mesh)
    return BatchGenerator(pipeline, config.sample, batch_size=8)


def test_images_are_those_of_the_texts(generator):
    *_, last = generator.stream(REQUEST)
    texts = [*PROMPTS, *[PROMPTS[-1]] * 5]
    how = {"sampling": generator.sampling, "guidance_scale": REQUEST.guidance_scale}
    drawn = generator.pipeline.generate(texts, rng=7, **how)
    np.testing.assert_array_equal(last.pixels, images.to_pixels(np.asarray(drawn.images))[:3])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "there are no prompts: write one at least"),
        (("a",) * 9, "9 images are asked for, at most 8 .* write fewer prompts"),
        (("a" * (MAX_PROMPT + 1),), "a prompt of 1001 characters: write 1000 at most"),
    ],
)
def test_too_much_or_nothing_is_refused(generator, prompts, message):
    with pytest.raises(ValueError, match=message):
        generator.check(dataclasses.replace(REQUEST, labels=prompts))


def test_page_has_a_box_and_shows_its_lines_as_text(generator):
    gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'dar-jax[demo]'")
    pytest.importorskip("prometheus_client", reason="and pip install prometheus_client")
    from dar_jax.demo.page import Page
    from dar_jax.serving.engine import Engine

    engine = Engine(generator, max_waiting=2, ttl=math.inf)
    engine.start()
    while engine.status == "starting":
        pass
    page = Page(generator, engine, max_upload_bytes=1)
    (box,) = (part for part in page.blocks.blocks.values() if isinstance(part, gr.Textbox))
    assert (box.label, box.value) == ("Prompts, one a line", "a car\na blue car")
    http = gr.Request(session_hash="somebody")
    written = f" {PROMPTS[0]}\n\n{PROMPTS[1]} \n{PROMPTS[2]}"
    try:
        changes = list(page._generate(written, 2, 2.0, 9.0, 1.0, 3, None, False, None, 0, [], http))
    finally:
        engine.close()
    shown = [change[page._images] for change in changes if page._images in change]
    assert all("<script>" not in text and "&lt;script&gt;" in text for text in shown)
    assert shown[-1].count("<img") == 6
    history = next(change[page._history] for change in changes if page._history in change)
    assert [caption for _, caption in history] == [f"{p}, seed 3" for p in PROMPTS for _ in "ab"]
    assert page._limit_per_class("a\n\nb\n", 8).value == 4
