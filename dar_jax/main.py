"""Train and use autoregressive-diffusion image generators.

    python -m dar_jax.main --config=configs/NAME.py[:variant] --workdir=DIR [--mode=MODE]
        [--config.block.key=value ...]

Modes:
    train     train config.task; run the same command again to resume (default)
    sample    WORKDIR/model -> a labelled grid, a strip of previews, indices as .npz
    evaluate  WORKDIR/model -> figures, printed and written to WORKDIR/evaluation.json
    convert   official checkpoint -> WORKDIR/model; --config.convert.to=torch goes back

Main keys: config.train.steps, config.data.source, config.data.batch_size,
config.optimizer.learning_rate, config.compute.dtype, config.mesh.fsdp, config.sample.labels,
config.sample.guidance_scale, config.sample.seed, config.convert.source.
"""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dar_jax import evaluate, sample, train
from dar_jax.convert import command

MODES = {
    "train": train.train_and_evaluate,
    "sample": sample.sample,
    "evaluate": evaluate.evaluate,
    "convert": command.convert,
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that the run reads and writes.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def main(argv: list[str]) -> None:
    del argv
    try:
        MODES[_MODE.value](_CONFIG.value, _WORKDIR.value)
    except ValueError as error:
        _fail(error)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a mistake in it is one line, whoever finds it."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        _fail(error)


def _fail(error: Exception) -> None:
    """Print one line and exit with status 2."""
    message = str(error)
    if isinstance(error, flags.Error):
        # A config file that cannot be read comes with its traceback; what matters is its end.
        message = message.strip().splitlines()[-1].removeprefix("ValueError: ")
    message = message.replace("\\n", " ").replace("\\'", "'")  # nested KeyErrors
    print(f"dar_jax: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _set_up_logging() -> None:
    """Log progress to standard output, without the checkpoint library's own."""
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.python_handler.stream = sys.stdout
    handler.addFilter(_is_ours_or_serious)


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
    return record.levelno > python_logging.INFO or "dar_jax" in record.pathname


if __name__ == "__main__":
    _set_up_logging()
    app.run(main, flags_parser=parse_flags)
