"""`--mode=demo`: a page on which images grow while their tokens are generated."""

import dataclasses
import os

import jax
import ml_collections
from absl import logging

from dar_jax.common.config_build import build
from dar_jax.demo.batch import MEGABYTE, BatchGenerator
from dar_jax.demo.queue import RequestQueue
from dar_jax.generation.batches import load

MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Where the page is served, and how much of it.

    Attributes:
        host: address to bind to; "0.0.0.0" lets everybody in who can reach this computer.
        port: to bind to.
        batch_size: most images of a request.
        max_requests: that are served or wait at the same time.
        max_upload_megabytes: size of an uploaded picture.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    batch_size: int = 8
    max_requests: int = 16
    max_upload_megabytes: int = 10

    def __post_init__(self):
        if not 1 <= self.port <= MAX_PORT:
            raise ValueError(f"port={self.port} must be in 1..{MAX_PORT}")
        for name in ("batch_size", "max_requests", "max_upload_megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_megabytes * MEGABYTE


def demo(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Serve the model of `config.sample.model` or `WORKDIR/model` until interrupted.

    Raises:
        ValueError: gradio is not installed, the model or the port cannot be used, or there is
            more than one process.
    """
    settings = build(DemoConfig, config.demo.to_dict(), "config.demo")
    if jax.process_count() > 1:
        raise ValueError(f"--mode=demo is for one process, there are {jax.process_count()}")
    # Before it is imported, which is when it looks.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from dar_jax.demo.page import Page
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--mode=demo needs {error.name}, which is not installed; "
            "run pip install 'dar-jax[demo]'"
        ) from error
    sampling, pipeline = load(config, workdir)
    generator = BatchGenerator(pipeline, sampling, settings.batch_size)
    logging.info(
        "Compiled in %.1f s for batches of %d images; no request compiles anything",
        generator.compile_seconds,
        generator.batch_size,
    )
    requests = RequestQueue(generator.stream, settings.max_requests)
    page = Page(generator, requests, settings.max_upload_bytes)
    try:
        page.launch(settings.host, settings.port)
        page.blocks.block_thread()
    finally:
        requests.close()
