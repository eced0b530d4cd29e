"""Train and use autoregressive-diffusion image generators.

    dar-jax --config=FILE.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.BLOCK.KEY=VALUE ...]

To begin, digits by the model that comes with the package:

    dar-jax --config=mnist.py --workdir=runs/first --mode=sample

`python -m dar_jax.main` is the same command. A config that is not found where FILE says is taken
from the package; its docstring has the commands:
    mnist.py:{tokenizer,dar,kl_vae,transdiff,transdiff_mrar}  image_folder.py:{tokenizer,dar}_32
    imagenet_{tokenizer,dar,kl_vae,transdiff}.py  photographs.py

Modes:
    train     train config.task; run the same command again to resume (default)
    sample    WORKDIR/model -> a labelled grid, a strip of previews, indices as .npz; or, with
              config.sample.num_images, a large set that resumes; with .prefix_image, layout
              control or variations; with .inpaint_image and .inpaint_mask, in-painting
    evaluate  WORKDIR/model -> figures, printed and written to WORKDIR/evaluation.json; which, by
              config.evaluate.evaluators: reconstruction, generation, previews, guidance (with
              .guidance_scales); or, with config.evaluate.images, of a folder or .npz of images;
              against config.evaluate.reference, an ADM .npz or a split of the data; resumes
    benchmark speed of sampling beside its bound -> a table and WORKDIR/benchmark.jsonl
    cache     a data set in the form that training reads fastest -> WORKDIR
    convert   official checkpoint -> WORKDIR/model; --config.convert.to=torch goes back
    compile   memory, collectives and speed limits on --config.compile.topology=v5e:16x16, without
              the chips ("local": the devices at hand) -> WORKDIR/compile.json
    demo      WORKDIR/model -> a page on which images grow while their tokens are generated, at
              http://127.0.0.1:7860; config.demo.host and .port change that

Several processes: TPU pods and SLURM steps are found; elsewhere start each process with
--coordinator_address=HOST:PORT --num_processes=N --process_id=0..N-1. SIGTERM saves and stops
with --preempted_status (0); a mistake of the user's is one line and status 2.

JAX_COMPILATION_CACHE_DIR=DIR in the environment keeps compiled programs from run to run.

Main keys: config.train.steps, config.data.source, config.data.batch_size,
config.optimizer.learning_rate, config.compute.dtype, config.mesh.fsdp, config.sample.labels,
config.sample.guidance_scale, config.sample.seed, config.evaluate.features,
config.evaluate.num_images, config.train.evaluate_every, config.convert.source,
config.wandb.project.
"""

import logging as python_logging
import pathlib
import pkgutil
import sys
import types
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from dar_jax.common import config_files

MODES = {
    "train": "train_and_evaluate",
    "sample": "sample",
    "evaluate": "evaluate",
    "cache": "cache",
    "convert": "convert",
    "compile": "compile_programs",
    "benchmark": "benchmark",
    "demo": "demo",
}
"""Function of every mode, in the module of `dar_jax.modes` that has the mode's name."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that the run reads and writes.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 300.0, "Seconds to wait for other processes.")
_PREEMPTED_STATUS = flags.DEFINE_integer(
    "preempted_status",
    0,
    "Exit status after SIGTERM, all saved; e.g. 143 for schedulers that restart only what fails.",
)


def main(argv: list[str]) -> None:
    del argv
    # What is imported here takes seconds, which `--help` and mistakes of typing do without.
    from dar_jax import config as config_lib
    from dar_jax.parallel import distributed

    try:
        _join_job(distributed)
        config = config_lib.build(_CONFIG.value)
        mode = pkgutil.resolve_name(f"dar_jax.modes.{_MODE.value}:{MODES[_MODE.value]}")
        mode(config, _WORKDIR.value)
    except distributed.Preempted:
        sys.exit(_PREEMPTED_STATUS.value)
    except ValueError as error:
        _fail(error)


def _join_job(distributed: types.ModuleType) -> None:
    """Meet the other processes, if there are any, and make sure that all do the same."""
    distributed.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        timeout_s=_JOIN_TIMEOUT.value,
    )
    settings = {"mode": _MODE.value, "workdir": _WORKDIR.value}
    distributed.check_same_everywhere({**settings, "config": _CONFIG.value.to_dict()})


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a mistake in it is one line, whoever finds it."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        return flags.FLAGS(_with_files(argv))
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        _fail(error)


def _with_files(argv: list[str]) -> list[str]:
    """Give the config its file, whether it comes as `--config=FILE` or in a word of its own."""
    words = []
    for previous, word in zip(["", *argv], argv, strict=False):
        flag, _, value = word.partition("=")
        if flag.lstrip("-") == "config" and value:
            word = f"{flag}={config_files.find(value)}"
        elif previous in ("-config", "--config"):
            word = config_files.find(word)
        words.append(word)
    return words


def _fail(error: Exception) -> NoReturn:
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
    is_ours = pathlib.Path(record.pathname).is_relative_to(config_files.PACKAGE)
    return record.levelno > python_logging.INFO or is_ours


def run() -> None:
    """Run the command line."""
    _set_up_logging()
    # `--help` shows the docstring and the flags of the program, whichever it was started as.
    sys.modules["__main__"].__doc__ = __doc__
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
