"""The process of a trial: training that says what it begins.

Imported once by the process that all others are forked from; what it imports
costs seconds.
"""

import functools
import os
import resource
import runpy
import sys

import jax
import matplotlib.figure  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorflow_datasets  # noqa: F401

from configs import base  # noqa: F401
from experiments import command  # noqa: F401
from longnet_jax.training import checkpoint, loop, report
from longnet_jax.training import run as run_lib

# Where a run begins to do what it may be killed in.
DATA, COMPILATION, STEPS, SAVE, EVALUATION = (
  "building data",
  "restoring and compiling",
  "steps",
  "saving",
  "evaluation",
)
_MOST_SAID = 100
_BEGINS = {
  DATA: (run_lib, "make_run"),
  COMPILATION: (loop, "restore_or_init"),
  STEPS: (report.Report, "hold"),
  SAVE: (checkpoint.Checkpoints, "save"),
  EVALUATION: (loop, "evaluate"),
}


def train(
  flags: list[str],
  out: str,
  err: str,
  phases,
  *,
  compiled: str,
  largest_file: int | None = None,
) -> None:
  """Runs `experiments.train`; says on `phases` what it begins.

  `largest_file` limits the bytes of each file that it writes.
  """
  for stream, path in ((1, out), (2, err)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, stream)
  # A flag that was changed at random may name a folder here.
  os.chdir(os.path.dirname(out))
  keep_compiled(compiled)
  for phase, (owner, name) in _BEGINS.items():
    function = getattr(owner, name)
    setattr(owner, name, _announced(function, phase, phases.send))
  if largest_file is not None:
    limits = (largest_file, largest_file)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  sys.argv = ["train", *flags]
  runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)


def keep_compiled(folder: str) -> None:
  """Keeps all compiled code in a folder, however small.

  Whatever JAX_ENABLE_COMPILATION_CACHE says: trials damage what is kept.
  """
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _announced(function, phase, say):
  left = [_MOST_SAID]  # a pipe that nobody reads holds so many

  @functools.wraps(function)
  def run(*arguments, **options):
    left[0] -= 1
    if left[0] >= 0:
      say(phase)
    return function(*arguments, **options)

  return run
