"""A long run, in which nothing may grow and nothing be compiled again."""

import io
import os
import pathlib
import re

from absl import logging
import jax
import numpy as np

from experiments.faults import child, sandbox, trial
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop

STEPS, EVERY = 5000, 125
_COMPILED = "/jax/core/compile/backend_compile_duration"
# What is measured, and by how much allocators and pools of threads may wander.
# TensorStore keeps some 80 KB of its own statistics at each save.
_SLACK = {"resident MiB": 16, "files": 0, "threads": 4, "programs compiled": 0}


def run(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """Compares what the run holds near step 1,000 with what it does at its end.

  Medians of nine measurements, as a save in background is a thread at times.
  """
  workdir = box.fresh("soak") / "run"
  config = box.write_config(f"soak-{seed}", steps=STEPS)
  samples = box.call(_train, str(config), str(workdir), str(box.compiled))
  found = []
  for name, slack in _SLACK.items():
    values = [samples[step][name] for step in sorted(samples)]
    early = float(np.median(values[7:16]))
    late = float(np.median(values[-9:]))
    outcome = trial.UNDISTURBED if late <= early + slack else trial.GREW
    measured = {"from": round(early, 1), "to": round(late, 1)}
    found.append(trial.Trial(f"soak: {name}", outcome, measured=measured))
  return found


def _train(config: str, workdir: str, compiled: str) -> dict[int, dict]:
  """Trains, and returns what was measured at each record."""
  child.keep_compiled(compiled)
  logging.set_verbosity(logging.FATAL)  # as commands do
  names = {}
  exec(pathlib.Path(config).read_text(), names)
  settings = names["get_config"]()
  settings.training.update(
    log_every=EVERY, checkpoint_every=500, eval_every=1000
  )
  meter = _Meter()
  loop.train(config_lib.build(settings), workdir, stream=meter)
  return meter.samples


class _Meter(io.TextIOBase):
  """A stream of progress lines that measures its process at each of them."""

  def __init__(self):
    super().__init__()
    self.samples, self._compiled = {}, 0
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def write(self, text: str) -> int:
    """Measures once the text says which step is done."""
    if found := re.match(r"step (\d+)/", text):
      self.samples[int(found[1])] = {
        "resident MiB": _resident_bytes() / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "programs compiled": self._compiled,
      }
    return len(text)

  def _count(self, event, *_, **__):
    self._compiled += event == _COMPILED


def _resident_bytes():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


JOBS = {"soak": (1, run)}
