"""A window of training steps recorded with `jax.profiler`."""

from typing import Any

import jax
from absl import logging

from dar_jax.common import storage


class ProfileWindow:
    """Traces the steps `first` to `last`, both included, for TensorBoard's profile plugin or
    Perfetto. Compilation happens in the first step of a run, so a window had better start later.
    """

    def __init__(self, steps: tuple[int, ...], directory: storage.Path):
        """Take the window `(first, last)`, or nothing if `steps` is empty."""
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory = directory
        self._active = False

    def before(self, step: int) -> None:
        """Start the trace if `step`, about to be dispatched, is in the window."""
        if step in self._steps and not self._active:
            self._copies = storage.Copies(self._directory)
            jax.profiler.start_trace(self._copies.local)
            self._active = True

    def after(self, step: int, result: Any) -> None:
        """End the trace behind the last step; `result` is what that step computes."""
        if self._active and step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is still on."""
        if self._active:
            jax.profiler.stop_trace()
            self._copies.send()
            self._active = False
            logging.info("Wrote a profile to %s", self._directory)
