"""Says when a run stands still, and where."""

import faulthandler
import os
import sys
import threading
import time

# The end of a process that stood still.
STALLED = 6


class Watchdog:
  """Prints the stacks of all threads when nothing was done for some minutes.

  With `ends` it also ends the process, so that a supervisor starts it again.
  0 minutes watch nothing.
  """

  def __init__(self, minutes: float, *, ends: bool, stream=None):
    self._seconds, self._ends = 60 * minutes, ends
    self._stream = stream or sys.stderr
    self._step, self._since = 0, time.monotonic()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._done.set()

  def done(self, step: int) -> None:
    """Notes that a step, its validation or its save has ended."""
    self._step, self._since = step, time.monotonic()

  def _watch(self):
    while not self._done.wait(self._seconds / 10):
      if time.monotonic() - self._since > self._seconds:
        self._report()
        self._since = time.monotonic()

  def _report(self):
    end = "; the process ends" if self._ends else ""
    print(
      f"watchdog: nothing has ended for {self._seconds / 60:g} minutes since "
      f"step {self._step}{end}; all threads:",
      file=self._stream,
      flush=True,
    )
    faulthandler.dump_traceback(self._stream, all_threads=True)
    if self._ends:
      os._exit(STALLED)
