"""How often a run was started, and the share of all that time that counted.

attempts.json in a workdir has an entry for each start: when it began, the
seconds of wall time until it was last heard of, the step from which it went on,
and settings that it changed.
"""

import datetime
import json
import math
import time

from longnet_jax import checked, storage

# Seconds between two times that the file is written.
_PATIENCE = 30


def attempts_path(workdir) -> storage.Path:
  """The file of a run's starts."""
  return storage.path(workdir) / "attempts.json"


class Attempts:
  """The starts of a run, of which this one began at `began` (monotonic)."""

  def __init__(self, workdir, began: float):
    self._path, self._began = attempts_path(workdir), began
    self._all = [*_read(self._path), {"began": _since(began), "seconds": 0.0}]
    self._useful = 0.0
    self.write()

  def count(self, seconds: float) -> None:
    """Adds time in steps that count: those whose records are kept."""
    self._useful += seconds

  def note(self, **notes) -> None:
    """Adds JSON values by name to what is known of this start."""
    self._all[-1].update(notes)
    self.write()

  def values(self) -> dict[str, int | float]:
    """What a record says of them."""
    wall = time.monotonic() - self._began
    if wall > self._all[-1]["seconds"] + _PATIENCE:
      self.write()
    total = sum(each["seconds"] for each in self._all[:-1]) + wall
    return {
      "attempt": len(self._all),
      "wall_seconds": wall,
      "goodput": self._useful / total,
    }

  def write(self) -> None:
    """Puts what has passed on record, for the starts that follow."""
    self._all[-1]["seconds"] = time.monotonic() - self._began
    try:
      storage.write_whole(self._path, json.dumps(self._all, indent=2) + "\n")
    except FileNotFoundError as error:
      raise storage.gone(self._path) from error


def _read(path) -> list[dict]:
  if not storage.exists(path):
    return []
  try:
    return [_checked(each) for each in storage.read_json(path)]
  except (KeyError, OverflowError, TypeError, ValueError) as error:
    raise checked.RefusedError(
      f"{path} does not list the starts of a run; remove it, and they are "
      "counted anew"
    ) from error


def _checked(entry: dict) -> dict:
  seconds = float(entry["seconds"])
  if not 0 <= seconds < math.inf:
    raise ValueError("no time that has passed")
  return {**entry, "began": str(entry["began"]), "seconds": seconds}


def _since(began: float) -> str:
  passed = datetime.timedelta(seconds=time.monotonic() - began)
  return (datetime.datetime.now().astimezone() - passed).isoformat(
    " ", "seconds"
  )
