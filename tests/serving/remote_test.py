"""Replicas behind one address, of which some are lost; in one process, without a cluster."""

import json

import pytest

from dar_jax.serving.config import ServeConfig
from dar_jax.serving.keys import ApiKeys
from tests.serving.fake import NUM_GROUPS, OFFER, FakeBatch

NEEDED = "the API needs what pip install 'dar-jax[serve]' brings"
testclient = pytest.importorskip("starlette.testclient", reason=NEEDED)
api = pytest.importorskip("dar_jax.serving.app", reason=NEEDED)
remote = pytest.importorskip("dar_jax.serving.remote", reason=NEEDED)
Engine = pytest.importorskip("dar_jax.serving.engine", reason=NEEDED).Engine

ROUTE = "/v1/images/generations"
LIMIT = 1000


class LostError(Exception):
    """What a cluster raises when a replica is no more."""


@pytest.fixture(scope="module")
def replica():
    engine = Engine(FakeBatch(), max_waiting=20, ttl=20.0)
    service = api.Service(engine, OFFER, ServeConfig(), ApiKeys())
    yield remote.Replica(api.make_app(service), engine)
    engine.close()


@pytest.fixture
def front(replica):
    """Return a function that gives a client; of each try, so many messages come before the loss."""

    def make(*lost_after):
        tries = iter(lost_after)

        async def ask(scope, body):
            left = next(tries, None)
            async for message in replica.answer(scope, body):
                if left == 0:
                    raise LostError
                left = left and left - 1
                yield message

        async def app(scope, receive, send):
            response = await front(api.Request(scope, receive))
            await response(scope, receive, send)

        front = remote.Front(ask, LostError, LIMIT)
        return testclient.TestClient(app)

    return make


def kinds(response):
    lines = response.text.splitlines()
    return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]


def test_what_replicas_answer_is_passed_on(front):
    client = front()
    assert client.get("/health").json() == {"status": "ready"}
    assert client.get("/v1/models").headers["content-type"] == "application/json"
    assert client.post(ROUTE, json={"prompt": "dgo"}).status_code == 400
    response = client.post(ROUTE, json={"prompt": "dog", "stream": True, "partial_images": 3})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert len(kinds(response)) == NUM_GROUPS
    assert client.post(ROUTE, content=bytes(LIMIT + 1)).status_code == 413


def test_a_request_of_a_lost_replica_is_asked_of_another_once(front):
    wanted = {"prompt": "dog", "seed": 5, "n": 2}
    expected = front().post(ROUTE, json=wanted).json()["data"]
    for after in (0, 1):  # messages: the second is the body
        assert front(after).post(ROUTE, json=wanted).json()["data"] == expected
    stream = {"prompt": "dog", "stream": True, "partial_images": 3}
    assert len(kinds(front(1).post(ROUTE, json=stream))) == NUM_GROUPS
    response = front(0, 0).post(ROUTE, json=wanted)
    assert response.status_code == 503 and response.headers["Retry-After"]
    assert "ask again" in response.json()["error"]["message"]


def test_a_stream_that_is_cut_off_says_so(front):
    client = front(2)
    response = client.post(ROUTE, json={"prompt": "dog", "stream": True, "partial_images": 3})
    assert kinds(response) == ["image_generation.partial_image", "error"]
    told = json.loads(response.text.rstrip().rpartition("data: ")[2])
    assert told["type"] == "error" and told["error"]["code"] == "not_ready"


def test_an_engine_that_fails_is_no_replica():
    batch = FakeBatch()
    batch.warm_up = lambda: 1 // 0
    engine = Engine(batch, max_waiting=20, ttl=20.0)
    with pytest.raises(RuntimeError, match="the engine is failed: ZeroDivisionError"):
        remote.Replica(None, engine)
