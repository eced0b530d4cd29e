"""The demo as its users meet it: in a browser, without a window; and on the command line."""

import contextlib
import dataclasses
import inspect
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from configs import mnist
from dar_jax.config import build as read_config
from dar_jax.demo.batch import MEGABYTE, BatchGenerator
from dar_jax.generation import batches
from tests import tiny_model

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'dar-jax[demo]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs playwright: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
NUM_GROUPS = 4
PAUSE_S = 1.0
"""Between two previews: long enough to cancel, and for a browser to draw each."""
TIMEOUT_MS = 120_000
NUM_CLIENTS = 8
RECORD_PREVIEWS = """() => {
  window.previews = [];
  window.facts = [];
  const images = document.querySelector('#images'), status = document.querySelector('#status');
  const push = (list, value) => { if (value && value !== list.at(-1)) list.push(value); };
  const look = () => {
    push(window.previews, [...images.querySelectorAll('img')].map(img => img.src).join(' '));
    push(window.facts, status.querySelector('.status')?.innerText);
  };
  const whatever = {subtree: true, childList: true, attributes: true, characterData: true};
  for (const element of [images, status]) new MutationObserver(look).observe(element, whatever);
}"""


class Paused(BatchGenerator):
    """Takes its time, counts the previews that it makes, and begins nothing while it is held."""

    num_made = 0
    held = threading.Lock()

    def draw(self, active):
        with self.held:
            pass
        self.num_made += 1
        return super().draw(active)

    def fetch(self, drawn):
        time.sleep(PAUSE_S)
        return super().fetch(drawn)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def save_model(directory):
    tokenizer = dataclasses.replace(tiny_model.TOKENIZER, num_groups=NUM_GROUPS, num_steps=4)
    return tiny_model.save(directory, tokenizer)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    config = mnist.get_config("dar")
    config.sample.model = str(save_model(tmp_path_factory.mktemp("model")))
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    return Paused(pipeline, settings, batch_size=8)


@pytest.fixture(scope="module")
def address(generator):
    from dar_jax.demo import page
    from dar_jax.serving.engine import Engine

    # Checking its types wraps it, and gradio would no longer see that it is a generator.
    page.Page._generate = inspect.unwrap(page.Page._generate)
    engine = Engine(generator, max_waiting=16, ttl=math.inf)
    engine.start()
    page = page.Page(generator, engine, max_upload_bytes=10 * MEGABYTE)
    page.launch("127.0.0.1", free_port(), max_requests=16)
    yield page.blocks.local_url
    page.blocks.close()
    engine.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, address):
    """Return a function that opens the page as one more client."""
    with contextlib.ExitStack() as stack:

        def open_one(**options):
            context = stack.enter_context(browser.new_context(**options))
            page = context.new_page()
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(address)
            page.locator("#images .tiles").wait_for()
            return page

        yield open_one


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def status(page, text):
    """What the page says of the request."""
    return page.locator("#status").get_by_text(text)


@needs_browser
def test_previews_arrive_one_by_one_and_end_in_the_gallery(open_page, generator):
    page = open_page()
    elsewhere = []
    page.on("request", lambda sent: elsewhere.append(sent.url))
    page.evaluate(RECORD_PREVIEWS)
    button(page, "Generate").click()
    status(page, "done in").wait_for()
    previews, facts = page.evaluate("window.previews"), page.evaluate("window.facts")
    assert len(previews) == len(set(previews)) == NUM_GROUPS
    for step in range(1, NUM_GROUPS + 1):
        known = f"{2 * step} of 8 tokens"
        told = next(fact for fact in facts if known in fact)
        assert f"step {step} of {NUM_GROUPS}" in told and "first preview after" in told
    assert page.locator("#images img").count() == generator.batch_size
    page.locator("#gallery img").nth(7).wait_for()
    assert page.locator("#images figcaption").all_inner_texts()[:3] == ["cat (0)"] * 2 + ["dog (1)"]
    local = ("http://127.0.0.1", "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []


@needs_browser
def test_cancel_stops_the_work(open_page, generator):
    page = open_page()
    before = generator.num_made
    button(page, "Generate").click()
    status(page, re.compile("[246] of 8 tokens")).wait_for()
    button(page, "Cancel").click()
    status(page, "Cancelled.").wait_for()
    time.sleep(NUM_GROUPS * PAUSE_S)
    assert generator.num_made - before < NUM_GROUPS
    assert page.locator("#gallery img").count() == 0
    button(page, "Generate").click()
    status(page, "done in").wait_for()


@needs_browser
def test_closed_page_stops_the_work(open_page, generator):
    page = open_page()
    before = generator.num_made
    button(page, "Generate").click()
    status(page, re.compile("[246] of 8 tokens")).wait_for()
    page.close()
    time.sleep(2 * NUM_GROUPS * PAUSE_S)
    assert generator.num_made - before < NUM_GROUPS


@needs_browser
def test_clients_at_once_all_get_answers(open_page, generator):
    pages = [open_page() for _ in range(NUM_CLIENTS)]
    with generator.held:
        for ahead, page in enumerate(pages):
            button(page, "Generate").click()
            told = f"{ahead} request{'s' * (ahead > 1)} before this one" if ahead else "Drawing"
            status(page, told).wait_for()
    for page in pages:
        status(page, "done in").wait_for()
        assert page.locator("#images img").count() == 8


@needs_browser
def test_bad_request_is_answered_on_the_page(open_page):
    page = open_page()
    seed = page.get_by_label("Seed", exact=True)
    seed.fill("-3")
    button(page, "Generate").click()
    status(page, "seed -3 must be between 0").wait_for()
    seed.fill("3")
    button(page, "Generate").click()
    status(page, "done in").wait_for()


@needs_browser
def test_generate_draws_anew_unless_the_seed_is_kept_and_files_nothing_twice(open_page):
    page = open_page()
    gallery, seed = page.locator("#gallery img"), page.get_by_label("Seed", exact=True)

    def generate(expected_seed, expected_images):
        button(page, "Generate").click()
        page.wait_for_function(
            "count => document.querySelectorAll('#gallery img').length === count",
            arg=expected_images,
        )
        status(page, "done in").wait_for()
        assert seed.input_value() == str(expected_seed)

    generate(0, 8)
    generate(1, 16)
    page.get_by_label("Keep the seed").check()
    generate(1, 16)
    assert gallery.count() == 16


@needs_browser
def test_no_more_images_can_be_asked_for_than_are_made(open_page):
    page = open_page()
    slider = page.locator("input[type=range]").first
    assert slider.get_attribute("max") == "2"  # of each of 4 classes
    for _ in range(2):
        page.locator(".token-remove").first.click()
    page.wait_for_function("document.querySelector('input[type=range]').max === '4'")


@needs_browser
def test_uploads_are_checked_and_give_a_layout(open_page, tmp_path):
    page = open_page()
    page.get_by_text("Keep the layout of a picture").click()
    layout = page.locator("#layout")
    (tmp_path / "notes.png").write_text("Dear diary, " * 10)
    (tmp_path / "large.png").write_bytes(os.urandom(20 * MEGABYTE))
    Image.fromarray(np.uint8(np.eye(90)[..., None] * [255, 0, 0])).save(tmp_path / "good.jpg")
    upload = page.locator("input[type=file]")
    upload.set_input_files(tmp_path / "notes.png")
    layout.get_by_text("notes.png: not a picture of a known format").wait_for()
    upload.set_input_files(tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size of 10").first.wait_for()
    assert layout.locator("img").count() == 0
    upload.set_input_files(tmp_path / "good.jpg")
    layout.locator("img").wait_for()
    button(page, "Generate").click()
    status(page, "done in").wait_for()
    # A picture of the gallery takes the place of the upload.
    before = layout.locator("img").get_attribute("src")
    page.locator("#gallery img").first.click()
    page.wait_for_function(
        "before => document.querySelector('#layout img').src !== before", arg=before
    )
    button(page, "Forget the layout").click()
    layout.locator("img").wait_for(state="detached")


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_window(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    button(page, "Generate").click()
    status(page, "done in").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("#images").bounding_box()
    assert images["y"] + images["height"] <= 800, "the result is not in view"


@contextlib.contextmanager
def run_demo(tmp_path, port):
    command = [sys.executable, "-m", "dar_jax.main", "--config=configs/mnist.py:dar"]
    command += [f"--workdir={tmp_path}", "--mode=demo", f"--config.demo.port={port}"]
    command += [f"--config.sample.model={tmp_path / 'dar_prior'}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # otherwise a failure waits for it forever


def test_command_line_serves_on_loopback_until_interrupted(tmp_path):
    save_model(tmp_path)
    port = free_port()
    with run_demo(tmp_path, port) as process:
        seen = ""
        for line in process.stdout:
            seen += line
            if "The demo is at" in line:
                break
        assert "Compiled in" in seen, process.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert b"Images that grow" in response.read()
        large = urllib.request.Request(
            f"http://127.0.0.1:{port}/gradio_api/upload",
            data=b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + bytes(20 * MEGABYTE)
            + b"\r\n--x--\r\n",
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        # Refused before all of it is sent: the answer may come too late to be read.
        with pytest.raises(urllib.error.URLError, match="413|reset|Broken pipe"):
            urllib.request.urlopen(large)
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)}
        for other in others - {"127.0.0.1", "::1"}:
            with pytest.raises(OSError, match=r"refused|unreachable|assign"):
                socket.create_connection((other, port), timeout=5)
        with run_demo(tmp_path, port) as second:
            _, error = second.communicate(timeout=TIMEOUT_MS / 1000)
            assert second.returncode == 2
            assert len(error.splitlines()) == 1 and f"cannot serve on 127.0.0.1:{port}" in error
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=TIMEOUT_MS / 1000) == 0, process.stderr.read()
