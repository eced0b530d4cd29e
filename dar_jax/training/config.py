"""Length and rhythm of training: the block `train`."""

import dataclasses

from dar_jax.training.optimizer import MAX_STEPS


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run; all counts are steps."""

    steps: int = 10_000
    log_every: int = 100
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 3
    keep_every: int = 0
    """Checkpoints of multiples of this step are kept as well as the latest ones; 0: none."""
    init_from: str = ""
    """Model directory (or workdir, or hf:// address) whose parameters a new run starts from: all
    that fit; what is drawn anew, a table of other classes for one, is logged."""
    image_every: int = 1_000
    """0: no pictures."""
    patience: int = 0
    """End where the held-out loss, measured every `image_every` steps, did not fall this many times
    in turn; 0: never. See `training.patience`."""
    evaluate_every: int = 0
    """Evaluate as `config.evaluate` says; 0: never. See `evaluation.during_training`."""
    max_skipped: int = 100
    """Steps that one command may skip because their loss or gradient is not finite: they are not
    applied, and the records of their batches are named."""
    accumulation: int = 1
    """Microbatches per step, one after the other: the same step with less memory, but for terms of
    a whole batch, such as the tokenizer's `entropy_loss`, which are of a microbatch then."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to record with `jax.profiler` to WORKDIR/profile; empty: none."""
    allow_change: str = ""
    """What may differ from what the run began with when it goes on, with commas between: keys of
    config files, such as "optimizer.learning_rate,data.batch_size", blocks of them, "classes", and
    "data" and the names of models, such as "tokenizer", whose contents count. See
    `training.origin`."""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The keys of `allow_change`."""
        return tuple(key.strip() for key in self.allow_change.split(",") if key.strip())

    def __post_init__(self):
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(
                f"profile_steps {self.profile_steps} must be a first and a last step, e.g. (10, 12)"
            )
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.patience and not self.image_every:
            raise ValueError(f"patience={self.patience} needs image_every, which is 0")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps {self.steps} is more than {MAX_STEPS}")
        for name in ("keep_every", "image_every", "patience", "evaluate_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
