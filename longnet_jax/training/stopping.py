"""What interrupts a run, on every process after the same step."""

from collections.abc import Callable, Iterator
import contextlib
import signal
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from longnet_jax.parallel import hosts


@contextlib.contextmanager
def catch_signals() -> Iterator[list[signal.Signals]]:
  """Collects signals that end a process, in the list it gives.

  SIGTERM, SIGINT, and SIGHUP where it is not ignored, as under nohup. A second
  one kills.
  """
  caught = []
  previous = {}

  def handle(number, _):
    caught.append(signal.Signals(number))
    for each, handler in previous.items():
      signal.signal(each, handler)

  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
      continue
    previous[number] = signal.signal(number, handle)
  try:
    yield caught
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class Stop:
  """Whether to stop or to save, the same answer on all processes.

  Several processes ask the devices, with a reduction of one number behind each
  step, and read the answer a step later: nothing waits for it. The number is
  twice a signal, plus one where the first process finds a save is due: minutes
  have passed, and `saving` says that none is being written.
  """

  def __init__(
    self,
    mesh: jax.sharding.Mesh,
    caught: list[signal.Signals],
    *,
    save_minutes: float = 0,
    saving: Callable[[], bool] = lambda: False,
  ):
    self._caught, self._saving = caught, saving
    self._votes = NamedSharding(mesh, P(mesh.axis_names))
    self._count = mesh.size
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    self._asked = None
    self._agreed = 0
    self._save_seconds = 60 * save_minutes
    self.saved()

  def after_step(self) -> bool:
    """Whether to stop; every process calls it once, after each step."""
    if jax.process_count() == 1:
      self._agreed = self._number()
      return self.signal is not None
    before, self._asked = self._asked, self._ask()
    self._agreed = 0 if before is None else int(before)
    if self._fresh:  # what was asked before the save asked for it
      self._agreed &= ~1
    self._fresh = False
    return self.signal is not None

  def saved(self) -> None:
    """Counts the minutes until a save is due from now."""
    self._since, self._fresh = time.monotonic(), True

  @property
  def save_is_due(self) -> bool:
    """Whether minutes have passed since the last save."""
    return bool(self._agreed & 1)

  @property
  def signal(self) -> signal.Signals | None:
    """What asked the run to stop."""
    number = self._agreed // 2
    return signal.Signals(number) if number else None

  def _number(self) -> int:
    number = int(self._caught[0]) if self._caught else 0
    waited = time.monotonic() - self._since
    due = self._save_seconds and waited > self._save_seconds
    due = due and hosts.is_first() and not self._saving()
    return 2 * number + int(bool(due))

  def _ask(self) -> jax.Array:
    number = self._number()
    return self._largest(
      jax.make_array_from_callback(
        (self._count,),
        self._votes,
        lambda _: np.full((1,), number, np.int32),
      )
    )
