"""Turns the metrics of steps into records, one step late."""

from collections.abc import Callable
import contextlib
import math
import time

import jax

from longnet_jax.analysis import chips
from longnet_jax.training import metrics as metrics_lib
from longnet_jax.training import run as run_lib


class DivergedError(RuntimeError):
  """The loss or the gradient stopped being finite."""


class Report:
  """Fetches each step's metrics when the next has been started.

  Reading a number waits until its step is computed; a step later there is
  nothing to wait for and the device never idles.
  """

  def __init__(self, run: run_lib.Run, writer: metrics_lib.Writer):
    self._run, self._writer = run, writer
    self._held = None
    self._tokens, self._since = 0.0, None
    self._skipped = self._skipped_in_a_row = 0
    peak = chips.peak_flops(run.mesh.devices.flat[0])
    self._peak = peak and peak * run.mesh.size

  def hold(self, step: int, metrics: dict) -> None:
    """Keeps a step's metrics and deals with those of the step before."""
    self.flush()
    self._held = (step, metrics)

  def flush(self, validate: Callable[[], dict] | None = None) -> dict | None:
    """Checks and records what is held, with the results of `validate`.

    Raises DivergedError where a number is not finite.
    """
    if self._held is None:
      return None
    (step, metrics), self._held = self._held, None
    values = self._without_skipped(step, _scalars(jax.device_get(metrics)))
    self._count(values.pop("tokens", 0.0))
    self._writer.advance(step)
    due = step % self._run.config.training.log_every == 0
    if not due and validate is None:
      return None
    values |= self._throughput()
    values["learning_rate"] = float(self._run.schedule(step - 1))
    validation = None
    if validate is not None:
      with self.paused():
        validation = validate()
      found = {f"validation_{k}": v for k, v in validation.items()}
      _check_finite(step, found)
      values |= found
    self._writer.record(step, values)
    return validation

  def _without_skipped(self, step: int, values: dict) -> dict:
    """The finite values of a step; DivergedError where all must be."""
    row = self._skipped_in_a_row + 1 if values.pop("skipped", 0) else 0
    self._skipped_in_a_row = row
    if not row or row > self._run.config.training.max_skipped:
      _check_finite(step, values)
    else:
      self._skipped += 1
    if self._skipped:
      values["skipped"] = self._skipped  # since the start of this process
    return {k: v for k, v in values.items() if math.isfinite(v)}

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time in this block out of the throughput."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began

  def _count(self, tokens: float) -> None:
    """Counts a step's tokens, but not of the first: it holds compilation."""
    if self._since is None:
      self._since = time.perf_counter()
    else:
      self._tokens += tokens

  def _throughput(self) -> dict[str, float]:
    """Rates since the last record, over all devices."""
    now = time.perf_counter()
    rate = self._tokens / (now - self._since) if self._tokens else 0.0
    self._tokens, self._since = 0.0, now
    if not rate:
      return {}
    flops_rate = rate * run_lib.flops_per_token(self._run)
    values = {"tokens_per_second": rate, "flops_per_second": flops_rate}
    if self._peak:
      values["share_of_peak"] = flops_rate / self._peak
    return values


def _check_finite(step: int, values: dict[str, float]) -> None:
  for name, value in values.items():
    if not math.isfinite(value):
      raise DivergedError(f"step {step}: {name} is {value}")


def _scalars(metrics: dict) -> dict[str, float]:
  """Floats by name; the branches' mixing weights become one each."""
  weights = metrics.pop("mixing", ())
  values = {name: float(value) for name, value in metrics.items()}
  return values | {
    f"mixing_weight_{i}": float(weight) for i, weight in enumerate(weights)
  }
