"""Where the numbers of a run go: a JSONL file, TensorBoard, the terminal."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time

import tqdm

from longnet_jax import checked, storage
from longnet_jax.parallel import hosts
from longnet_jax.training import attempts as attempts_lib
from longnet_jax.training import tracker as tracker_lib

# Seconds between two times that a bucket gets the records.
_PATIENCE = 30
_NUMBERS = (int, float)


def metrics_path(workdir) -> storage.Path:
  """The JSONL file of a run, one record a line with its step."""
  return storage.path(workdir) / "metrics.jsonl"


def read_metrics(workdir) -> list[dict]:
  """All records of a run in order; a last line cut off by a kill is left out.

  Raises ValueError naming the first line that is no record.
  """
  path = metrics_path(workdir)
  if not storage.exists(path):
    return []
  records = []
  lines = storage.read(path).split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      record = storage.parse_json(line)
    except ValueError:
      record = None
    if not _is_record(record):
      if number == len(lines):
        break
      raise checked.RefusedError(
        f"line {number} of {path} is no record of a run; remove the line or "
        "restore the file"
      )
    records.append(record)
  return records


def _is_record(found) -> bool:
  """Whether it is numbers by name, a step among them, and names of hosts.

  Of these the seconds are added to those of other records.
  """
  return (
    isinstance(found, dict)
    and type(found.get("step")) is int
    and 0 <= found["step"] < 2**31
    and all(
      type(value) is str if name.endswith("_host") else type(value) in _NUMBERS
      for name, value in found.items()
    )
    and 0 <= found.get("step_seconds", 0) < math.inf
  )


class _File:
  """Lines in a file, there as soon as they are added."""

  def __init__(self, path: storage.Path, lines: list[str]):
    storage.write_whole(path, "".join(lines))
    self._path, self._file = path, path.open("a")

  def add(self, line: str) -> None:
    with storage.named(self._path):
      self._file.write(line)
      self._file.flush()

  def flush(self) -> None:
    with storage.named(self._path):
      os.fsync(self._file.fileno())
    # The file may be none that anybody finds: orbax would make a new folder.
    with contextlib.suppress(OSError):
      if os.path.samefile(self._path, self._file.fileno()):
        return
    raise storage.gone(self._path)

  def close(self) -> None:
    with storage.named(self._path):
      self._file.close()


class _Object:
  """Lines in a bucket, which cannot append: all are written again at times."""

  def __init__(self, path: storage.Path, lines: list[str]):
    self._path, self._lines = path, lines
    self._pending = True
    self.flush()

  def add(self, line: str) -> None:
    self._lines.append(line)
    self._pending = True
    if time.monotonic() > self._written + _PATIENCE:
      self.flush()

  def flush(self) -> None:
    if self._pending:
      storage.write_whole(self._path, "".join(self._lines))
      self._written, self._pending = time.monotonic(), False

  def close(self) -> None:
    self.flush()


class Writer:
  """Writes records of a run that has done `start` of `total` steps.

  Records past `start`, left by a process that got further than its last
  checkpoint, are removed: their steps will be done again. A record says of the
  `attempts` how the time of their steps counts.
  """

  def __init__(
    self,
    workdir,
    *,
    start: int,
    total: int,
    stream=None,
    attempts: attempts_lib.Attempts | None = None,
    tracker: tracker_lib.Tracker | None = None,
  ):
    kept = [r for r in read_metrics(workdir) if r["step"] <= start]
    self._attempts, self._tracker = attempts, tracker
    if attempts:
      attempts.count(sum(r.get("step_seconds", 0.0) for r in kept))
    path = metrics_path(workdir)
    lines = [json.dumps(record) + "\n" for record in kept]
    kind = _Object if storage.is_remote(path) else _File
    self._file = kind(path, lines)
    self._board = _open_tensorboard(workdir, start)
    self._progress = Progress(start, total, stream or sys.stdout)
    self.advance, self.say = self._progress.advance, self._progress.say

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def record(self, step: int, values: dict[str, int | float | str]) -> None:
    """Appends a record and shows it."""
    if self._attempts:
      self._attempts.count(values["step_seconds"])
      values = values | self._attempts.values()
    self._file.add(json.dumps({"step": step, **values}) + "\n")
    numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
    if self._board is not None:
      for name, value in numbers.items():
        self._board.add_scalar(name, value, step)
    if self._tracker:
      self._tracker.record(step, numbers)
    self._progress.show(step, values)

  def note(self, **notes) -> None:
    """Keeps JSON values by name with what is known of this start."""
    if self._attempts:
      self._attempts.note(**notes)

  def flush(self) -> None:
    """Returns when what was recorded would outlive this machine."""
    self._file.flush()
    if self._attempts:
      self._attempts.write()

  def close(self) -> None:
    """Closes the files and ends the progress line."""
    self._progress.close()
    self._file.close()
    if self._attempts:
      self._attempts.write()
    if self._board is not None:
      self._board.close()


class SilentWriter:
  """The writer of a process that leaves records to the first one."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def record(self, step: int, values: dict[str, int | float | str]) -> None:
    """Does nothing, as do the others."""

  def note(self, **notes) -> None:
    """Keeps nothing."""

  def flush(self) -> None:
    """Has nothing to write."""

  def advance(self, step: int) -> None:
    """Shows nothing."""

  def say(self, text: str) -> None:
    """Says nothing."""


def open_writer(workdir, **options) -> Writer | SilentWriter:
  """A Writer in the first process, elsewhere one that writes nothing."""
  return Writer(workdir, **options) if hosts.is_first() else SilentWriter()


class Progress:
  """A bar with the time left on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, total: int, stream):
    self._total, self._stream = total, stream
    self._first = None  # step that was done first, and when
    self._bar = None
    if stream.isatty():
      self._bar = tqdm.tqdm(
        initial=start, total=total, file=stream, unit="step", smoothing=0.1
      )

  def advance(self, step: int) -> None:
    """Moves the bar to `step`; time counts from the first call on.

    What comes before it is compilation.
    """
    if self._first is None:
      self._first = step, time.perf_counter()
      if self._bar is not None:
        self._bar.initial = step
        self._bar.reset(self._total)
        self._bar.n = self._bar.last_print_n = step
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def show(self, step: int, values: dict[str, int | float | str]) -> None:
    """Shows the record of a step; a terminal keeps validation in sight."""
    line = f"step {step}/{self._total}  {summary(values)}"
    if self._bar is None:
      self.say(f"{line}{self._left(step)}")
      return
    self._bar.set_postfix_str(summary(values, brief=True), refresh=True)
    if "validation_loss" in values:
      self.say(line)

  def _left(self, step: int) -> str:
    """How long the rest takes at the pace so far, once there is one."""
    first, since = self._first or (step, 0.0)
    if step == first:
      return ""
    pace = (time.perf_counter() - since) / (step - first)
    return f"  {duration(pace * (self._total - step))} left"

  def say(self, text: str) -> None:
    """Prints a line without disturbing the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


def summary(
  values: dict[str, int | float | str], *, brief: bool = False
) -> str:
  """The few numbers of a record that a person watches, or fewer still."""
  losses = [
    _loss(title, values.get(bits), values.get(nats), brief)
    for title, bits, nats in (
      ("loss", "bits_per_byte", "loss"),
      ("validation", "validation_bits_per_byte", "validation_loss"),
    )
  ]
  speed = (
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("flops_per_second", "{:.3g} FLOP/s"),
    ("share_of_peak", "{:.1%} of peak"),
  )[: 1 if brief else None]
  speeds = [form.format(values[name]) for name, form in speed if name in values]
  return "  ".join(filter(None, losses + speeds))


def _loss(title: str, bits, nats, brief: bool) -> str:
  """A loss in bits a byte, and nats a token beside it."""
  shown = [] if bits is None else [f"{bits:.4f} bits/byte"]
  if nats is not None and not (shown and brief):
    shown.append(f"{nats:.4f} nats/token")
  return f"{title} {' = '.join(shown)}" if shown else ""


def duration(seconds: float) -> str:
  """3725 -> "1h02m", 75 -> "1m15s"."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def _open_tensorboard(workdir, start):
  if importlib.util.find_spec("tensorboardX") is None:
    return None
  import tensorboardX

  return tensorboardX.SummaryWriter(
    str(storage.path(workdir) / "tensorboard"), purge_step=start + 1
  )
