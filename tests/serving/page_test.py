"""The page, in a browser without a window."""

import shutil

import pytest

from tests.serving.clients_test import server
from tests.serving.fake import NUM_GROUPS

playwright = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs playwright: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
__all__ = ["server"]

TIMEOUT_MS = 120_000
NUM_IMAGES = 2
RECORD = """() => {
  window.seen = [];
  const look = () => window.seen.push(
    [...document.querySelectorAll('#images figcaption')].map(caption => caption.innerText));
  new MutationObserver(look).observe(
    document.querySelector('#images'), {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    host, port = server[2]
    page.goto(f"http://{host}:{port}")
    page.wait_for_function("document.querySelector('#prompt').value === 'cat'")
    page.fill("#n", str(NUM_IMAGES))
    return page


def test_previews_grow_into_images(page):
    elsewhere, broken = [], []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: broken.append(error))
    page.evaluate(RECORD)
    page.fill("#prompt", "dog")
    page.fill("#seed", "5")
    page.click("#draw")
    page.get_by_text(f"{NUM_IMAGES} of {NUM_IMAGES} done").wait_for()
    assert not broken
    assert all(url.startswith((page.url, "data:")) for url in elsewhere)
    for image in range(NUM_IMAGES):
        captions = [seen[image] for seen in page.evaluate("window.seen") if len(seen) > image]
        steps = list(dict.fromkeys(filter(None, captions)))
        previews = [f"preview {n} of {NUM_GROUPS - 1}" for n in range(1, NUM_GROUPS)]
        assert steps == [*previews, "seed 5"]
    assert page.locator("#images img").count() == NUM_IMAGES


def test_mistakes_are_told(page):
    page.fill("#prompt", "dgo")
    page.click("#draw")
    page.get_by_text("no class is called 'dgo'; there is dog").wait_for()


def test_stopping_cancels(page, server):
    engine, batch, _ = server
    batch.gate.clear()
    page.click("#draw")
    page.get_by_text("Waiting for the first preview").wait_for()
    page.click("#stop")
    page.get_by_text("Stopped.").wait_for()
    batch.gate.set()
    page.wait_for_timeout(500)
    assert engine.is_idle
