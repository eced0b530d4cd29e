"""The page of the demo for a model without tokens, as its events call it, without a browser."""

import math
import re
import threading

import pytest

from configs import mnist
from dar_jax.config import build as read_config
from dar_jax.demo.batch import BatchGenerator
from dar_jax.generation import batches
from tests import tiny_transdiff

gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'dar-jax[demo]'")

pytest.importorskip("prometheus_client", reason="and pip install prometheus_client")

NUM_STEPS = 4


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from dar_jax.demo.page import Page
    from dar_jax.serving.engine import Engine

    tmp_path = tmp_path_factory.mktemp("model")
    tiny_transdiff.save_vae(tmp_path)
    config = mnist.get_config("transdiff")
    config.sample.model = str(tiny_transdiff.save(tmp_path, "one_step", tiny_transdiff.ONE_STEP))
    config.sample.num_steps = NUM_STEPS
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    generator = BatchGenerator(pipeline, settings, batch_size=8)
    engine = Engine(generator, max_waiting=1, ttl=math.inf)
    engine.start()
    while engine.status == "starting":
        pass
    yield Page(generator, engine, max_upload_bytes=1)
    engine.close()


def test_page_of_a_model_of_latents_shows_steps_and_one_guidance_scale(page):
    shown = [part for part in page.blocks.blocks.values() if getattr(part, "visible", True)]
    labels = [getattr(part, "label", None) for part in shown]
    assert "Guidance" in labels and "Guidance, last token" not in labels
    assert "Temperature" not in labels and "Keep the layout of a picture" not in labels
    http = gr.Request(session_hash="somebody")
    changes = list(page._generate([2, 0], 1, 2.0, 9.0, 1.0, 3, None, False, None, None, [], http))
    said = [change[page._status] for change in changes if page._status in change]
    steps = [step for text in said for step in re.findall(rf"step (\d) of {NUM_STEPS}", text)]
    assert steps == ["1", "2", "3", "4", "4"]
    assert any("width: 50.0%" in text and "step 2 of 4" in text for text in said)
    assert "tokens" not in "".join(said)
    history = next(change[page._history] for change in changes if page._history in change)
    assert [caption for _, caption in history] == ["fox (2), seed 3", "cat (0), seed 3"]


def ask(page, owner):
    http = gr.Request(session_hash=owner)
    changes = page._generate([2], 1, 2.0, 9.0, 1.0, 3, None, False, None, None, [], http)
    for change in changes:
        yield change.get(page._status, "")


def test_a_second_request_and_a_full_queue_are_refused(page, monkeypatch):
    held = threading.Event()
    draw = page._generator.draw
    monkeypatch.setattr(page._generator, "draw", lambda active: held.wait() and draw(active))
    first, second = ask(page, "a"), ask(page, "b")
    next(first)
    while not page._engine._active:
        pass
    next(second)
    assert "Waiting: 1 request before this one" in next(second)
    assert "your last request is not done yet" in next(ask(page, "a"))
    assert "the queue takes no 1 more of yours: 1 wait" in next(ask(page, "c"))
    page._cancel(gr.Request(session_hash="b"))
    assert any("Cancelled." in said for said in [*second])
    held.set()
    assert any("done in" in said for said in [*first])
    assert any("done in" in said for said in [*ask(page, "a")])


def test_a_failure_is_told_and_harms_no_later_request(page, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(page._generator, "fetch", lambda drawn: 1 // 0)
        assert any("drawing failed: ZeroDivisionError" in said for said in [*ask(page, "a")])
    assert any("done in" in said for said in [*ask(page, "a")])
