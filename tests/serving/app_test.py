"""The API, with an engine that draws squares."""

import asyncio
import base64
import hashlib
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from dar_jax.serving.config import MEGABYTE, ServeConfig
from dar_jax.serving.keys import ApiKeys
from tests.serving.fake import NUM_GROUPS, OFFER, SIDE, FakeBatch

NEEDED = "the API needs what pip install 'dar-jax[serve]' and httpx2 bring"
testclient = pytest.importorskip("starlette.testclient", reason=NEEDED)
pytest.importorskip("python_multipart", reason=NEEDED)
api = pytest.importorskip("dar_jax.serving.app", reason=NEEDED)
Engine = pytest.importorskip("dar_jax.serving.engine", reason=NEEDED).Engine

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
KEY = "a key"


def opened(batch, keys=(), **config):
    """A client of a server that is ready."""
    config = ServeConfig(max_body_megabytes=1, **config)
    engine = Engine(batch, max_waiting=config.max_waiting, ttl=config.ttl)
    app = api.make_app(api.Service(engine, OFFER, config, ApiKeys(keys)))
    client = testclient.TestClient(app, raise_server_exceptions=False)
    client.__enter__()
    while engine.status == "starting":
        pass
    return client


@pytest.fixture(scope="module")
def batch():
    return FakeBatch()


@pytest.fixture(scope="module")
def client(batch):
    client = opened(batch, max_waiting=8, max_images=4)
    yield client
    client.__exit__(None, None, None)


def picture(file):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def png(pixels, size=SIDE):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).resize((size, size)).save(file, "PNG")
    return file.getvalue()


def with_hole(opacity=0):
    pixels = np.full((SIDE, SIDE, 4), 255)
    pixels[2:4, :, 3] = opacity
    return png(pixels)


def events(response):
    for block in filter(None, response.text.split("\n\n")):
        name, data = block.split("\n")
        data = json.loads(data.removeprefix("data: "))
        assert name == f"event: {data['type']}"
        yield data


def refused(response, status):
    """The error of a response, of which there is one sentence."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_images_come_in_the_format_that_is_asked_for(client, output_format):
    body = {"prompt": "dog", "n": 3, "seed": 1, "output_format": output_format}
    answer = client.post(GENERATIONS, json=body).json()
    assert len(answer["data"]) == 3 and answer["seed"] == 1 and answer["size"] == "8x8"
    assert answer["usage"]["total_tokens"] == 3 + 3 * OFFER.num_tokens
    for image in answer["data"]:
        file = base64.b64decode(image["b64_json"])
        assert Image.open(io.BytesIO(file)).format == output_format.upper()
    if output_format == "png":
        assert (picture(image["b64_json"])[1:] == 1).all()


def test_streams_previews_before_the_image(client):
    body = {"prompt": "dog", "n": 2, "stream": True, "partial_images": 3}
    response = client.post(GENERATIONS, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = list(events(response))
    for image in range(2):
        own = [event for event in found if event["image_index"] == image]
        kinds = [event["type"].removeprefix("image_generation.") for event in own]
        assert kinds == ["partial_image"] * 3 + ["completed"]
        assert [event["partial_image_index"] for event in own[:-1]] == [0, 1, 2]
        groups = [picture(event["b64_json"])[0, 0, 0] for event in own]
        assert groups == [1, 2, 3, NUM_GROUPS]


def test_edits_keep_what_is_opaque(client, batch, monkeypatch):
    seen = []
    draw = batch.draw
    monkeypatch.setattr(
        batch,
        "draw",
        lambda active: seen.extend(i.request for i in active.values()) or draw(active),
    )
    files = {"image": ("a.png", png(np.full((SIDE, SIDE, 3), 255)), "image/png")}
    files["mask"] = ("m.png", with_hole(), "image/png")
    form = {"prompt": "cat", "n": "2", "seed": "3", "stream": "true", "guidance[]": ["1", "2"]}
    found = list(events(client.post(EDITS, data=form, files=files)))
    assert [event["type"] for event in found] == ["image_edit.completed"] * 2
    request = seen[0]
    np.testing.assert_array_equal(request.mask.all(axis=1), ~np.isin(np.arange(SIDE), (2, 3)))
    assert (request.known == 1).all() and request.known.shape == (SIDE, SIDE, 3)
    assert request.labels == (0, 0) and request.sampling.guidance_scale == (1.0, 2.0)


def test_the_images_own_transparency_is_the_mask_without_one(client):
    response = client.post(EDITS, data={"prompt": "cat"}, files={"image": with_hole()})
    assert len(response.json()["data"]) == 1


def bomb():
    """A PNG whose header says 5,000 x 5,000 pixels, and which holds none."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"image": bomb()}, "5000 x 5000 pixels, more than 16,777,216"),
        ({"image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "not a picture of a known"),
        ({"image": with_hole()[:40]}, "image: "),
        ({"image": png(np.zeros((4, 4, 3)))}, "the image is transparent nowhere"),
        ({"image": with_hole(), "mask": png(np.zeros((4, 4, 4)), 16)}, "the mask is 16 x 16"),
        ({"image": with_hole(), "mask": with_hole(255)}, "the mask is transparent nowhere"),
        ({"mask": with_hole()}, "expected the file image"),
        ({"image": with_hole(), "prompt": with_hole()}, "'prompt' is a file"),
    ],
)
def test_bad_pictures_are_refused_before_they_are_decoded(client, files, says):
    files = {name: (f"{name}.png", file, "image/png") for name, file in files.items()}
    error = refused(client.post(EDITS, data={"prompt": "cat"}, files=files), 400)
    assert says in error["message"]


def test_unknown_class_offers_the_nearest(client):
    error = refused(client.post(GENERATIONS, json={"prompt": "dgo"}), 400)
    assert "there is dog" in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "unknown_class")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"1" * 9999])
def test_malformed_json_is_refused(client, body):
    response = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert "no JSON" in refused(response, 400)["message"]


@pytest.mark.parametrize("body", [b'{"prompt": "\\ud800"}', b'{"prompt": 3, "\\ud800": 1}'])
def test_half_of_a_surrogate_pair_is_no_text(client, body):
    response = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert "surrogates not allowed" in refused(response, 400)["message"]


def test_other_content_is_refused(client):
    """A page of another origin may post text and forms, but no JSON."""
    refused(client.post(GENERATIONS, content=b"{}", headers={"content-type": "text/plain"}), 415)
    refused(client.post(EDITS, json={}), 415)
    named = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(GENERATIONS, content=b'{"prompt": "cat"}', headers=named).status_code == 200
    for origin in ("http://elsewhere.example", "null"):
        headers = {"origin": origin}
        refused(client.post(GENERATIONS, json={"prompt": "cat"}, headers=headers), 403)
    answer = client.post(
        GENERATIONS, json={"prompt": "cat"}, headers={"origin": "http://testserver"}
    )
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("is_declared", [True, False])
def test_large_bodies_are_refused_unread(client, is_declared):
    def chunks():
        for _ in range(5):
            yield b" " * MEGABYTE

    headers = {"content-type": "application/json"}
    headers |= {"content-length": str(100 * MEGABYTE)} if is_declared else {}
    for route, extra in (
        (GENERATIONS, {}),
        (EDITS, {"content-type": "multipart/form-data; boundary=b"}),
    ):
        response = client.post(route, content=chunks(), headers={**headers, **extra})
        assert "larger than 1 MB" in refused(response, 413)["message"]


def test_a_full_queue_is_429_and_says_when_to_come_back(client, batch):
    batch.gate.clear()
    answers = []

    def ask(count):
        answers.append(client.post(GENERATIONS, json={"prompt": "cat", "n": count}))

    asking = [threading.Thread(target=ask, args=(4,)) for _ in range(3)]
    for thread in asking:
        thread.start()
    while not answers:
        pass
    error = refused(answers[0], 429)
    assert error["type"] == "rate_limit_error" and answers[0].headers["retry-after"]
    batch.gate.set()
    for thread in asking:
        thread.join()
    assert sorted(answer.status_code for answer in answers)[0] == 200


def test_who_reads_too_slowly_is_cut_off():
    closed = []

    async def content():
        try:
            yield "event"
        finally:
            closed.append(True)

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)  # until there is room for more

    async def respond():
        await api.EventStream(content(), 0.05)({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(respond(), 10))
    assert closed


def test_a_failure_is_a_500_and_an_event_in_a_stream(client, batch, monkeypatch):
    monkeypatch.setattr(batch, "broken", 2)
    error = refused(client.post(GENERATIONS, json={"prompt": "car"}), 500)
    assert "out of memory" in error["message"]
    (event,) = events(client.post(GENERATIONS, json={"prompt": "car", "stream": True}))
    assert event["type"] == "error" and event["error"]["type"] == "server_error"


def test_models_health_page_and_unknown_routes(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "squares" and model["class_names"] == ["cat", "dog", "car"]
    assert client.get("/v1/models/squares").json() == model
    refused(client.get("/v1/models/other"), 404)
    refused(client.get("/v1/nothing"), 404)
    refused(client.get(GENERATIONS), 405)
    assert client.get("/health").json() == {"status": "ready"}
    assert "<title>" in client.get("/").text


def test_metrics_count(client):
    client.post(GENERATIONS, json={"prompt": "cat"})
    text = client.get("/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("dar_images_total"))
    assert float(line.split()[-1]) >= 1
    assert f'dar_requests_total{{route="{GENERATIONS}",status="200"}}' in text
    assert "dar_first_preview_seconds_bucket" in text


def test_keys_are_asked_for_where_there_are_some():
    client = opened(FakeBatch(), keys=(hashlib.sha256(KEY.encode()).hexdigest(),))
    body = {"prompt": "cat"}
    assert "missing" in refused(client.post(GENERATIONS, json=body), 401)["message"]
    for wrong in ("Bearer other", "Basic " + KEY, "Bearer"):
        refused(client.post(GENERATIONS, json=body, headers={"authorization": wrong}), 401)
    refused(client.get("/v1/models"), 401)
    right = {"authorization": f"Bearer {KEY}"}
    assert client.post(GENERATIONS, json=body, headers=right).status_code == 200
    assert client.get("/health").status_code == 200
    client.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("text", "says"), [("", "holds no key"), ("hunter2\n", "line 1: expected the SHA-256")]
)
def test_bad_files_of_keys_are_refused(tmp_path, text, says):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        ApiKeys.read(str(tmp_path / "keys"))
    assert "hunter2" not in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        ApiKeys.read(str(tmp_path / "none"))


def test_nothing_is_taken_before_it_is_ready():
    batch, begin = FakeBatch(), threading.Event()
    batch.warm_up = begin.wait
    config = ServeConfig()
    engine = Engine(batch, max_waiting=8, ttl=60.0)
    with testclient.TestClient(
        api.make_app(api.Service(engine, OFFER, config, ApiKeys()))
    ) as client:
        assert client.get("/health").status_code == 503
        refused(client.post(GENERATIONS, json={"prompt": "cat"}), 503)
        begin.set()
        while client.get("/health").status_code != 200:
            pass
        engine.drain()
        assert client.get("/health").json() == {"status": "draining"}
