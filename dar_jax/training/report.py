"""What a run tells of its steps: checked, averaged, written, one step late."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from clu import metrics as clu_metrics
from clu import parameter_overview

from dar_jax.common import files, storage
from dar_jax.common.progress import Progress
from dar_jax.common.tree import num_parameters
from dar_jax.common.typing import Params
from dar_jax.data.pipeline import TrainIterator, usable_cores
from dar_jax.parallel import distributed
from dar_jax.training import metrics
from dar_jax.training.config import TrainConfig
from dar_jax.training.finite import SkippedSteps

LONG_WAIT = 0.2
"""Share of a step that waits for data above which something is said."""
SILENT_SECONDS = 30.0
"""After which a step is reported, if its metrics are not."""


def is_due(step: int, every: int, last_step: int) -> bool:
    """Tell whether what happens every so many steps, and at the end, happens after this one."""
    return every > 0 and (step % every == 0 or step == last_step)


def describe(
    workdir: storage.Path, config: Mapping[str, Any], params: Params, mesh: jax.sharding.Mesh
) -> None:
    """Log what is trained, in two lines; the whole config and a table of arrays go to files."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    texts = {"config.json": json.dumps(config, indent=2), "parameters.txt": overview}
    count = num_parameters(params)
    logging.info("Parameters: %s; %s are in %s", f"{count:,}", " and ".join(texts), workdir)
    logging.info("Mesh: %s of %s", dict(mesh.shape), jax.devices()[0].device_kind)

    def write() -> None:
        for name, text in texts.items():
            with files.replacing(workdir / name) as temporary:
                temporary.write_text(f"{text}\n")

    distributed.of_first(write)


class Report:
    """Checks, averages and writes the metrics of each step, one step late."""

    def __init__(
        self,
        config: TrainConfig,
        writer: metrics.Writer,
        iterator: TrainIterator,
        *,
        interval: metrics.Interval,
        schedule: optax.Schedule,
        skipped: SkippedSteps,
        num_steps: int,
        why_negative: str,
    ):
        """Begin a report.

        Args:
            config: when to write.
            writer: takes a line every so many steps.
            iterator: of the batches.
            interval: averages between two lines.
            schedule: of the learning rate.
            skipped: judges the steps.
            num_steps: that are ahead.
            why_negative: said of the first loss below zero, "" if there can be none.
        """
        self._config = config
        self._writer = writer
        self._iterator = iterator
        self._interval = interval
        self._schedule = schedule
        self._skipped = skipped
        self._progress = Progress(num_steps, "steps", every=SILENT_SECONDS)
        self._why_negative = why_negative
        self._pending = None
        self._advised = False

    def save(self) -> dict[str, Any]:
        """Return, as JSON types, the metrics since the last line, and what the file had then."""
        return {"metrics": self._interval.save(), "written": self._writer.written()}

    def _wait(self) -> dict[str, float]:
        """Return how long a step waited for data; say once what helps, if that is long."""
        seconds, share = self._iterator.take_wait()
        if share > LONG_WAIT and not self._advised:
            self._advised = True
            advice = self._iterator.advice(usable_cores())
            logging.warning("%.0f %% of a step is waiting for data: %s", 100 * share, advice)
        return {"perf/data_wait": seconds, "perf/data_wait_share": share}

    def push(self, step: int, update: clu_metrics.Collection) -> None:
        """Take the metrics of the step just dispatched and handle those of the one before."""
        self.flush()
        batch = self._iterator.get_state()["next_index"] - 1
        self._pending = (step, batch, update)

    def flush(self) -> None:
        """Wait for the pending step and handle its metrics."""
        if self._pending is None:
            return
        step, batch, update = self._pending
        self._pending = None
        update = jax.device_get(update)
        if self._skipped.is_applied(step, batch, update):
            self._interval.add(step, update)
        due = is_due(step, self._config.log_every, self._config.steps)
        self._progress.add(1, told=due)
        if due:
            rate = {"train/learning_rate": float(np.asarray(self._schedule(step - 1)))}
            values = self._interval.take(step)
            self._writer.scalars(step, {**values, **rate, **self._wait()})
            if self._why_negative and values.get("train/loss", 0.0) < 0:
                logging.info("The loss is below zero, as it may be: %s", self._why_negative)
                self._why_negative = ""

    def restart_clock(self, step: int) -> None:
        """Measure throughput from here on: pictures and saving are not training."""
        self._interval.restart_clock(step)
