"""A server on loopback as its clients meet it: OpenAI's package, curl, those that leave."""

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dar_jax.serving.config import ServeConfig
from dar_jax.serving.keys import ApiKeys
from tests.serving.fake import NUM_GROUPS, OFFER, SIDE, FakeBatch

NEEDED = "the API needs what pip install 'dar-jax[serve]' brings"
uvicorn = pytest.importorskip("uvicorn", reason=NEEDED)
pytest.importorskip("python_multipart", reason=NEEDED)
api = pytest.importorskip("dar_jax.serving.app", reason=NEEDED)
Engine = pytest.importorskip("dar_jax.serving.engine", reason=NEEDED).Engine

TIMEOUT = 20
"""Seconds that no test needs."""
TTL = 3.0


class SteppedBatch(FakeBatch):
    """A turn takes a while, as with a model."""

    def draw(self, active):
        time.sleep(0.02)
        return super().draw(active)


@pytest.fixture(scope="module")
def server():
    """Give the engine, its batch and its address."""
    batch, config = SteppedBatch(), ServeConfig(ttl=TTL)
    engine = Engine(batch, max_waiting=config.max_waiting, ttl=TTL)
    listener = socket.create_server(("127.0.0.1", 0))
    app = api.make_app(api.Service(engine, OFFER, config, ApiKeys()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True)
    thread.start()
    until(lambda: engine.status == "ready")
    yield engine, batch, listener.getsockname()
    batch.gate.set()
    server.should_exit = True
    thread.join(TIMEOUT)


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    host, port = server[2]
    return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)


def picture(file):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def transparent_png():
    file = io.BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE, 4), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_openai_generates(client):
    answer = client.images.generate(model="squares", prompt="dog", n=2, extra_body={"seed": 5})
    assert [picture(image.b64_json)[-1, 0, 0] for image in answer.data] == [1, 1]
    assert answer.usage.output_tokens == 2 * OFFER.num_tokens and answer.seed == 5
    assert [model.id for model in client.models.list()] == ["squares"]


def test_openai_streams_three_previews_before_the_image(client):
    stream = client.images.generate(prompt="dog", stream=True, partial_images=3)
    found = list(stream)
    assert [event.type for event in found] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [picture(event.b64_json)[0, 0, 0] for event in found] == [1, 2, 3, NUM_GROUPS]


def test_openai_edits(client):
    image = ("a.png", transparent_png(), "image/png")
    answer = client.images.edit(image=image, prompt="cat", n=2, extra_body={"guidance": [1, 4]})
    assert len(answer.data) == 2
    stream = client.images.edit(image=image, mask=image, prompt="cat", stream=True)
    assert [event.type for event in stream] == ["image_edit.completed"]


def test_openai_raises_its_own_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="no class is called 'dgo'; there is dog"):
        client.images.generate(prompt="dgo")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="dog", model="dall-e-3")


def ask(address, **fields):
    """Send a request on a socket of its own, and return it."""
    body = json.dumps({"prompt": "dog", **fields}).encode()
    connection = socket.create_connection(address, TIMEOUT)
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_previews_as_they_come(server):
    _, batch, (host, port) = server
    batch.gate.clear()
    command = ["curl", "-sN", f"http://{host}:{port}/v1/images/generations"]
    body = json.dumps({"prompt": "dog", "stream": True, "partial_images": 3})
    command += ["-H", "Content-Type: application/json", "-d", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        seen = []
        for _ in range(NUM_GROUPS):
            batch.gate.set()
            seen += [next(line for line in curl.stdout if line.startswith("event: "))]
            batch.gate.clear()
        batch.gate.set()
    assert [line.strip().rpartition(".")[2] for line in seen] == ["partial_image"] * 3 + [
        "completed"
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_drawn_no_more(server, stream):
    engine, batch, address = server
    dropped = engine.metrics.dropped.labels("cancelled")._value
    before = dropped.get()
    batch.gate.clear()
    connection = ask(address, n=10, stream=stream)
    until(lambda: not engine.is_idle)
    connection.close()
    until(lambda: dropped.get() > before)
    batch.gate.set()
    until(lambda: engine.is_idle)


def test_who_reads_nothing_holds_nobody_up(server, client):
    engine, _, address = server
    with contextlib.closing(ask(address, n=10, stream=True, partial_images=3)) as crawling:
        started = time.monotonic()
        assert client.images.generate(prompt="cat").data
        assert time.monotonic() - started < TTL
        until(lambda: engine.is_idle)
        crawling.recv(1)


def test_who_sends_half_a_request_holds_nobody_up(server, client):
    _, _, address = server
    with socket.create_connection(address, TIMEOUT) as half:
        half.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Le")
        assert client.images.generate(prompt="cat").data


def test_who_sends_too_slowly_is_told_so(server, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    with socket.create_connection(server[2], TIMEOUT) as slow:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
        slow.sendall(f"{head}\r\nContent-Length: 99\r\n\r\n{{".encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_clock_going_back_changes_nothing(server, client, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert client.images.generate(prompt="cat").created == 0
