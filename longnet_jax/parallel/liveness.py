"""Notices that a process of a run has ended or frozen, while all wait for it.

A collective waits for ever for a frozen process. So each process counts in the
store of the one that coordinates, and looks whether the others still do.
"""

from collections.abc import Callable
import threading
import time

PERIOD = 5.0  # seconds between two counts
# Seconds without a count until a process is lost: less than the 100 after which
# JAX aborts in its own words.
PATIENCE = 60.0


class LostError(RuntimeError):
  """Another process of the run has ended, or never came."""

  def __init__(self, text: str = ""):
    super().__init__(
      text
      or "another process of this run has ended; see what it said, then start "
      "all again: they go on from the last checkpoint"
    )


class Liveness:
  """Calls `lost(name)` once a process, or the store, has been silent too long.

  `store` has key_value_set and key_value_dir_get, as JAX's distributed client.
  """

  def __init__(
    self,
    store,
    process: int,
    lost: Callable[[str], None],
    *,
    period: float = PERIOD,
    patience: float = PATIENCE,
  ):
    self._store, self._key, self._lost = store, f"alive/{process}", lost
    self._period, self._patience = period, patience
    self._seen = {"the coordinator": (None, time.monotonic())}
    self._done = threading.Event()
    for work in (self._count, self._judge):
      threading.Thread(target=work, daemon=True).start()

  def stop(self) -> None:
    """Looks no longer."""
    self._done.set()

  def _count(self):
    """Counts and looks; a store that does not answer keeps it waiting."""
    count = 0
    while not self._done.wait(self._period):
      count += 1
      try:
        self._store.key_value_set(self._key, str(count), allow_overwrite=True)
        found = dict(self._store.key_value_dir_get("alive/"))
      except Exception:  # of whatever class: JAX's, and they change
        continue
      found["the coordinator"] = str(count)
      now = time.monotonic()
      for name, value in found.items():
        if self._seen.get(name, ("",))[0] != value:
          self._seen[name] = (value, now)

  def _judge(self):
    while not self._done.wait(self._period / 2):
      now = time.monotonic()
      for name, (_, since) in list(self._seen.items()):
        if now - since > self._patience:
          self._lost(name.replace("alive/", "process "))
          return
