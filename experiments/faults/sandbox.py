"""A run so small that hundreds can be killed, and the processes that run it.

A process is forked from one that has imported everything and computed nothing,
so that its start costs a second instead of six.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket

from experiments.faults import child, idle

_CONTEXT = multiprocessing.get_context("forkserver")
STEPS = 60
_CONFIG = """
from configs import base


def get_config():
  config = base.get_config()
  config.model.update(
    vocab_size=280, num_layers=1, model_dim=16, num_heads=2, ffn_dim=32,
    segment_lengths=(8, 32), dilation_rates=(1, 2), dtype="float32",
    max_positions=64)
  config.data.update(
    folder={folder!r}, cache_dir={cache!r}, data_dir={cache!r}, window=32,
    validation_fraction=0.2, test_fraction=0.2, tokenizer="bpe",
    bpe_vocab_size=280)
  config.training.update(
    steps={steps}, batch_size=4, loss_chunk=32, log_every=1, eval_every=20,
    eval_batches=2, checkpoint_every=5)
  config.optimizer.update(warmup_steps=5)
  return config
"""


class Process:
  """`experiments.train` with these flags, in a process of its own.

  Attributes:
    phases: connection on which it says what it begins, see child.py.
  """

  def __init__(self, folder: pathlib.Path, flags, **options):
    folder.mkdir(parents=True, exist_ok=True)
    self._out, self._err = folder / "stdout", folder / "stderr"
    self.phases, theirs = _CONTEXT.Pipe(duplex=False)
    self._process = _CONTEXT.Process(
      target=child.train,
      args=(list(flags), str(self._out), str(self._err), theirs),
      kwargs=options,
    )
    self._process.start()
    theirs.close()
    self.kill, self.join = self._process.kill, self._process.join

  def send(self, number: signal.Signals) -> None:
    """Sends a signal, if the process is there."""
    with contextlib.suppress(ProcessLookupError):
      os.kill(self._process.pid, number)

  def wait_for(self, phase: str) -> bool:
    """Whether the process begins a phase, before it ends or hangs."""
    watch = idle.Watch(self._process.pid)
    with contextlib.suppress(EOFError):
      while not watch.hangs():
        if self.phases.poll(1.0) and self.phases.recv() == phase:
          return True
    return False

  def finish(self, seconds: float = idle.IDLE) -> tuple[int | None, str, str]:
    """Exit code (None: it hung for so long and was killed), stdout, stderr."""
    watch = idle.Watch(self._process.pid)
    while self._process.is_alive() and not watch.hangs(seconds):
      self._process.join(0.5)
    hangs = self._process.is_alive()
    self._process.kill()
    self._process.join()
    texts = [p.read_text(errors="replace") for p in (self._out, self._err)]
    return (None if hangs else self._process.exitcode), *texts


class Sandbox:
  """Text, settings and compiled code that all trials share."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.compiled = folder / "compiled"
    _write_text(folder / "text")
    self.config = self.write_config("shared")
    _CONTEXT.set_forkserver_preload([child.__name__])

  def write_config(self, name: str, *, steps: int = STEPS) -> pathlib.Path:
    """A config file whose data is kept in a folder of its own."""
    path = self.folder / f"{name}.py"
    folder, cache = self.folder / "text", self.folder / f"{name}-data"
    path.write_text(
      _CONFIG.format(folder=str(folder), cache=str(cache), steps=steps)
    )
    return path

  def start(
    self,
    workdir: pathlib.Path,
    *flags,
    said: pathlib.Path | None = None,
    **options,
  ) -> Process:
    """Starts training in `workdir`; what it says goes beside it, or to `said`.

    Options are those of `child.train`.
    """
    options = {"compiled": str(self.compiled), **options}
    said = said or workdir.with_name(f"{workdir.name}-said")
    number = len(list(said.glob("*")))
    if not any(flag.startswith("--config=") for flag in flags):
      flags = (f"--config={self.config}", *flags)
    flags = [*flags, f"--workdir={workdir}"]
    return Process(said / str(number), flags, **options)

  def call(self, function, *arguments):
    """What a function returns in a process of its own."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(
      target=_send_result, args=(theirs, function, *arguments)
    )
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found

  def fresh(self, name: str) -> pathlib.Path:
    """A folder below which a trial works, empty."""
    number = len(list(self.folder.glob(f"{name}-*")))
    path = self.folder / f"{name}-{number}"
    path.mkdir()
    return path

  @functools.cached_property
  def undisturbed(self) -> tuple[str, list]:
    """Fingerprint and records of the run that nothing disturbs."""
    workdir = self.folder / "undisturbed"
    code, out, err = self.start(workdir).finish()
    if code:
      raise RuntimeError(f"the undisturbed run ends with {code}: {err}")
    return out.split()[-1], records(workdir)


def records(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """Step and loss of each record of a run."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [(r["step"], r.get("loss")) for r in map(json.loads, lines)]


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Steps whose checkpoint is whole: other names are longer."""
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdigit())


def free_port() -> int:
  """A port that nobody uses now."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def _send_result(connection, function, *arguments):
  connection.send(function(*arguments))


def _write_text(folder: pathlib.Path) -> None:
  """Forty files of words, alike enough for byte pairs to be merged."""
  folder.mkdir()
  rng = random.Random(0)
  words = ["def", "return", "import", "value", "index", "self", "lambda"]
  for number in range(40):
    lines = [" ".join(rng.choices(words, k=6)) + "\n" for _ in range(12)]
    (folder / f"m{number}.py").write_text("".join(lines))
