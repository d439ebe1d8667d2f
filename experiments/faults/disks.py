"""Disks that are full, gone or read-only: a run says so, and later goes on."""

from collections.abc import Callable
import contextlib
import functools
import pathlib
import random
import shutil
import subprocess
import tempfile

from experiments.faults import child, sandbox, trial

_CODES = (4,)
_ROOMY = "size=64m"


def run_full(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A disk too small for the run, at times for its data, too."""
  if not _can_mount():
    return []
  rng = random.Random(seed)
  size = rng.choice((16, 64, 128, 256, 512, 1024, 2048))
  folder = box.fresh("disk")
  flags = []
  if rng.random() < 0.3:
    flags = [f"--config.data.{d}_dir={folder}/data" for d in ("cache", "data")]
  with _disk(folder, f"size={size}k") as remount:
    said = folder.with_name(f"{folder.name}-said")
    start = lambda: box.start(folder / "run", *flags, said=said)
    result = _judge(box, "disk full", start())
    return [_after(box, result, lambda: remount(_ROOMY), start)]


def run_limit(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A limit on the bytes of a file, as of ulimit -f."""
  limit = random.Random(seed).choice((1024, 2048, 4096, 16_384))
  workdir = box.fresh("limit") / "run"
  result = _judge(
    box, "size of files limited", box.start(workdir, largest_file=limit)
  )
  return [_after(box, result, lambda: None, lambda: box.start(workdir))]


def run_read_only(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A run killed, and started again where nothing can be written."""
  if not _can_mount():
    return []
  rng = random.Random(seed)
  folder = box.fresh("disk")
  said = folder.with_name(f"{folder.name}-said")
  start = lambda: box.start(folder / "run", said=said)
  with _disk(folder, _ROOMY) as remount:
    process = start()
    process.wait_for(rng.choice((child.STEPS, child.SAVE)))
    process.join(rng.uniform(0, 0.1))
    process.kill()
    process.finish()
    remount("ro")
    result = _judge(box, "disk read-only", start())
    return [_after(box, result, lambda: remount("rw"), start)]


def run_gone(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A workdir that is removed during the run."""
  rng = random.Random(seed)
  workdir = box.fresh("gone") / "run"
  process = box.start(workdir)
  process.wait_for(rng.choice((child.STEPS, child.SAVE)))
  process.join(rng.uniform(0, 0.1))
  shutil.rmtree(workdir, ignore_errors=True)
  result = _judge(box, "folder gone", process)
  return [_after(box, result, lambda: None, lambda: box.start(workdir))]


def _judge(box, row, process) -> trial.Trial:
  """The trial of a process that may be refused, or end undisturbed."""
  code, out, err = process.finish()
  if code is None:
    return trial.Trial(row, trial.HANG, err[-300:])
  if code == 0 and out.split()[-1] == box.undisturbed[0]:
    return trial.Trial(row, trial.UNDISTURBED)
  return trial.of_process(row, code, err, _CODES)


def _after(
  box, result: trial.Trial, repair: Callable, start: Callable
) -> trial.Trial:
  """The trial, if the run goes on once what was wrong is repaired."""
  if result.outcome in trial.FAILURES:
    return result
  repair()
  code, out, err = start().finish()
  if code or out.split()[-1] != box.undisturbed[0]:
    return result._replace(
      outcome=trial.LOST, said=f"exit {code}: {err[-300:]}"
    )
  return result


@functools.cache
def _can_mount() -> bool:
  """Whether this process may mount a disk, which root may."""
  with tempfile.TemporaryDirectory() as folder:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      with _disk(pathlib.Path(folder), _ROOMY):
        return True
  return False


@contextlib.contextmanager
def _disk(folder: pathlib.Path, size: str):
  """A disk of its own at a folder; gives what mounts it anew with options."""

  def mount(options):
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)

  mount(size)
  try:
    yield lambda options: mount(f"remount,{options}")
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


JOBS = {
  "full": (20, run_full),
  "limit": (10, run_limit),
  "read_only": (6, run_read_only),
  "gone": (10, run_gone),
}
