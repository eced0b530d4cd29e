"""Every table of the reference: windows, times, guidance scales, learning rates."""

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.flow.times import shift_times, shifted_grid
from dar_jax.models.dar.tokenizer import TokenizerConfig, step_starts, window_start
from dar_jax.sampling.logits import guidance_schedule
from dar_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from tests.golden import fixtures

FOLDER = "dar/schedules"
SHIFTS = (1.0, 2.0, 3.5)
VARIANTS = (slice(None), slice(3), slice(2, None))
"""Steps that are taken: all, the first three, all but the first two."""
ABSENT = -1
LEARNING_RATES = {
    "lr_tokenizer": OptimizerConfig(learning_rate=2e-4, warmup_steps=500),
    "lr_ar": OptimizerConfig(
        learning_rate=1e-4,
        warmup_steps=0,
        decay_start=300_000,
        decay_end=360_000,
        final_learning_rate=1e-5,
    ),
}


def table_row(values, length):
    return np.concatenate([values, np.full(length - len(values), ABSENT)])


def test_schedules_equal_the_reference():
    with fixtures.Compare(FOLDER) as golden:
        check_windows(golden)
        check_times(golden)
        for name in golden.spec:
            if name.startswith("cfg_"):
                check_guidance(golden, name)
        for name, config in LEARNING_RATES.items():
            rates = jax.vmap(learning_rate_schedule(config))(golden.arrays["lr_steps"])
            golden.check(name, jnp.broadcast_to(rates, golden.arrays["lr_steps"].shape))


def check_windows(golden):
    """First query and unshifted time of every sampling step, and of every training draw."""
    length = golden.arrays["decode_time"].shape[-1]
    train_time = jnp.asarray(golden.arrays["train_time"])
    starts, times, train_starts = [], [], []
    for num_steps, num_groups, num_tokens, window in golden.arrays["cases"].tolist():
        config = TokenizerConfig(
            num_steps=num_steps,
            num_groups=num_groups,
            num_tokens=num_tokens,
            tokens_per_step=window,
        )
        all_starts, all_times = step_starts(config, num_steps), shifted_grid(num_steps, 1.0)[:-1]
        starts.append([table_row(all_starts[steps], length) for steps in VARIANTS])
        times.append([table_row(all_times[steps], length) for steps in VARIANTS])
        train_starts.append(window_start(train_time, config))
    golden.check_all(decode_start_query=starts, decode_time=times, train_start_query=train_starts)


def check_times(golden):
    shift_in = golden.arrays["shift_in"]
    golden.check("shift_out", [shift_times(shift_in, shift) for shift in SHIFTS])


def check_guidance(golden, name):
    """A name is `cfg_{tokens}/{scale}` or `cfg_{tokens}/{first},{last}`."""
    num_tokens, _, scale = name.removeprefix("cfg_").partition("/")
    scales = tuple(float(value) for value in scale.split(","))
    schedule = guidance_schedule(scales if len(scales) > 1 else scales[0], int(num_tokens))
    golden.check(name, schedule)
