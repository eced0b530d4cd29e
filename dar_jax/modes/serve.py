"""`--mode=serve`: an HTTP API, OpenAI's for images, whose previews are streamed."""

import dataclasses
import importlib
import pathlib
import socket
from typing import Any

import jax
from absl import logging

from dar_jax.config import Config
from dar_jax.generation.batches import load, model_path, takes_texts
from dar_jax.kinds.loading import open_model
from dar_jax.pipelines.dar import DarPipeline
from dar_jax.serving.config import ServeConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")
NEEDED = ("python_multipart", "prometheus_client", "starlette", "uvicorn")
"""The first is of forms, which else fail when one comes."""
PROMPT = "a red apple"
"""For models of captions to compile with."""


def serve(config: Config, workdir: str) -> None:
    """Serve the model of `config.sample.model` or `WORKDIR/model` until interrupted.

    Raises:
        ValueError: a package is not installed, the model, the port or the file of keys cannot be
            used, or there is more than one process.
    """
    settings = config.serve
    if jax.process_count() > 1:
        raise ValueError(f"--mode=serve is for one process, there are {jax.process_count()}")
    for package in NEEDED:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--mode=serve needs {error.name}, which is not installed; "
                "run pip install 'dar-jax[serve]'"
            ) from error
    from dar_jax.serving.app import make_app
    from dar_jax.serving.server import Server

    with _bound(settings) as listener:
        service = make_service(config, workdir)
        server = Server(make_app(service), service.engine, settings)
        logging.info("http://%s:%d, ready when /health says so", settings.host, settings.port)
        server.run(sockets=[listener])
    if service.engine.failure is not None:
        raise service.engine.failure


def make_service(config: Config, workdir: str) -> Any:
    """Load the model, and return what the routes work with: a `serving.app.Service`.

    Raises:
        ValueError: the model or the file of keys cannot be used.
    """
    from dar_jax.serving.app import Service
    from dar_jax.serving.drawing import lane_batch
    from dar_jax.serving.engine import Engine
    from dar_jax.serving.inputs import Offer
    from dar_jax.serving.keys import ApiKeys
    from dar_jax.serving.streams import ImageBatch

    settings = config.serve
    keys = ApiKeys.read(settings.api_key_file)
    sample, path = config.sample, model_path(config.sample, workdir)
    if texts := takes_texts(open_model(path).architecture):
        sample = dataclasses.replace(sample, prompts=sample.prompts or PROMPT)
    pipeline = load(sample, workdir, compute=config.compute, mesh=config.mesh)
    sampling, architecture = sample.sampling(pipeline.sampling), pipeline.prior.config
    if isinstance(pipeline, DarPipeline) and not texts and not architecture.max_guidance:
        batch = lane_batch(pipeline, sampling, settings.batch_size)
        previews = batch.drawing.preview_groups[:-1]
    else:
        logging.info("Images of this kind of model are drawn one after the other")
        batch = ImageBatch(pipeline, sampling, PROMPT if texts else 0)
        previews = batch.steps[:-1]
    engine = Engine(batch, max_waiting=settings.max_waiting, ttl=settings.ttl)
    offer = Offer.of(pipeline, sampling, _name(path), previews, settings.max_images)
    return Service(engine, offer, settings, keys)


def _bound(settings: ServeConfig) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ValueError: the address cannot be bound to.
    """
    if settings.host not in LOOPBACK and not settings.api_key_file:
        logging.warning(
            "Whoever can reach %s may draw: config.serve.api_key_file asks for keys", settings.host
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"config.serve.host={settings.host!r} and .port={settings.port} cannot be bound to: "
            f"{error.strerror}"
        ) from error


def _name(path: str) -> str:
    """Return what the model is called: the name of its directory, or of the workdir around it."""
    parts = [part for part in pathlib.PurePath(path).parts if part not in ("model", "/", ".")]
    return parts[-1] if parts else "model"
