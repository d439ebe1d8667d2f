"""Every file of a checkpoint flipped, cut short and deleted."""

import contextlib
import functools
import io
import json
import random
import shutil

import jax

from experiments.faults import damage, sandbox, trial
from longnet_jax.training import checkpoint, loop
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import state as state_lib
from longnet_jax.training import workdir as workdir_lib

_LAST = str(sandbox.STEPS)


def run(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """Damages one file of the last of two checkpoints, and goes on.

  Seed by seed it is the next file, and after all files the next damage.
  """
  source, made, states = _two_checkpoints(box)
  files = sorted(p for p in (source / _LAST).rglob("*") if p.is_file())
  kinds, number = damage.KINDS, seed // len(files)
  path = files[seed % len(files)].relative_to(source)
  kind = kinds[number % len(kinds)]
  folder = box.fresh("damaged")
  try:
    copies = [folder / "plain", folder / "fallback"]
    for copy in copies:
      shutil.copytree(source, copy / "checkpoints")
      damage.damage(copy / "checkpoints" / path, kind, random.Random(seed))
    row = f"a file of a checkpoint {kind}"
    plain, fallback = copies
    return [
      trial.attempt(
        row,
        lambda: _restore(made, plain, fallback=False),
        lambda found: found == states[1],
      ),
      trial.attempt(
        f"{row}, parameters alone",
        lambda: state_lib.fingerprint(checkpoint.load_checkpoint(plain)[1]),
        lambda found: found == states[1][1],
      ),
      _with_fallback(made, fallback, states, f"{row}, --fallback"),
    ]
  finally:
    shutil.rmtree(folder)


def _with_fallback(made, workdir, states, row):
  """A trial that may go on from either checkpoint, and must from one."""
  found = []

  def restore():
    with contextlib.redirect_stderr(io.StringIO()):
      found.append(_restore(made, workdir, fallback=True))
    return found[0]

  result = trial.attempt(row, restore, lambda found: found in states)
  if result.outcome == trial.REFUSED:  # there was one to go on from
    return result._replace(outcome=trial.LOST)
  if found == states[:1]:
    return result._replace(outcome=trial.BEFORE)
  return result


def _restore(made, workdir, *, fallback):
  """Step, and fingerprints of the parameters and of all of the state."""
  with checkpoint.Checkpoints(workdir, max_to_keep=2) as checkpoints:
    state, beginning = loop.begin(made, checkpoints, fallback=fallback)
  return beginning.step, *map(state_lib.fingerprint, (state.params, state))


@functools.cache
def _two_checkpoints(box):
  """The last two checkpoints of a run, the run, and what they restore to."""
  _ = box.undisturbed
  workdir = box.folder / "undisturbed"
  source = box.folder / "two"
  steps = sandbox.checkpoints(workdir)[-2:]
  for step in map(str, steps):
    shutil.copytree(workdir / "checkpoints" / step, source / step)
  settings = json.loads(workdir_lib.config_path(workdir).read_text())
  config = config_lib.build(settings)
  with jax.numpy_dtype_promotion("standard"):
    made = run_lib.make_run(config, workdir_lib.tokenizer_path(workdir))
  states = []
  with checkpoint.open_to_read(workdir) as checkpoints:
    for step in steps:
      state = checkpoints.restore(step, made.abstract_state)
      prints = map(state_lib.fingerprint, (state.params, state))
      states.append((step, *prints))
  for step in steps:  # compiles what all trials compute
    checkpoint.load_checkpoint(workdir, step=step)
  return source, made, states


JOBS = {"checkpoints": (600, run)}
