"""The page of the demo for a model without tokens, as its events call it, without a browser."""

import re

import pytest

from configs import mnist
from dar_jax.config import build as read_config
from dar_jax.demo.batch import BatchGenerator
from dar_jax.demo.queue import RequestQueue
from dar_jax.generation import batches
from tests import tiny_transdiff

gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'dar-jax[demo]'")

NUM_STEPS = 4


@pytest.fixture
def page(tmp_path):
    from dar_jax.demo.page import Page

    tiny_transdiff.save_vae(tmp_path)
    config = mnist.get_config("transdiff")
    config.sample.model = str(tiny_transdiff.save(tmp_path, "one_step", tiny_transdiff.ONE_STEP))
    config.sample.num_steps = NUM_STEPS
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    generator = BatchGenerator(pipeline, settings, batch_size=8)
    requests = RequestQueue(generator.stream, max_requests=2)
    yield Page(generator, requests, max_upload_bytes=1)
    requests.close()


def test_page_of_a_model_of_latents_shows_steps_and_one_guidance_scale(page):
    shown = [part for part in page.blocks.blocks.values() if getattr(part, "visible", True)]
    labels = [getattr(part, "label", None) for part in shown]
    assert "Guidance" in labels and "Guidance, last token" not in labels
    assert "Temperature" not in labels and "Keep the layout of a picture" not in labels
    http = gr.Request(session_hash="somebody")
    changes = list(page._generate([2, 0], 1, 2.0, 9.0, 1.0, 3, None, None, [], http))
    said = [change[page._status] for change in changes if page._status in change]
    steps = [step for text in said for step in re.findall(rf"step (\d) of {NUM_STEPS}", text)]
    assert steps == ["1", "2", "3", "4", "4"]
    assert any("width: 50.0%" in text and "step 2 of 4" in text for text in said)
    assert "tokens" not in "".join(said)
    history = next(change[page._history] for change in changes if page._history in change)
    assert [caption for _, caption in history] == ["fox (2), seed 3", "cat (0), seed 3"]
