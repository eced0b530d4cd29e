"""Copies a run's figures and pictures to Weights & Biases, where `config.wandb.project` names one.

The client reads its own environment: `WANDB_MODE=offline` keeps everything in `WORKDIR/wandb` for
`wandb sync`, `WANDB_ENTITY` names the team. A run that resumes continues its curves; the steps that
it repeats after a kill come out the same, and the client drops them.
"""

import dataclasses
import importlib.metadata
import json
import uuid
from collections.abc import Mapping

import numpy as np

from dar_jax.common import storage
from dar_jax.common.files import replacing
from dar_jax.common.typing import UInt8

ID_NAME = "wandb_id"
"""File of the workdir that holds the id of its run."""


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """The project that a run belongs to; empty: nothing is sent."""

    project: str = ""

    def __post_init__(self):
        if not self.project:
            return
        try:
            importlib.metadata.distribution("wandb")
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(
                f"project={self.project!r} needs wandb, which is not installed; "
                "run pip install 'dar-jax[wandb]'"
            ) from error


class Tracker:
    """One run of a project; for one process of a job."""

    def __init__(self, config: WandbConfig, workdir: storage.Path):
        """Begin the run of a workdir that holds its `config.json`, or go on with it.

        Raises:
            ValueError: the client refuses, for example because nobody is logged in.
        """
        import wandb

        path = workdir / ID_NAME
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        self._copies = storage.Copies(workdir)  # of which nothing is sent: the client does that
        try:
            self._run = wandb.init(
                project=config.project,
                id=path.read_text(),
                resume="allow",
                name=workdir.name,
                dir=self._copies.local,
                config=json.loads((workdir / "config.json").read_text()),
            )
        except (wandb.Error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"cannot log to the W&B project {config.project!r}: run `wandb login`, or set "
                f"WANDB_MODE=offline ({reason})"
            ) from error
        self._image = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Send the pictures of a step, which must not be before that of the last call."""
        self._run.log({name: self._image(pixels) for name, pixels in pictures.items()}, step=step)

    def close(self) -> None:
        """Wait until everything is sent, or written if the client is offline."""
        self._run.finish()
