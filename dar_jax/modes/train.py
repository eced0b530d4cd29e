"""The training loop: one for every task.

    task, mesh, state (resumed or initialised) -> batch -> step -> metrics -> checkpoint -> export

The metrics of a step are fetched after the next one was dispatched, so that the device never
waits for the host. Everything that a configuration can get wrong fails before the first write.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from dar_jax.common import model_dir, storage
from dar_jax.common.typing import Params
from dar_jax.config import Config
from dar_jax.data import pipeline, sources, survey
from dar_jax.evaluation.during_training import TrainEvaluation
from dar_jax.kinds import find_kind
from dar_jax.kinds.loading import build_task
from dar_jax.kinds.train_step import with_remat
from dar_jax.parallel import distributed, sharding
from dar_jax.parallel.workdir import exclusive, open_workdir
from dar_jax.performance.device_speed import memory_bytes
from dar_jax.tasks.base import Task
from dar_jax.training import checkpoint, metrics, origin, page, patience, staged_checkpoints
from dar_jax.training import state as state_lib
from dar_jax.training import step as step_lib
from dar_jax.training.checkpoint import CHECKPOINTS
from dar_jax.training.finite import SkippedSteps, check_parameters
from dar_jax.training.looks import Look, find_missed
from dar_jax.training.optimizer import learning_rate_schedule
from dar_jax.training.profile import ProfileWindow
from dar_jax.training.report import Report, describe, is_due
from dar_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over one run."""

    task: Task
    config: Config
    mesh: jax.sharding.Mesh
    workdir: storage.Path
    iterator: pipeline.TrainIterator
    checkpoints: checkpoint.Checkpoints
    frozen: Params
    evaluation: TrainEvaluation | None
    made_from: Mapping[str, Any]
    recommended: Mapping[str, Any]

    @property
    def look(self) -> Look:
        """What is looked at every so many steps."""
        return Look(
            task=self.task,
            data=self.config.data,
            mesh=self.mesh,
            seed=self.config.seed,
            with_loss=self.config.train.patience > 0,
            class_names=self.iterator.source.class_names,
        )

    def has_ended(self, step: int) -> bool:
        """Tell whether the run is over after a step."""
        return patience.has_ended(self.workdir, self.config.train, step, self.task.complete_after)


def train_and_evaluate(config: Config, workdir: str) -> None:
    """Build the task that the configuration names and train it.

    Raises:
        Preempted: SIGTERM came; all is saved.
        ValueError: see `train`.
    """
    if not train(config, workdir, build_task(config)):
        raise distributed.Preempted


def export(config: Config, workdir: str) -> None:
    """Write `WORKDIR/model` from the latest checkpoint of a run that has not reached its end.

    Raises:
        ValueError: there is not a checkpoint yet; or see `train`.
    """
    if checkpoint.latest_step(storage.to_path(workdir) / CHECKPOINTS) is None:
        raise ValueError(f"{workdir} holds no checkpoint to export: train first")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate_every=0))
    with _opened(config, workdir, build_task(config)) as (run, abstract, _):
        with _closing(run):
            state, _ = run.checkpoints.restore(abstract, run.iterator)
        _finish(run, state)


def train(config: Config, workdir: str, task: Task) -> bool:
    """Train to `config.train.steps`, resuming from the latest checkpoint, and export the model.

    Returns whether it got there: a preempted run saves and stops early.

    Raises:
        ValueError: the configuration or the workdir cannot be used, or parameters, or the losses
            of too many steps, are not finite.
    """
    with _opened(config, workdir, task) as (run, abstract, initial):
        with _closing(run):
            if config.compute.remat == "auto":  # now that all is known to be right
                config = with_remat(config, run.mesh, memory_bytes())
                # The weights of frozen models are in the run.
                task = build_task(config, with_weights=False)
                run = dataclasses.replace(run, config=config, task=task)
            describe(run.workdir, config.to_dict(), abstract.params, run.mesh)
            checkpoints = run.checkpoints
            distributed.of_first(
                lambda: origin.record(
                    run.workdir, checkpoints.latest_step or 0, checkpoints.changes
                )
            )
            state = _fit(run, *_restore_or_create(run, abstract, initial))
            run.checkpoints.wait()
        done = run.has_ended(int(state.step))
        if done:
            _finish(run, state)
    return done


@contextlib.contextmanager
def _opened(
    config: Config, workdir: str, task: Task
) -> Iterator[tuple[Run, TrainState, Params | None]]:
    """Check everything, then take the workdir.

    Gives the run, its state in the abstract, and the parameters that it starts from, if any.
    """
    staged_checkpoints.check_processes(workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_heads(task.model_config(), mesh)
    step_lib.check_accumulation(config.data.batch_size, config.train.accumulation, mesh)
    kind = find_kind(config.task, "config.task")
    recommended = config.sample.recommendation(kind)
    origin.check_keys(config.train.allowed, config.bound())
    part = sharding.batch_part(mesh)
    iterator = pipeline.train_iterator(config.data, config.seed, part)
    if not config.data.captions:  # where classes do not matter
        sources.check_num_classes(task.model_config().get("num_classes"), iterator.source)
    survey.check_apart(config.data, workdir)
    logging.info("Data: %s", survey.check(config.data, iterator.source))
    abstract = state_lib.abstract_state(task, config.optimizer, mesh)
    initial, start = None, config.train.init_from
    if start and checkpoint.latest_step(storage.to_path(workdir) / CHECKPOINTS) is None:
        initial = state_lib.load_initial(start, kind.released_kind, task, abstract)
    frozen = task.frozen()
    evaluation = TrainEvaluation(config, workdir) if config.train.evaluate_every else None
    directory = open_workdir(workdir)
    with exclusive(directory):
        made = _made_from(config, task, iterator.source)
        yield (
            Run(
                task=task,
                config=config,
                mesh=mesh,
                workdir=directory,
                iterator=iterator,
                checkpoints=_open_checkpoints(config, directory, made),
                frozen=frozen,
                evaluation=evaluation,
                made_from=made,
                recommended=recommended,
            ),
            abstract,
            initial,
        )


def _made_from(config: Config, task: Task, source: sources.Source) -> dict[str, Any]:
    """Fingerprints of models, files and data, which one process takes for all."""
    threads = config.data.num_threads
    return distributed.of_first(
        lambda: origin.made_from(config.companions, task.files(), source, threads)
    )


def _open_checkpoints(
    config: Config, directory: storage.Path, made: Mapping[str, Any]
) -> checkpoint.Checkpoints:
    """Open the checkpoints, bound to the configuration and to what the run is made from."""
    return checkpoint.Checkpoints(
        directory / CHECKPOINTS,
        {**config.bound(), origin.MADE_FROM: made},
        keep=config.train.keep_checkpoints,
        keep_every=config.train.keep_every,
        defaults=config.bound_defaults(),
        allowed=config.train.allowed,
    )


@contextlib.contextmanager
def _closing(run: Run) -> Iterator[None]:
    """Whatever happens, end what is under way; say what there is to go on from."""
    checkpoints = run.checkpoints
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error}; {checkpoints.describe_latest()}") from error
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason, latest = str(error).splitlines()[0], checkpoints.describe_latest(wait=False)
        distributed.leave(
            f"the job broke off, most likely because another process is lost: {reason}; {latest}; "
            "start all processes again"
        )
    finally:
        checkpoints.close()
        run.iterator.close()


def _finish(run: Run, state: TrainState) -> None:
    """Write the model directory of the workdir, and its report."""
    _export(run, state, run.workdir / model_dir.WORKDIR_NAME)
    distributed.of_first(lambda: page.write(run.workdir, run.config.task, int(state.step)))


def _restore_or_create(
    run: Run, abstract: TrainState, initial: Params | None
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state, and what its report goes on from."""
    if run.checkpoints.latest_step is not None:
        return run.checkpoints.restore(abstract, run.iterator)
    logging.info("Compiling the initial parameters, and drawing them")
    rng = jax.random.key(run.config.seed)
    state = state_lib.create_state(
        run.task, run.config.optimizer, rng, mesh=run.mesh, params=initial
    )
    return state, {"metrics": [], "written": {}}


def _fit(run: Run, state: TrainState, saved: Mapping[str, Any]) -> TrainState:
    config = run.config.train
    first_step = int(state.step)
    missed = find_missed(run.workdir, config, first_step)
    if run.has_ended(first_step) and not any(missed):
        logging.info(
            "%s is trained: step %d of %d; raise config.train.steps, or patience, to go on",
            run.workdir,
            first_step,
            config.steps,
        )
        return state
    writer = metrics.Writer(
        run.workdir, first_step, config.steps, written=saved["written"], wandb=run.config.wandb
    )
    averages = metrics.Interval(
        run.config.data.batch_size,
        step_lib.flops_per_image(run.task),
        list(run.mesh.devices.flat),
    )
    averages.resume(saved["metrics"])
    report = Report(
        config,
        writer,
        run.iterator,
        interval=averages,
        schedule=learning_rate_schedule(run.config.optimizer),
        skipped=SkippedSteps(
            config.max_skipped, run.iterator.suspects, run.checkpoints.describe_latest
        ),
        num_steps=config.steps - first_step,
        why_negative=run.task.why_negative,
    )
    try:
        with distributed.PreemptionNotice() as notice:
            frozen = sharding.put(run.frozen, run.mesh)
            if missed.look:
                run.look(state, frozen, first_step, writer=writer)
            if missed.evaluation:
                _evaluate(run, state, first_step, writer=writer)
            if run.has_ended(first_step):
                return state
            return _loop(run, state, frozen, report=report, writer=writer, notice=notice)
    finally:
        writer.close()


def _loop(
    run: Run,
    state: TrainState,
    frozen: Params,
    *,
    report: Report,
    writer: metrics.Writer,
    notice: distributed.PreemptionNotice,
) -> TrainState:
    config = run.config.train
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = step_lib.make_train_step(
        run.task,
        run.config.optimizer,
        shardings,
        accumulation=config.accumulation,
        **step_lib.mesh_options(run.config.mesh, run.config.compute),
    )
    profile = ProfileWindow(config.profile_steps, run.workdir / "profile")
    for step in range(int(state.step) + 1, config.steps + 1):
        batch = sharding.put_batch(next(run.iterator), run.mesh)
        profile.before(step)
        with jax.transfer_guard("disallow"):
            state, update = train_step(state, batch, frozen)
        profile.after(step, update)
        report.push(step, update)
        run.checkpoints.check()
        preempted = notice.reached(step)
        if preempted or is_due(step, config.checkpoint_every, config.steps):
            report.flush()
            check_parameters(step, state.params, run.checkpoints.describe_latest)
            run.checkpoints.save(state, step, run.iterator, report.save())
            report.restart_clock(step)
        if preempted and step < config.steps:  # what else is due is made up for
            logging.info("Stopped after step %d, all is saved; run the same command to go on", step)
            break
        if is_due(step, config.image_every, config.steps):
            report.flush()
            run.look(state, frozen, step, writer=writer)
            report.restart_clock(step)
        if is_due(step, config.evaluate_every, config.steps):
            report.flush()
            _evaluate(run, state, step, writer=writer)
            report.restart_clock(step)
        if step < config.steps and run.has_ended(step):
            logging.info("The held-out loss fell no more: training ends after step %d", step)
            if not is_due(step, config.checkpoint_every, config.steps):
                run.checkpoints.save(state, step, run.iterator, report.save())
            break
    profile.close()
    return state


def _evaluate(run: Run, state: TrainState, step: int, *, writer: metrics.Writer) -> None:
    """Measure the averaged parameters as `--mode=evaluate` does.

    Training is worth more than its metrics: where no other process waits, it goes on without.
    """
    assert run.evaluation is not None
    logging.info("Evaluating step %d", step)
    try:
        values = run.evaluation(lambda directory: _export(run, state, directory))
    except Exception as error:
        if jax.process_count() > 1:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.error("The evaluation of step %d failed, training goes on: %s", step, reason)
        return
    writer.scalars(step, values)


def _export(run: Run, state: TrainState, directory: storage.Path) -> None:
    """Write a model directory with the averaged parameters."""
    params = sharding.fetch(run.task.released(state.eval_params), run.mesh)
    distributed.of_first(lambda: _write_model(run, params, int(state.step), directory))


def _write_model(run: Run, params: Params, step: int, directory: storage.Path) -> None:
    source = sources.load_source(run.config.data, "test")
    kind = find_kind(run.config.task, "config.task")
    extra = {"class_names": source.class_names, "step": step, **run.recommended}
    about = {
        "trained on": f"`{run.config.data.source}`, {len(run.iterator.source):,} images",
        "held out": f"{len(source):,} images",
        "steps": f"{step:,} of {run.config.data.batch_size} images each",
        **metrics.last_evaluation(run.workdir / metrics.FILE_NAME, step),
    }
    model_dir.save_model(
        directory,
        kind.released_kind,
        run.task.model_config(),
        params,
        extra,
        companions={name: _unchanged(run, name) for name in kind.companions},
        about=about,
    )
    logging.info("Wrote the model directory %s", directory)


def _unchanged(run: Run, name: str) -> storage.Path:
    """Return the directory of a model that the run needs, unless it is another one by now."""
    path = run.config.companions[name]
    directory = model_dir.locate(path)
    if model_dir.fingerprint(directory) != run.made_from[name]:
        raise ValueError(
            f"the {name} {path} has changed since this run began, so no model can be written with "
            f"it; {run.checkpoints.describe_latest()}; bring the {name} back and run the same "
            "command again"
        )
    return directory
