"""Signals that stop a run, on every process after the same step."""

from collections.abc import Iterator
import contextlib
import signal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np


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
  """Whether any process has caught a signal, the same answer on all.

  Several processes ask the devices, with a reduction of one number behind each
  step, and read the answer a step later: nothing waits for it.
  """

  def __init__(self, mesh: jax.sharding.Mesh, caught: list[signal.Signals]):
    self._caught = caught
    self._votes = NamedSharding(mesh, P(mesh.axis_names))
    self._count = mesh.size
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    self._asked = None
    self._agreed = None

  def after_step(self) -> bool:
    """Whether to stop; every process calls it once, after each step."""
    if jax.process_count() > 1:
      before, self._asked = self._asked, self._ask()
      number = 0 if before is None else int(before)
      self._agreed = signal.Signals(number) if number else None
    return self.signal is not None

  @property
  def signal(self) -> signal.Signals | None:
    """What asked the run to stop."""
    if jax.process_count() > 1:
      return self._agreed
    return self._caught[0] if self._caught else None

  def _ask(self) -> jax.Array:
    number = int(self._caught[0]) if self._caught else 0
    return self._largest(
      jax.make_array_from_callback(
        (self._count,),
        self._votes,
        lambda _: np.full((1,), number, np.int32),
      )
    )
