"""Train and use autoregressive-diffusion image generators.

    dar-jax --config=FILE.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.BLOCK.KEY=VALUE ...]

To begin, digits by the model that comes with the package; then a tokenizer and a prior of your own
pictures, in a folder per class:

    dar-jax --config=mnist.py --workdir=runs/first --mode=sample --config.sample.labels=3,5
    dar-jax --config=image_folder.py:tokenizer_32 --workdir=runs/tokenizer --config.data.path=DIR
    dar-jax --config=image_folder.py:dar_32 --workdir=runs/dar --config.data.path=DIR \\
        --config.tokenizer=runs/tokenizer/model

DIR, like a model, may be gs://BUCKET/DIR (pip install 'dar-jax[gcs]') or s3://BUCKET/DIR
(pip install 'dar-jax[s3]'); launch/README.md says how.
`python -m dar_jax.main` is the same command. A config that is not found where FILE says is taken
from the package; its docstring has the commands:
    mnist.py:{tokenizer,dar,dar_distilled,dar_reward,kl_vae,transdiff,transdiff_mrar}
    image_folder.py:{tokenizer,dar}_32  text_folder.py:64  emoji.py:{tokenizer,dar}_32
    imagenet_{tokenizer,dar,kl_vae,transdiff}.py  text_to_image.py  photographs.py

Modes:
    train     train config.task; run the same command again to resume (default)
    export    the latest checkpoint of a run that is not over -> WORKDIR/model
    sample    WORKDIR/model -> a labelled grid, a strip of previews, indices as .npz; or, with
              config.sample.num_images, a large set that resumes; with .prefix_image, layout
              control, variations or, with .prefix_image_to, interpolation; with .inpaint_image
              and .inpaint_mask, in-painting; with .originals, or of a tokenizer or autoencoder,
              reconstructions
    evaluate  WORKDIR/model -> figures, printed and written to WORKDIR/evaluation.json; which, by
              config.evaluate.evaluators: reconstruction, generation, previews, guidance (with
              .guidance_scales); or, with config.evaluate.images, of a folder or .npz of images;
              against config.evaluate.reference, an ADM .npz or a split of the data; resumes
    benchmark speed of sampling beside its bound -> a table and WORKDIR/benchmark.jsonl; with
              config.benchmark.what=train, encode, evaluate or data, of that instead
    cache     a data set in the form that training reads fastest -> WORKDIR
    convert   official checkpoint -> WORKDIR/model; --config.convert.to=torch goes back
    compile   memory, collectives and speed limits on --config.compile.topology=v5e:16x16 or
              h200:1x8, without the chips ("local": the devices at hand) -> WORKDIR/compile.json
    demo      WORKDIR/model -> a page on which images grow while their tokens are generated, at
              http://127.0.0.1:7860; config.demo.host and .port change that
    serve     WORKDIR/model -> OpenAI's API for images, with previews, and a page, at
              http://127.0.0.1:8000; config.serve.host, .port and .api_key_file change that

Several processes: TPU pods and SLURM steps are found; elsewhere start each process with
--coordinator_address=HOST:PORT --num_processes=N --process_id=0..N-1.

SIGTERM saves and stops, in training with --preempted_status (0), elsewhere with 143; so do Ctrl-C
(130) and SIGHUP (129), and the same command goes on. A second Ctrl-C ends at once. A mistake of
the user's is one line and status 2.

Compiled programs are kept in ~/.cache/dar_jax; --config.compute.cache=DIR, or in the environment
JAX_COMPILATION_CACHE_DIR=DIR or XDG_CACHE_HOME, moves them, --config.compute.cache=off, or
JAX_ENABLE_COMPILATION_CACHE=false, keeps none.

Keys that are set most often, as --config.KEY=VALUE; all of a run's are in WORKDIR/config.json:
    train.steps             how long, in all; more of them continue a run that has ended
    train.patience          looks without a lower held-out loss after which training ends; 0: never
    train.evaluate_every    steps between evaluations on the way; 0: none
    data.source, .path      folder, tar, records, tfds:NAME, mnist; where the pictures are
    data.batch_size         pictures a step
    optimizer.learning_rate
    compute.dtype           bfloat16 or float32
    mesh.fsdp               -1 spreads the parameters over all devices
    sample.labels, .seed    classes by name or number, joined by commas; other images
    sample.guidance_scale   one, or a ramp over the tokens: 1.1,8.0
    sample.num_images       a set of so many; with sample.format=png as files
    evaluate.num_images     images to judge
    evaluate.features       inception, vgg16, or "": no distances
    convert.source          hf://showlab/D-AR/D-AR-L-360K.pt, or a path
    wandb.project           logs to Weights & Biases too
"""

import difflib
import errno
import logging as python_logging
import os
import pathlib
import pkgutil
import re
import signal
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from dar_jax.common import config_files, interrupts, storage

HELP = {"-h", "-help", "--help", "--helpshort", "--helpfull"}
EXAMPLE = "dar-jax --config=mnist.py --workdir=runs/first --mode=sample; see --help"
MODES = {
    "train": "train:train_and_evaluate",
    "export": "train:export",
    "sample": "sample:sample",
    "evaluate": "evaluate:evaluate",
    "cache": "cache:cache",
    "convert": "convert:convert",
    "compile": "compile:compile_programs",
    "benchmark": "benchmark:benchmark",
    "demo": "demo:demo",
    "serve": "serve:serve",
}
"""Function of every mode, in a module of `dar_jax.modes`."""

READERS = ("demo", "serve")
"""Those that write nothing to the workdir."""

OUT_OF_MEMORY = {
    "train": "--config.train.accumulation=4, --config.compute.remat=blocks, --config.mesh.fsdp=-1",
    "evaluate": "a smaller --config.sample.batch_size or --config.evaluate.batch_size",
    "demo": "a smaller --config.demo.batch_size",
    "serve": "a smaller --config.serve.batch_size",
}
"""What to try, by mode; others take a smaller batch."""
DASHES = ("\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")
"""What editors make of two hyphens."""
QUOTES = "\\'\""
"""What a KeyError puts around a key."""
STORAGE_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose another --workdir",
    errno.EEXIST: "move it away",
    errno.ENOTDIR: "move it away",
    errno.EISDIR: "move it away",
}

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
    from dar_jax.common import compiled
    from dar_jax.nn import fused_attention
    from dar_jax.parallel import distributed

    try:
        workdir = storage.to_path(_WORKDIR.value or "", "--workdir")
        _join_job(distributed)
        config = config_lib.build(_CONFIG.value)
        if storage.is_remote(workdir) and _MODE.value not in READERS:
            storage.check_writable(workdir)  # before there is work to lose
        devices = _find_devices()
        if _MODE.value != "compile":  # which is told its own
            fused_attention.check_device(config.compute, devices)
        compiled.keep_programs(config.compute.cache)
        mode = pkgutil.resolve_name(f"dar_jax.modes.{MODES[_MODE.value]}")
        mode(config, _WORKDIR.value)
    except distributed.Preempted:
        sys.exit(_status_of_preempted())
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(
            f"{error}; {STORAGE_ADVICE.get(error.errno or 0, 'check the storage')} and run it again"
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = OUT_OF_MEMORY.get(_MODE.value, "a smaller --config.sample.batch_size")
        (reason, *_) = str(error).splitlines() or ["out of memory"]
        _fail(f"out of memory: {reason}; try {advice}")


def _status_of_preempted() -> int:
    number = interrupts.first()
    if number in (None, signal.SIGTERM):
        return _PREEMPTED_STATUS.value
    return interrupts.status_of(number)


def _find_devices() -> Sequence[Any]:
    """Find the devices before any work: what JAX was told to use may not be there."""
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second of a platform without a plugin
        (reason, *_) = str(error).splitlines() or ["there is no such platform"]
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX finds no device with JAX_PLATFORMS={platforms!r}: {reason}; install "
            "'dar-jax[gpu]' or 'dar-jax[tpu]' and look at the driver, or unset JAX_PLATFORMS"
        ) from error


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
    path = ""
    for word in argv[1:]:
        if word.startswith(DASHES):
            _fail(
                f"{word!r} begins with {word[0]!r}; did you mean --{word.lstrip(''.join(DASHES))}?"
            )
    try:
        # Where the flags of keys are looked for.
        sys.argv[:] = argv = _config_first(_last_of_each(_with_files(argv)))
        path = _config_path(argv)
        words = flags.FLAGS(argv)[1:]
        if not words and None in (_CONFIG.value, _WORKDIR.value):
            raise ValueError(f"--config=FILE.py and --workdir=DIR are needed, as in {EXAMPLE}")
        if not words and not isinstance(_CONFIG.value, ml_collections.ConfigDict):
            raise ValueError(f"get_config of {path} returns {_CONFIG.value!r}, no ConfigDict")
    except BrokenPipeError:
        raise
    except Exception as error:  # a config file is a program
        _fail(_explain(error, path))
    if words:
        meant = f"--mode={words[0]}" if words[0] in MODES else f"--NAME={words[0]}"
        _fail(f"{words[0]!r} belongs to no flag; did you mean {meant}?")
    return argv[:1]


def _with_files(argv: Sequence[str]) -> list[str]:
    """Give the config its file, whether it comes as `--config=FILE` or in a word of its own."""
    words = []
    for previous, word in zip(["", *argv], argv, strict=False):
        flag, _, value = word.partition("=")
        if word == "-h":
            word = "--help"
        elif flag.lstrip("-") == "config" and value:
            word = f"{flag}={config_files.find(value)}"
        elif previous in ("-config", "--config"):
            word = config_files.find(word)
        words.append(word)
    return words


def _last_of_each(argv: Sequence[str]) -> list[str]:
    """Keep the last value of keys that are given twice, and expand `~`, which no shell has done.

    The library would join tuples that are given twice.
    """
    kept: dict[str, str] = {}
    for number, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        is_key = bool(equals) and re.match(r"--?config\.", key) is not None
        name = key.lstrip("-") if is_key else f"{number}"
        kept.pop(name, None)
        kept[name] = f"{key}={os.path.expanduser(value)}" if equals else argument
    return list(kept.values())


def _config_first(argv: Sequence[str]) -> list[str]:
    """Put the config before its keys, which the library wants to know it for."""
    return [argv[0], *sorted(argv[1:], key=lambda word: not re.match(r"--?config=", word))]


def _config_path(argv: Sequence[str]) -> str:
    """Return the path of the config file.

    Raises:
        ValueError: there is no such file.
    """
    given = [a.partition("=")[2] for a in argv if re.match(r"--?config=", a)]
    if not given:
        return ""
    path = pathlib.Path(given[-1].partition(":")[0])
    if not path.is_file():
        names = [file.as_posix() for file in path.parent.glob("*.py")]
        names += [file.name for file in config_files.DIRECTORY.glob("*.py")]
        nearest = difflib.get_close_matches(path.as_posix(), names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "name one, such as mnist.py"
        raise ValueError(f"--config={given[-1]}: there is no file {path} in {os.getcwd()}; {hint}")
    return str(path)


def _explain(error: Exception, path: str) -> str:
    """Return the message of an error of parsing, with its line where the config file has it."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, flags.Error):
        # What the config file refuses comes with its traceback; what matters is its end.
        message = text.splitlines()[-1].removeprefix("ValueError: ")
        return f"{path}: {message}" if "\n" in text else message
    if match := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text):
        return f"unknown key {match[2]!r}; did you mean {match[1]!r}?"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    if "no attribute 'get_config'" in text:
        return f"{path} has no function get_config, which returns the configuration"
    if path and lines:
        return f"{path}, line {lines[-1]}: {type(error).__name__}: {text}"
    if isinstance(error, KeyError) or any(isinstance(each, KeyError) for each in error.args):
        return f"unknown key {text.strip(QUOTES)!r}; {path} has no key like it"
    return text


def _fail(message: Exception | str) -> NoReturn:
    """Print one line and exit with status 2."""
    message = str(message)
    message = message.replace("\\n", " ").replace("\\'", "'")  # nested KeyErrors
    print(f"dar_jax: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _set_up_logging() -> None:
    """Log progress to standard output, without the checkpoint library's own."""
    logging.set_verbosity(logging.INFO)
    python_logging.raiseExceptions = False  # a reader that has left, such as `head`, harms no run
    handler = logging.get_absl_handler()
    handler.python_handler.stream = sys.stdout
    handler.addFilter(_is_ours_or_serious)


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
    """Tell what is logged; what background threads of libraries fail of is raised here as well."""
    if pathlib.Path(record.pathname).is_relative_to(config_files.PACKAGE):
        return True
    record.exc_info = None
    return record.levelno > python_logging.INFO


def run() -> None:
    """Run the command line."""
    try:
        interrupts.install()
        _set_up_logging()
        # `--help` shows the docstring and the flags of the program, whichever it was started as.
        sys.modules["__main__"].__doc__ = __doc__
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        app.run(main, flags_parser=parse_flags)
    except SystemExit as end:
        if end.code == 1 and HELP.intersection(sys.argv):
            sys.exit(0)  # whoever asks has got what was asked for; absl ends with 1
        if end.code:
            interrupts.silence()
        raise
    except BrokenPipeError:  # whoever reads has read enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(interrupts.status_of(signal.SIGPIPE))
    except interrupts.Interrupted as interrupted:
        interrupts.leave(
            f"dar_jax: stopped by {interrupted}; run the same command again: what is complete is "
            "kept",
            interrupted.status,
        )


if __name__ == "__main__":
    run()
