"""`--mode=demo`: a page on which images grow while their tokens are generated."""

import dataclasses
import math
import os

import jax
from absl import logging

from dar_jax.config import Config
from dar_jax.demo.batch import PROMPT, BatchGenerator
from dar_jax.generation.batches import load, model_path, takes_texts
from dar_jax.kinds.loading import open_model


def demo(config: Config, workdir: str) -> None:
    """Serve the model of `config.sample.model` or `WORKDIR/model` until interrupted.

    Raises:
        ValueError: gradio is not installed, the model or the port cannot be used, or there is
            more than one process.
    """
    settings = config.demo
    if jax.process_count() > 1:
        raise ValueError(f"--mode=demo is for one process, there are {jax.process_count()}")
    # Before it is imported, which is when it looks.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from dar_jax.demo.page import Page
        from dar_jax.serving.engine import Engine
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--mode=demo needs {error.name}, which is not installed; "
            "run pip install 'dar-jax[demo]'"
        ) from error
    sampling = config.sample
    if takes_texts(open_model(model_path(sampling, workdir)).architecture):
        sampling = dataclasses.replace(sampling, prompts=sampling.prompts or PROMPT)
    pipeline = load(sampling, workdir, compute=config.compute, mesh=config.mesh)
    logging.info("Compiling all that a request may need, which takes a minute or more")
    generator = BatchGenerator(pipeline, sampling, settings.batch_size)
    logging.info(
        "Compiled in %.1f s for batches of %d images; no request compiles anything",
        generator.compile_seconds,
        generator.batch_size,
    )
    engine = Engine(generator, max_waiting=settings.max_requests, ttl=math.inf)
    page = Page(generator, engine, settings.max_upload_bytes)
    engine.start()
    try:
        page.launch(settings.host, settings.port, settings.max_requests)
        page.blocks.block_thread()
    finally:
        engine.close()
