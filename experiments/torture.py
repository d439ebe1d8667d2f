"""Disturbs runs and damages files: python -m experiments.torture.

Counts what becomes of each fault: nothing is lost, nothing is wrong without a
word, what is refused is one line. The failures are printed with the command
that repeats them, and the exit code is 1 if there are any. With --json=FILE
the counts go on from those in the file, and are written to it after each
minute; delete it after a change of the code.

Disks are filled and made read-only only where this process may mount one.
"""

import json
import math
import os
import pathlib
import shlex
import tempfile
import time

from absl import flags

from experiments import command, hardware
from experiments.faults import (
  checkpoints,
  disks,
  files,
  kills,
  processes,
  sandbox,
  settings,
  soak,
  trial,
)
from longnet_jax import checked, storage

GROUPS = {
  "kills": kills.JOBS,
  "checkpoints": checkpoints.JOBS,
  "settings": settings.JOBS,
  "files": files.JOBS,
  "disks": disks.JOBS,
  "processes": processes.JOBS,
  "soak": soak.JOBS,
}
JOBS = {
  f"{group}/{name}": job
  for group, jobs in GROUPS.items()
  for name, job in jobs.items()
}

# So that a command that is stopped early has tried all faults.
_SHARES = (0.05, 0.25, 1)

_FAULTS = flags.DEFINE_list(
  "faults",
  list(GROUPS),
  f"any of {', '.join(GROUPS)}, or one such as files/model.pth",
)
_TRIALS = flags.DEFINE_integer(
  "trials", None, "most trials of each fault; the full table by default"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the first trial of each fault")
_MINUTES = flags.DEFINE_float("minutes", 240, "after which no trial begins")
_JSON = flags.DEFINE_string("json", None, "counts to go on from and to write")


class Record:
  """Counts of all outcomes, as they are in the JSON.

  Attributes:
    rows: row -> outcome -> trials.
    tried: fault -> number of seeds tried, and of the trials they made.
    failures: what to repeat.
    measured: row -> numbers, of long runs.
  """

  def __init__(self, path: pathlib.Path | None = None):
    self._path = path
    found = json.loads(path.read_text()) if path and path.exists() else {}
    self.rows = found.get("rows", {})
    self.tried = found.get("tried", {})
    self.failures = found.get("failures", [])
    self.measured = found.get("measured", {})

  def add(self, name: str, seed: int, trials: list[trial.Trial]) -> None:
    """Counts the trials of one seed of a fault, and prints failures."""
    seeds, made = self.tried.get(name, (0, 0))
    self.tried[name] = [seeds + 1, made + len(trials)]
    for each in trials:
      row = self.rows.setdefault(each.row, {})
      row[each.outcome] = row.get(each.outcome, 0) + 1
      if each.measured:
        self.measured[each.row] = each.measured
      if each.outcome in trial.FAILURES:
        again = (
          "python -m experiments.torture --trials=1"
          f" --seed={seed} --faults={shlex.quote(name)}"
        )
        failure = {**each._asdict(), "again": again}
        self.failures.append(failure)
        print(f"{each.row}: {each.outcome}: {each.said}\n  {again}", flush=True)

  def write(self) -> None:
    """Writes the counts, if there is a file for them."""
    if self._path is None:
      return
    record = {
      "command": command.line(),
      "hardware": hardware.describe(),
      "rows": self.rows,
      "measured": self.measured,
      "tried": self.tried,
      "failures": self.failures,
    }
    text = json.dumps(record, indent=1) + "\n"
    storage.write_whole(self._path, text)


def main(_) -> int:
  """Runs the faults that the flags name; 1 if one had a bad outcome."""
  names = _names(_FAULTS.value)
  os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes to come
  record = Record(pathlib.Path(_JSON.value) if _JSON.value else None)
  end = time.monotonic() + 60 * _MINUTES.value
  with tempfile.TemporaryDirectory() as folder:
    box = sandbox.Sandbox(pathlib.Path(folder))
    for share in _SHARES:
      for name in names:
        trials = min(_TRIALS.value or JOBS[name][0], JOBS[name][0])
        trials = math.ceil(share * trials)
        run(box, name, record, end=end, seed=_SEED.value, trials=trials)
  record.write()
  print(table(record))
  return 1 if record.failures else 0


def run(
  box, name: str, record: Record, *, end: float, trials: int, seed: int = 0
) -> None:
  """Adds trials of a fault until there are enough, or it is time to end."""
  _, function = JOBS[name]
  saved = time.monotonic()
  while time.monotonic() < end:
    seeds, made = record.tried.get(name, (0, 0))
    if max(seeds, made) >= trials:
      break
    record.add(name, seed + seeds, function(box, seed + seeds))
    if time.monotonic() > saved + 60:
      record.write()
      saved = time.monotonic()
  record.write()


def table(record: Record) -> str:
  """The counts as text, a line a row."""
  return "\n".join(
    f"{row}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    for row, counts in record.rows.items()
  )


def _names(wanted: list[str]) -> list[str]:
  """Faults by their own names and by those of groups."""
  names = []
  for each in wanted:
    found = [n for n in JOBS if n == each or n.startswith(f"{each}/")]
    if not found:
      checked.refuse("--faults", each, f"one of {', '.join([*GROUPS, *JOBS])}")
    names += found
  return names


if __name__ == "__main__":
  command.run(main)
