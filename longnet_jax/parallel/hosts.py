"""Many processes as one: start-up, agreement and leaving together.

One process runs on each host (on each GPU under SLURM) and all of them run the
same program. Everything here does nothing in a process that is alone.
"""

from collections.abc import Mapping
import hashlib
import os
import re
import sys
import time
import typing

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

from longnet_jax import checked
from longnet_jax.parallel import joining, liveness

# The end of a process that has lost another one.
LOST = 5
# What Gloo, NCCL, gRPC and JAX's coordination say of a process that has gone.
_GONE = re.compile(
  r"Gloo|gloo/|NCCL (operation|communicator)|nccl(Remote|System)Error"
  r"|remote process exited|[Cc]oordination ?[Ss]ervice|heartbeat"
  r"|Connection (reset|closed|refused)|Socket closed|[Bb]arrier timed out"
)
# Seconds to wait for the others at the start, unless told otherwise.
JOIN_TIMEOUT = 300
# Seconds that a failed process 0 gives the others to fail in the same way.
_PATIENCE = 5
# CPU devices that a process makes in seconds.
_MOST_FAKE = 4096
_watches = []  # of the other processes, once all have come

LostError = liveness.LostError


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  fake_devices: int | None = None,
  join_timeout: int = JOIN_TIMEOUT,
) -> None:
  """Joins this process to the others; call it before anything uses a device.

  With no arguments a TPU pod and a SLURM step of several tasks say themselves
  who takes part, and any other process is alone. Under SLURM each task gets the
  GPU of its local number, or all GPUs of its node where it is the only task.

  Args:
    coordinator: HOST:PORT on which process 0 can be reached by the others.
    num_processes: how many there are; 1 alone keeps a process from joining.
    process_id: this one's number, from 0.
    fake_devices: this many CPU devices in each process, to try a mesh out.
    join_timeout: seconds until a process that has not come is given up.

  Raises:
    ValueError: arguments that do not belong together, or a port that is taken.
    LostError: some process did not come in time.
  """
  joining.check_arguments(coordinator, num_processes, process_id)
  if join_timeout < 1:
    raise checked.RefusedError(
      f"join_timeout is {join_timeout}; choose 1 or more seconds"
    )
  if fake_devices is not None:
    if not 1 <= fake_devices <= _MOST_FAKE:
      checked.refuse("fake_devices", fake_devices, f"in 1..{_MOST_FAKE}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", fake_devices)
  if coordinator is not None:
    found = {
      "coordinator_address": coordinator,
      "num_processes": num_processes,
      "process_id": process_id,
      "cluster_detection_method": "deactivate",
    }
  else:
    found = None if num_processes == 1 else joining.find()
  if found is None:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # CPU collectives of several computations in flight wait for one another.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # Its handler would swallow a SIGTERM during start-up.
  jax.config.update("jax_enable_preemption_service", False)
  joining.join(found, coordinator, join_timeout)
  store, process = distributed.global_state.client, jax.process_index()
  _watches.append(liveness.Liveness(store, process, _leave_lost))


def is_first() -> bool:
  """Whether this is the process that prints and writes records."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when every process has come to the place called `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(array) -> np.ndarray:
  """The arrays of all processes, (processes, ...), on each of them."""
  if jax.process_count() == 1:
    return np.asarray(array)[None]
  return np.asarray(multihost_utils.process_allgather(np.asarray(array)))


def texts(text: str) -> list[str]:
  """The texts of all processes on each of them, at most 500 bytes of each."""
  if jax.process_count() == 1:
    return [text]
  row = np.frombuffer(text.encode()[:500].ljust(500), np.uint8)
  rows = gather(row)
  return [row.tobytes().decode(errors="ignore").rstrip() for row in rows]


def text_of_first(text: str) -> str:
  """The text of the first process on each of them, at most 500 bytes of it."""
  return texts(text)[0]


def check_equal(values: Mapping[str, str]) -> None:
  """Raises ValueError on every process unless all have the same texts."""
  digests = [hashlib.sha256(text.encode()).digest() for text in values.values()]
  table = np.array([np.frombuffer(d, np.uint8) for d in digests])
  tables = gather(table)
  differs = (tables != tables[0]).any(axis=-1)
  for process, row in enumerate(differs):
    names = [n for n, differ in zip(values, row, strict=True) if differ]
    if names:
      raise checked.RefusedError(
        f"process {process} and process 0 differ in their {', '.join(names)}; "
        "give every host the same command and the same files"
      )


def lost_another(error: BaseException | None) -> bool:
  """Whether an error, or what it came from, is a process that has gone.

  Only the text tells: of one collective JAX raises a ValueError, of another a
  JaxRuntimeError, and writing a checkpoint wraps either.
  """
  while error is not None:
    if _GONE.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def leave(code: int) -> typing.NoReturn:
  """Ends a process that failed, at once.

  Processes that did not fail would wait for it in a collective for ever: its
  end tells them. The end of process 0 aborts all, so that it lets the others
  go first.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  # Before all have come, asking who is first would wait for them.
  if _watches and jax.process_index() == 0:
    time.sleep(_PATIENCE)
  # Not sys.exit: what runs at exit waits for processes that do not come, and
  # for threads of a failed save.
  os._exit(code)


def _leave_lost(who: str) -> None:
  text = f"{who} has not been heard of for {liveness.PATIENCE:.0f} seconds: "
  print(f"error: {text}{LostError()}", file=sys.stderr)
  leave(LOST)
