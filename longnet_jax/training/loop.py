"""The training loop: from settings and a workdir to trained parameters."""

import contextlib
import dataclasses
import functools
import signal
import sys
import time

import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.data import pipeline
from longnet_jax.parallel import hosts, sharding
from longnet_jax.training import attempts as attempts_lib
from longnet_jax.training import beginning as beginning_lib
from longnet_jax.training import checkpoint, curves, lease, stopping, watchdog
from longnet_jax.training import config as config_lib
from longnet_jax.training import initial as initial_lib
from longnet_jax.training import metrics as metrics_lib
from longnet_jax.training import profile as profile_lib
from longnet_jax.training import report as report_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import state as state_lib
from longnet_jax.training import tracker as tracker_lib
from longnet_jax.training import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended."""

  step: int  # updates done
  fingerprint: str  # of the parameters, as state.fingerprint
  signal: signal.Signals | None  # what asked it to stop early
  validation: dict[str, float]  # at the last step, where it was evaluated


def train(
  config: config_lib.ExperimentConfig,
  workdir,
  *,
  stream=None,
  fallback: bool = False,
  profile: str | None = None,
  tracker: str | None = None,
) -> Result:
  """Trains in `workdir` until `training.steps`, from its last checkpoint on.

  A new run starts from the parameters that `training.init_from` names, or from
  random ones. With `fallback` a run goes on from the last checkpoint that can
  be read. `profile`, such as "100:5", traces steps, see profile.py; `tracker`,
  such as "my_runs:track", gets the records, too, see tracker.py.

  Raises ValueError for settings that cannot work or belong to another run,
  CheckpointError where one cannot be read or written, and DivergedError where
  the loss stops being finite. SIGTERM, SIGINT and SIGHUP save and return early.
  Of several processes (`hosts.start`) all call it with the same arguments and
  get the same result; the first one writes the records.
  """
  began = time.monotonic()
  settings = dataclasses.asdict(config)
  traced = profile_lib.parse(profile, config.training.steps)
  first = hosts.is_first() or None
  track = first and tracker and tracker_lib.load(tracker)
  checkpoint.folder(workdir)  # or the checkpoints could lie nowhere
  workdir_lib.check(workdir, settings)
  origin = None
  if config.training.init_from and not checkpoint.exists(workdir):
    origin = initial_lib.find(config)
  run = run_lib.make_run(
    config, workdir_lib.tokenizer_path(workdir), origin and origin.tokenizer
  )
  if origin:
    origin.check(run.abstract_state.params)
  checkpoint.check_space(workdir, run.abstract_state)
  hosts.check_equal(
    {"config": workdir_lib.comparable(settings), **run.fingerprints}
  )
  with lease.hold(workdir) as check_lease:
    workdir_lib.check(workdir, settings)  # now that nobody else may write it
    records = workdir_lib.write_records(workdir, settings, run)
    open_writer = functools.partial(
      metrics_lib.open_writer,
      workdir,
      total=config.training.steps,
      stream=stream,
      attempts=first and attempts_lib.Attempts(workdir, began),
      tracker=track and tracker_lib.Tracker(tracker, track, settings, workdir),
    )
    trace = profile_lib.Profile(traced, workdir)
    begin_run = functools.partial(begin, run, fallback=fallback, origin=origin)
    result = _train(
      run, workdir, records, check_lease, open_writer, trace, begin_run
    )
    if first:
      curves.draw_losses(
        {"": metrics_lib.read_metrics(workdir)},
        workdir_lib.loss_picture_path(workdir),
      )
  return result


def _train(
  run, workdir, records, check_lease, open_writer, trace, begin_run
) -> Result:
  """Trains a run whose workdir is ours and has its records."""
  training = run.config.training
  with checkpoint.Checkpoints(
    workdir, max_to_keep=training.max_to_keep, keep_every=training.keep_every
  ) as checkpoints:
    state, beginning = begin_run(checkpoints)
    start = beginning.step

    def save(step, state, validation):
      check_lease()
      writer.flush()  # what a later start keeps is on record before
      checkpoints.save(step, state, records, validation)

    with open_writer(start=start) as writer:
      writer.say(run.describe())
      writer.say(run.describe_reach())
      if note := run.describe_kernel():
        writer.say(note)
      for line in beginning.describe(run.config):
        writer.say(line)
      writer.note(**beginning.notes())
      if beginning.origin and not checkpoints.steps():
        save(0, state, validation=None)  # whatever becomes of the origin
      if planned := trace.describe(start):
        writer.say(planned)
      with stopping.catch_signals() as caught, _naming_last_good(checkpoints):
        stop = stopping.Stop(
          run.mesh,
          caught,
          save_minutes=training.checkpoint_minutes,
          saving=checkpoints.is_writing,
        )
        state = run_steps(run, state, start, writer, save, stop, trace)
    checkpoints.wait()
    step = int(state.step)
    validation = checkpoints.metrics(step) or {}
  return Result(
    step=step,
    fingerprint=state_lib.fingerprint(state.params),
    signal=stop.signal,
    validation=validation,
  )


def begin(
  run: run_lib.Run,
  checkpoints: checkpoint.Checkpoints,
  *,
  fallback: bool = False,
  origin: initial_lib.Origin | None = None,
) -> tuple[state_lib.TrainState, beginning_lib.Beginning]:
  """The state to begin with, and what is to be said of it."""
  state, step = restore_or_init(
    run, checkpoints, fallback=fallback, origin=origin
  )
  changed = {}
  if step:
    before = checkpoints.restore_json(step, "config")
    changed = config_lib.changes(before, dataclasses.asdict(run.config))
  return state, beginning_lib.Beginning(step, changed, origin)


def restore_or_init(
  run: run_lib.Run,
  checkpoints: checkpoint.Checkpoints,
  *,
  fallback: bool = False,
  origin: initial_lib.Origin | None = None,
) -> tuple[state_lib.TrainState, int]:
  """The state to go on from and the number of steps it has done.

  With `fallback` checkpoints that cannot be read are set aside, if one can.
  Where there is none the parameters are those of `origin`, or random.
  """
  if fallback and jax.process_count() > 1:
    raise checked.RefusedError(
      "--fallback is for one process, as only some of several may fail to read "
      "a checkpoint; move the damaged folder out of the workdir instead"
    )
  found, damaged = None, {}
  for step in reversed(checkpoints.steps()):
    try:
      # The next save keeps the best by these and deletes others.
      checkpoints.metrics(step)
      found = found or (_restore(run, checkpoints, step), step)
    except checkpoint.CheckpointError as error:
      if not fallback:
        raise
      damaged[step] = error
  if damaged and not found:
    raise damaged[min(damaged)]
  if damaged:
    for step, place in checkpoints.set_aside(damaged).items():
      print(f"step {step} cannot be read: moved to {place}", file=sys.stderr)
  if found:
    return found
  state = run.init()
  if origin:
    state = state._replace(params=None)  # makes room for what is read
    state = state._replace(params=origin.load(run.mesh))
  return state, 0


def _restore(run, checkpoints, step) -> state_lib.TrainState:
  """The state of a step, every item of which can be read."""
  for item in ("config", "tokenizer"):
    checkpoints.restore_json(step, item)
  recorded = checkpoints.restore_json(step, "data")
  for name, value in run.fingerprints.items():
    if recorded[name] != value:
      raise checked.RefusedError(
        f"the {name} of this run was {recorded[name]} at step {step} and is "
        f"now {value}; bring back the files it was made from or choose "
        "another --workdir"
      )
  return checkpoints.restore(step, run.abstract_state)


def run_steps(
  run, state, start, writer, save, stop, trace
) -> state_lib.TrainState:
  """Trains to the last step, or to the step during which a signal came."""
  training = run.config.training
  report = report_lib.Report(run, writer)
  with (
    contextlib.closing(_batches(run, start)) as batches,
    watchdog.Watchdog(
      training.watchdog_minutes, ends=training.watchdog_ends
    ) as watch,
    trace,
  ):
    for step, placed in enumerate(report.timed(batches), start + 1):
      trace.begin(step)
      state, metrics = run.train_step(state, placed)
      last = stop.after_step() or step == training.steps
      # The first one compiles, as everything else then does.
      mixes = step % training.log_every == 0 or step == start + 1
      if mixes and run.mixing_step:
        metrics["mixing"] = run.mixing_step(state.params, placed)
      report.hold(step, metrics)
      trace.end(step, state)
      watch.done(step)
      validation = None
      if step % training.eval_every == 0 or step == training.steps:
        validation = report.flush(
          functools.partial(evaluate, run, state.params)
        )
        watch.done(step)
      due = step % training.checkpoint_every == 0 or stop.save_is_due
      if last or due:
        report.flush()
        with report.paused("save"):
          save(step, state, validation=validation)
        stop.saved()
        watch.done(step)
      if last:
        break
  if stop.signal:
    writer.say(f"{stop.signal.name}: stopped after step {step}")
  return state


def evaluate(run: run_lib.Run, params) -> dict[str, float]:
  """Loss in nats a token and bits a byte over the validation windows.

  At most `training.eval_batches` batches, the same ones at every call: all
  windows in order if that is enough, else the first of the shuffled order.
  """
  source, training = run.validation_source, run.config.training
  every = source.num_batches(training.batch_size)
  feed = pipeline.prefetched(
    source,
    training.batch_size,
    start=0,
    stop=min(training.eval_batches, every),
    shuffled=training.eval_batches < every,
    **_host(run),
  )
  with contextlib.closing(feed) as batches:
    sums = [run.eval_step(params, run.place(batch)) for batch in batches]
  total = {
    name: np.sum([float(s[name]) for s in jax.device_get(sums)])
    for name in sums[0]
  }
  return {
    "loss": total["nats"] / total["tokens"],
    "bits_per_byte": total["nats"] / np.log(2) / total["bytes"],
  }


@contextlib.contextmanager
def _naming_last_good(checkpoints):
  """Adds to a divergence what is left to go on from."""
  try:
    yield
  except report_lib.DivergedError as error:
    checkpoints.wait()
    steps = checkpoints.steps()
    left = (
      f"the checkpoint of step {steps[-1]} is kept"
      if steps
      else "there is no checkpoint yet"
    )
    raise report_lib.DivergedError(
      f"{error}; {left}; try a lower optimizer.learning_rate or more "
      "optimizer.warmup_steps in a new workdir"
    ) from error


def _batches(run, start):
  training = run.config.training
  return pipeline.prefetched(
    run.train_source,
    training.batch_size,
    start=start,
    stop=training.steps,
    **_host(run),
  )


def _host(run) -> dict[str, int]:
  index, count = sharding.host_rows(run.mesh, run.config.training.batch_size)
  return {"host_index": index, "host_count": count}
