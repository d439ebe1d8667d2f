"""Turns the metrics of steps into records, one step late."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import math
import time
from typing import NamedTuple

import jax

from longnet_jax.analysis import chips
from longnet_jax.training import metrics as metrics_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import slowest as slowest_lib

# What the host does beside the steps.
_PARTS = ("input", "save", "evaluation")
# Our names of what a device says of its memory.
_MEMORY = {
  "device_bytes": "bytes_in_use",
  "device_peak_bytes": "peak_bytes_in_use",
  "device_limit_bytes": "bytes_limit",
}


class _Sums(NamedTuple):
  """What a mean loss is made of."""

  nats: float
  tokens: float
  bytes: float

  def plus(self, *more: float) -> "_Sums":
    return _Sums(*map(sum, zip(self, more, strict=True)))


_NOTHING = _Sums(0.0, 0.0, 0.0)


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
    run.schedule(0)  # compiles now and not within a record's seconds
    self._tokens, self._since = 0.0, None
    self._sums = _NOTHING
    self._skipped = self._skipped_in_a_row = 0
    peak = chips.peak_flops(run.mesh.devices.flat[0])
    self._peak = peak and peak * run.mesh.size
    self._spent = dict.fromkeys(_PARTS, 0.0)  # seconds since the start
    self._recorded = dict(self._spent)
    self._slowest = None
    if jax.process_count() > 1:
      self._slowest = slowest_lib.Slowest(run.mesh)

  def timed(self, batches: Iterable) -> Iterator:
    """The batches, on devices; what it takes to have them counts as input."""
    batches = iter(batches)
    while True:
      with self._counted("input"):
        batch = next(batches, None)
        placed = batch and self._run.place(batch)
      if batch is None:
        return
      yield placed

  def hold(self, step: int, metrics: dict) -> None:
    """Keeps a step's metrics and deals with those of the step before."""
    if self._slowest and step % self._run.config.training.log_every == 0:
      metrics["hosts"] = self._slowest.ask(self._spent["input"])
    self.flush()
    self._held = (step, metrics, dict(self._spent))

  def flush(self, validate: Callable[[], dict] | None = None) -> dict | None:
    """Checks and records what is held, with the results of `validate`.

    Raises DivergedError where a number is not finite.
    """
    if self._held is None:
      return None
    (step, metrics, spent), self._held = self._held, None
    metrics = jax.device_get(metrics)
    waits = metrics.pop("hosts", None)
    values = self._without_skipped(step, _scalars(metrics))
    self._count(values)
    self._writer.advance(step)
    due = step % self._run.config.training.log_every == 0
    if not due and validate is None:
      return None
    values = self._mean_loss() | values | self._throughput()
    values["learning_rate"] = float(self._run.schedule(step - 1))
    validation = None
    if validate is not None:
      with self.paused("evaluation"):
        validation = validate()
      found = {f"validation_{k}": v for k, v in validation.items()}
      _check_finite(step, found)
      values |= found
      spent["evaluation"] = self._spent["evaluation"]
    values |= self._since_record(spent) | _memory()
    if waits is not None:
      values |= self._slowest.values(waits)
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
  def paused(self, part: str):
    """Counts the time in this block as a part's, and not as the steps'."""
    before = self._spent[part]
    with self._counted(part):
      yield
    self._since += self._spent[part] - before

  @contextlib.contextmanager
  def _counted(self, part: str):
    began = time.perf_counter()
    yield
    self._spent[part] += time.perf_counter() - began

  def _since_record(self, spent: dict[str, float]) -> dict[str, float]:
    """Seconds of each part since the last record."""
    before, self._recorded = self._recorded, spent
    return {f"{part}_seconds": spent[part] - before[part] for part in _PARTS}

  def _count(self, values: dict) -> None:
    """Takes a step's sums out of its values and adds them up."""
    step = {name: values.pop(name, 0.0) for name in ("loss", "tokens", "bytes")}
    if self._since is None:  # The first step holds compilation.
      self._since = time.perf_counter()
    else:
      self._tokens += step["tokens"]
    if step["loss"]:  # else the update was left out
      nats = step["loss"] * step["tokens"]
      self._sums = self._sums.plus(nats, step["tokens"], step["bytes"])

  def _mean_loss(self) -> dict[str, float]:
    """The loss of what was trained on since the last record or the start."""
    sums, self._sums = self._sums, _NOTHING
    values = {}
    if sums.tokens:
      values["loss"] = sums.nats / sums.tokens
    if sums.bytes:
      values["bits_per_byte"] = sums.nats / math.log(2) / sums.bytes
    return values

  def _throughput(self) -> dict[str, float]:
    """Rates since the last record, over all devices."""
    now = time.perf_counter()
    seconds = now - self._since
    rate = self._tokens / seconds if self._tokens else 0.0
    self._tokens, self._since = 0.0, now
    values = {"step_seconds": seconds}
    if not rate:
      return values
    flops_rate = rate * run_lib.flops_per_token(self._run)
    values |= {"tokens_per_second": rate, "flops_per_second": flops_rate}
    if self._peak:
      values["share_of_peak"] = flops_rate / self._peak
    return values


def _memory() -> dict[str, int]:
  """Bytes of the fullest device of this host; nothing where none says."""
  found = [stats for d in jax.local_devices() if (stats := d.memory_stats())]
  return {
    name: max(stats[key] for stats in found)
    for name, key in _MEMORY.items()
    if found and all(key in stats for stats in found)
  }


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
