"""Whether a process hangs, however busy the machine is with others."""

import contextlib
import pathlib
import time

IDLE = 10.0
_MOST_BUSY = 600.0
_PERIOD = 1.0
# The share of a processor that pollers take, and a process at work exceeds.
_POLLING = 0.02


class Watch:
  """Looks when a process last ran, or waited for a processor or a disk."""

  def __init__(self, pid: int):
    self._tasks = pathlib.Path(f"/proc/{pid}/task")
    self._busy, self._looked = 0.0, time.monotonic()
    self._since = self._looked

  def hangs(self, idle: float = IDLE) -> bool:
    """Whether it did nothing for so many seconds, or worked for minutes."""
    now = time.monotonic()
    if now - self._looked > _PERIOD:
      busy, waits = self._look()
      change = abs(busy - self._busy)  # less where a thread has ended
      if waits or change > _POLLING * (now - self._looked):
        self._since = now
      self._busy, self._looked = busy, now
    return now - self._since > idle or self._busy > _MOST_BUSY

  def _look(self) -> tuple[float, bool]:
    """Seconds of all threads on and before processors; if one has a disk."""
    nanoseconds, waits = 0, False
    for task in self._tasks.glob("*"):
      with contextlib.suppress(OSError):  # the thread has ended
        runs, waited, _ = (task / "schedstat").read_text().split()
        nanoseconds += int(runs) + int(waited)
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        waits = waits or state == "D"
    return nanoseconds / 1e9, waits
