"""The routes of the API: OpenAI's for images, health, metrics, and a page.

There are no headers for other origins (CORS), and what comes from a page of another one is refused.
"""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dar_jax.serving.config import MEGABYTE, ServeConfig
from dar_jax.serving.engine import Engine, Ticket
from dar_jax.serving.errors import ApiError
from dar_jax.serving.events import Answer, EventStream
from dar_jax.serving.inputs import Offer, Wanted, read, read_form
from dar_jax.serving.keys import ApiKeys
from dar_jax.serving.metrics import CONTENT_TYPE
from dar_jax.serving.pictures import read_edit

PAGE = pathlib.Path(__file__).with_name("page.html")
BODY_SECONDS = 30.0
"""In which a request has to arrive."""
LINGER_SECONDS = 30.0
"""In which a stream has to be read to its end when everything is drawn."""
MAX_FIELDS, MAX_FILES = 32, 2
JSON_BYTES = MEGABYTE
"""Of a body of JSON, which is short."""
DECODERS = 2
"""Pictures that are decoded at a time: each may take hundreds of megabytes."""
CLIENT_LEFT = 499
"""What servers note where nobody is left to be answered."""
RETRY_AFTER = {429: "1", 503: "5"}
"""Seconds, by status."""


class Service(NamedTuple):
    """What the routes work with."""

    engine: Engine
    offer: Offer
    config: ServeConfig
    keys: ApiKeys


def make_app(service: Service) -> Starlette:
    """Return the application; the engine starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.close)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", get_model),
            Route("/v1/images/generations", counted(generate), methods=["POST"]),
            Route("/v1/images/edits", counted(edit), methods=["POST"]),
        ],
        exception_handlers={ApiError: tell, HTTPException: tell, Exception: tell},
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.decoding = asyncio.Semaphore(DECODERS)
    return app


async def page(request: Request) -> Response:
    """Answer with the page that shows images growing."""
    return Response(PAGE.read_bytes(), media_type="text/html")


async def health(request: Request) -> Response:
    """Tell whether requests are taken."""
    status = _service(request).engine.status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Answer with the counters, for Prometheus."""
    return Response(_service(request).engine.metrics.text(), media_type=CONTENT_TYPE)


async def list_models(request: Request) -> Response:
    """List the one model."""
    _owner(request)
    return JSONResponse({"object": "list", "data": [_model(_service(request).offer)]})


async def get_model(request: Request) -> Response:
    """Describe the model of that name."""
    _owner(request)
    offer, name = _service(request).offer, request.path_params["model"]
    if name != offer.model:
        raise ApiError(404, f"there is no model {name[:60]!r}", code="model_not_found")
    return JSONResponse(_model(offer))


async def generate(request: Request) -> Response:
    """Draw images of a class."""
    owner, service = _owner(request), _service(request)
    _check_media_type(request, "application/json")
    async with arriving(request, min(JSON_BYTES, service.config.max_body_bytes)) as bounded:
        try:
            fields = await bounded.json()
            json.dumps(fields, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from error
    return await _answer(request, owner, "image_generation", read(fields, service.offer))


async def edit(request: Request) -> Response:
    """Draw again what is transparent of a picture."""
    owner, service = _owner(request), _service(request)
    if not service.offer.edits:
        raise ApiError(400, f"{service.offer.model!r} makes images and edits none")
    _check_media_type(request, "multipart/form-data")
    async with arriving(request, service.config.max_body_bytes) as bounded:
        form = await bounded.form(max_fields=MAX_FIELDS, max_files=MAX_FILES)
    try:
        fields, (image, mask) = _split(form)
        async with request.app.state.decoding:
            contents = await image.read(), await mask.read() if mask else None
            kept = await run_in_threadpool(read_edit, *contents, service.offer.image_size)
    finally:
        await form.close()
    wanted = read(read_form(fields), service.offer, kept)
    return await _answer(request, owner, "image_edit", wanted)


def _check_media_type(request: Request, expected: str) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        raise ApiError(415, f"Content-Type: {given[:60]!r}, expected {expected}")


def _split(form: FormData) -> tuple[dict[str, Any], tuple[UploadFile, UploadFile | None]]:
    """Return the fields of a form, lists among them as JSON, and the files image and mask."""
    fields, files = {}, {}
    for name in form:
        key, values = name.removesuffix("[]"), form.getlist(name)
        if key in ("image", "mask"):
            if len(values) > 1 or not isinstance(values[0], UploadFile):
                raise ApiError(400, f"{key} must be one file", param=key)
            files[key] = values[0]
        elif any(isinstance(value, UploadFile) for value in values):
            raise ApiError(400, f"{key[:60]!r} is a file; expected image, and mask", param=key[:60])
        else:
            fields[key] = values[0] if len(values) == 1 else f"[{','.join(map(str, values))}]"
    if "image" not in files:
        raise ApiError(400, "expected the file image, and mask if that is opaque", param="image")
    return fields, (files["image"], files.get("mask"))


async def tell(request: Request, error: Exception) -> Response:
    """Answer with an error as JSON."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server has made a mistake; its log says which")
    headers = {"Retry-After": RETRY_AFTER[error.status]} if error.status in RETRY_AFTER else None
    return JSONResponse(error.to_json(), error.status, headers)


def counted(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Count the answers of a route by their status."""

    async def count(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except (ApiError, HTTPException) as error:
            response = await tell(request, error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        requests = _service(request).engine.metrics.requests
        requests.labels(request.url.path, response.status_code).inc()
        return response

    return count


async def _answer(request: Request, owner: str, what: str, wanted: Wanted) -> Response:
    service, updates = _service(request), asyncio.Queue()
    loop, answer = asyncio.get_running_loop(), Answer(what, wanted, service.offer)
    ticket = service.engine.submit(
        owner, wanted.request, lambda update: loop.call_soon_threadsafe(updates.put_nowait, update)
    )
    if wanted.stream:
        events = _events(service.engine, ticket, updates, answer)
        return EventStream(events, service.config.ttl + LINGER_SECONDS)
    leaving = asyncio.create_task(_cancel_if_left(request, service.engine, ticket))
    pieces = []
    try:
        while (update := await updates.get()) is not None:
            if isinstance(update, ApiError):
                raise update
            pieces.append(update)
    finally:
        leaving.cancel()
        service.engine.cancel(ticket)
    if ticket.missing:
        return Response(status_code=CLIENT_LEFT)
    return JSONResponse(await answer.json(pieces))


async def _events(
    engine: Engine, ticket: Ticket, updates: asyncio.Queue, answer: Answer
) -> AsyncIterator[str]:
    try:
        while (update := await updates.get()) is not None:
            yield await answer.event(update)
    finally:
        engine.cancel(ticket)


async def _cancel_if_left(request: Request, engine: Engine, ticket: Ticket) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(ticket)


def _service(request: Request) -> Service:
    return request.app.state.service


def _model(offer: Offer) -> dict[str, Any]:
    about = dict(class_names=offer.class_names, num_classes=offer.num_classes, size=offer.size)
    about["previews"] = len(offer.previews)
    return {"id": offer.model, "object": "model", "created": 0, "owned_by": "dar_jax", **about}


def _owner(request: Request) -> str:
    """Tell whose request it is, and let nobody in who must not."""
    origin = request.headers.get("origin")  # "null" of a page in a sandbox, or of a file
    if origin and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "pages of other origins are not let in: use the page at /")
    client = request.client.host if request.client else ""
    return _service(request).keys.owner(request.headers.get("authorization", ""), client)


@contextlib.asynccontextmanager
async def arriving(request: Request, limit: int) -> AsyncIterator[Request]:
    """Give the request with a body that is bounded, to so many bytes and in time."""
    too_large = ApiError(413, f"the body is larger than {limit / MEGABYTE:g} MB")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > limit:
        raise too_large
    size = 0

    async def receive() -> Any:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise too_large
        return message

    try:
        async with asyncio.timeout(BODY_SECONDS):
            yield Request(request.scope, receive)
    except TimeoutError as error:
        raise ApiError(408, f"the body has not come within {BODY_SECONDS:g} s") from error
