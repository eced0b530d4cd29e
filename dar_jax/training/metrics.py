"""What a step reports, how steps are averaged, and where the figures are written."""

import datetime
import functools
import hashlib
import json
import math
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metrics as clu_metrics
from PIL import Image

from dar_jax.common import storage
from dar_jax.common.files import parse_json, replacing
from dar_jax.common.typing import UInt8
from dar_jax.parallel.chips import chip_of
from dar_jax.tasks.base import Task, average
from dar_jax.training.tracking import Tracker, WandbConfig

FILE_NAME = "metrics.jsonl"
BAD_SUFFIX = ".bad"
EVENTS_SECONDS = 60.0
"""Between two copies of the events to a bucket; a kill loses what came since the last."""


def collection(task: Task) -> type[clu_metrics.Collection]:
    """Return the collection of the task's metrics, the total loss and the gradient norm.

    Equal metrics have one class, see `tasks.base.average`.
    """
    own = {"loss": average("loss"), "grad_norm": average("grad_norm")}
    return _collection(tuple({**own, **task.metrics()}.items()))


@functools.cache
def _collection(
    metrics: tuple[tuple[str, type[clu_metrics.Metric]], ...],
) -> type[clu_metrics.Collection]:
    return clu_metrics.Collection.create(**dict(metrics))


def performance(
    seconds_per_step: float,
    batch_size: int,
    flops_per_image: float,
    devices: Sequence[Any],
) -> dict[str, float]:
    """Return the speed of a step under its logged names.

    `mfu` (model FLOPs utilisation, Chowdhery et al. 2022) is the share of the devices' bfloat16
    peak that the model's own FLOPs take; left out for devices whose peak is not known.

    Args:
        seconds_per_step: wall time of one step.
        batch_size: images of one step, of all devices.
        flops_per_image: model FLOPs of one image.
        devices: all devices that share the batch.
    """
    images_per_second = batch_size / seconds_per_step
    flops_per_device = images_per_second * flops_per_image / len(devices)
    values = {
        "perf/seconds_per_step": seconds_per_step,
        "perf/steps_per_second": 1 / seconds_per_step,
        "perf/images_per_second": images_per_second,
        "perf/tflops_per_device": flops_per_device / 1e12,
    }
    chip = chip_of(devices)
    if chip is not None:
        values["perf/mfu"] = flops_per_device / chip.peak_flops
    return values


class Interval:
    """Metrics averaged since the last `take`, with the speed of the same steps.

    The clock starts when the first step is done, so that compilation does not count.
    """

    def __init__(self, batch_size: int, flops_per_image: float, devices: Sequence[Any]):
        """Remember what `performance` needs besides the time."""
        self._work = (batch_size, flops_per_image, devices)
        self._metrics: clu_metrics.Collection | None = None
        self._earlier = []
        self._start: tuple[int, float] | None = None

    def save(self) -> list[Any]:
        """Return, as JSON types, the metrics of an interval that is not over."""
        if self._metrics is None:
            return self._earlier
        return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(self._metrics)]

    def resume(self, saved: list[Any]) -> None:
        """Continue the interval that `save` described."""
        self._earlier = saved

    def add(self, step: int, update: clu_metrics.Collection) -> None:
        """Merge the metrics of one finished step, fetched to the host."""
        if self._earlier:
            leaves, structure = jax.tree.flatten(update)
            leaves = [
                np.asarray(earlier, leaf.dtype)
                for earlier, leaf in zip(self._earlier, leaves, strict=True)
            ]
            self._metrics = jax.tree.unflatten(structure, leaves)
            self._earlier = []
        self._metrics = update if self._metrics is None else self._metrics.merge(update)
        if self._start is None:
            self.restart_clock(step)

    def take(self, step: int) -> dict[str, float]:
        """Return the averages under their logged names and begin anew.

        Means of nothing (NaN), such as the loss of a time group that was not drawn, are left out.
        Where nothing was added there are none.
        """
        if self._metrics is None or self._start is None:
            return {}
        averages = {f"train/{name}": float(v) for name, v in self._metrics.compute().items()}
        values = {name: value for name, value in averages.items() if not np.isnan(value)}
        start_step, start_time = self._start
        if step > start_step:
            seconds = (time.monotonic() - start_time) / (step - start_step)
            values |= performance(seconds, *self._work)
        self._metrics = None
        self.restart_clock(step)
        return values

    def restart_clock(self, step: int) -> None:
        """Measure throughput from here on: pictures and saving are not training."""
        self._start = (step, time.monotonic())


class Writer:
    """Writes to the log, `metrics.jsonl`, TensorBoard events and `images/`; process 0 only.

    All but the log goes to Weights & Biases as well, if there is a project.
    """

    def __init__(
        self,
        workdir: storage.Path,
        first_step: int,
        num_steps: int,
        *,
        written: Mapping[str, Any] = types.MappingProxyType({}),
        wandb: WandbConfig | None = None,
    ):
        """Drop what an interrupted run wrote after `first_step`, the step it resumes from.

        Args:
            workdir: of the run.
            first_step: no line of a later one is kept.
            num_steps: of the whole run.
            written: what `written` returned at that step; a file that differs is warned of.
            wandb: the project, if any.
        """
        self._num_steps = num_steps
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._images = workdir / "images"
        storage.make_directory(self._images)
        self._path = workdir / FILE_NAME
        kept = cut_lines(self._path, first_step)
        size = written.get("bytes", 0)
        if written and hashlib.sha256(kept[:size]).hexdigest() != written["sha256"]:
            logging.warning(
                "%s is not as it was at step %d: lines are gone or changed, and the curves go on "
                "from what is left; for all of them bring it back from a copy",
                *(self._path, first_step),
            )
        self._size, self._digest = len(kept), hashlib.sha256(kept)
        # The suffix tells apart files begun in the same second, which is all their names say.
        import tensorboardX  # imports torch, where that is installed

        self._copies = storage.Copies(workdir)
        self._events = tensorboardX.SummaryWriter(
            str(self._copies.local), purge_step=first_step + 1, filename_suffix=f".{first_step}"
        )
        self._tracker = Tracker(wandb, workdir) if wandb and wandb.project else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of figures, e.g. `{"train/loss": 0.5, "perf/steps_per_second": 3}`."""
        if not self._active:
            return
        logging.info("%s", _progress(step, self._num_steps, values))
        line = f"{json.dumps({'step': step, **values})}\n".encode()
        storage.append(self._path, line)
        self._size += len(line)
        self._digest.update(line)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        self._copies.send(at_most_every=EVENTS_SECONDS)
        if self._tracker is not None:
            self._tracker.scalars(step, values)

    def written(self) -> dict[str, Any]:
        """Return size and digest of the metrics file, as JSON types, for a checkpoint."""
        if not self._active:
            return {}
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Write each picture to `images/{name}_{step:07d}.png` and to TensorBoard."""
        if not self._active:
            return
        for name, pixels in pictures.items():
            path = self._images / f"{name}_{step:07d}.png"
            with replacing(path) as temporary:
                Image.fromarray(pixels).save(temporary)
            logging.info("Wrote %s", path)
            self._events.add_image(name, pixels, step, dataformats="HWC")
        self._events.flush()
        self._copies.send(at_most_every=EVENTS_SECONDS)
        if self._tracker is not None:
            self._tracker.pictures(step, pictures)

    def close(self) -> None:
        """Flush and close the event file, and the tracked run."""
        if not self._active:
            return
        self._events.close()
        self._copies.send()
        if self._tracker is not None:
            self._tracker.close()


def cut_lines(path: storage.Path, last_step: int) -> bytes:
    """Keep the lines of a metrics file up to `last_step`, so that a resumed curve has no doubles.

    Returns what is kept.

    A last line that a killed run left half-written is dropped as well. Other lines that are none,
    because the file was damaged or edited, are set aside, to the file's name with `BAD_SUFFIX`.
    """
    if not path.exists():
        return b""
    kept, bad = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        values = _read_line(line)
        if values is None:
            bad.append(line)
        elif values["step"] <= last_step:
            kept.append(line.removesuffix(b"\n") + b"\n")
    if bad and not bad[-1].endswith(b"\n"):
        bad.pop()
    if bad:
        aside = path.with_name(path.name + BAD_SUFFIX)
        logging.warning("%s: %d lines are no figures, moved to %s", path, len(bad), aside.name)
        storage.append(aside, b"".join(bad))
    content = b"".join(kept)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return content


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return the step of a line and its metrics, None if it is something else."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def history(path: storage.Path, name: str, last_step: int) -> list[tuple[int, float]]:
    """The steps and values of a metric up to a step.

    Args:
        path: of a metrics file.
        name: of the metric.
        last_step: later lines are passed over.
    """
    lines = map(_read_line, path.read_bytes().splitlines() if path.exists() else ())
    return [
        (values["step"], values[name])
        for values in lines
        if values is not None and values["step"] <= last_step and name in values
    ]


def names_at(path: storage.Path, step: int) -> set[str]:
    """Names of the metrics of a step.

    Args:
        path: of a metrics file.
        step: after which they were taken.
    """
    lines = map(_read_line, path.read_bytes().splitlines() if path.exists() else ())
    return {name for line in lines if line is not None and line["step"] == step for name in line}


def last_evaluation(path: storage.Path, last_step: int) -> dict[str, str]:
    """The newest metrics of held-out images up to a step, as text by name; none if there are none.

    Args:
        path: of a metrics file.
        last_step: later lines are passed over.
    """
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        values = _read_line(line)
        if values is not None and values["step"] <= last_step:
            found |= {name: f"{value:.4g}" for name, value in values.items() if "eval/" in name}
    return {name.replace("eval/", "held-out "): value for name, value in found.items()}


def _progress(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    train = [
        f"{name.removeprefix('train/')} {value:.4g}"
        for name, value in values.items()
        if name.startswith(("train/", "eval/"))
    ]
    parts = [f"step {step}/{num_steps}", *train]
    if "perf/steps_per_second" in values:
        rate = values["perf/steps_per_second"]
        left = datetime.timedelta(seconds=math.ceil((num_steps - step) / rate))
        parts += [
            f"{values['perf/seconds_per_step']:.3g} s/step",
            f"{values['perf/images_per_second']:.4g} images/s",
            f"{values['perf/tflops_per_device']:.3g} TFLOP/s per device",
        ]
        if "perf/mfu" in values:
            parts.append(f"MFU {values['perf/mfu']:.1%}")
        if "perf/data_wait_share" in values:
            parts.append(f"waiting for data {values['perf/data_wait_share']:.0%}")
        parts.append(f"{left} left")
    return " | ".join(parts)
