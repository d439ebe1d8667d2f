"""Many processes as one: start-up, agreement and leaving together.

One process runs on each host (on each GPU under SLURM) and all of them run the
same program. Everything here does nothing in a process that is alone.
"""

from collections.abc import Mapping
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import time
import typing

import jax
from jax.experimental import multihost_utils
import numpy as np

# Seconds that a failed process 0 gives the others to fail in the same way.
_PATIENCE = 5


class LostError(RuntimeError):
  """Another process of the run has ended."""


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  fake_devices: int | None = None,
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

  Raises:
    ValueError: arguments that do not belong together, or nobody answered.
  """
  _check_arguments(coordinator, num_processes, process_id)
  if fake_devices is not None:
    if fake_devices < 1:
      raise ValueError(f"fake_devices is {fake_devices}; choose 1 or more")
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
    found = None if num_processes == 1 else _found()
  if found is None:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # CPU collectives of several computations in flight wait for one another.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # Its handler would swallow a SIGTERM during start-up.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(**found)
  except (RuntimeError, ValueError, OSError) as error:
    where = coordinator or "what the TPU pod or SLURM names"
    raise ValueError(
      f"cannot join the other processes at {where}: {_first_line(error)}; "
      "start all processes, with an address and a free port of process 0 that "
      "every host reaches, or give --num_processes=1 to run alone"
    ) from error


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


def text_of_first(text: str) -> str:
  """The text of the first process on each of them, at most 500 bytes of it."""
  if jax.process_count() == 1:
    return text
  row = np.frombuffer(text.encode()[:500].ljust(500), np.uint8)
  return gather(row)[0].tobytes().decode(errors="ignore").rstrip()


def check_equal(values: Mapping[str, str]) -> None:
  """Raises ValueError on every process unless all have the same texts."""
  digests = [hashlib.sha256(text.encode()).digest() for text in values.values()]
  table = np.array([np.frombuffer(d, np.uint8) for d in digests])
  tables = gather(table)
  differs = (tables != tables[0]).any(axis=-1)
  for process, row in enumerate(differs):
    names = [n for n, differ in zip(values, row, strict=True) if differ]
    if names:
      raise ValueError(
        f"process {process} and process 0 differ in their {', '.join(names)}; "
        "give every host the same command and the same files"
      )


def lost_another(error: BaseException) -> bool:
  """Whether an error says that the connection to a process has broken."""
  return isinstance(error, jax.errors.JaxRuntimeError) and bool(
    re.search(r"[Gg]loo|coordination|heartbeat|[Cc]onnection|peer", str(error))
  )


def leave(code: int) -> typing.NoReturn:
  """Ends a process that failed, at once.

  Processes that did not fail would wait for it in a collective for ever: its
  end tells them. The end of process 0 aborts all, so that it lets the others
  go first.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.distributed.is_initialized() and jax.process_index() == 0:
    time.sleep(_PATIENCE)
  # Not sys.exit: what runs at exit waits for processes that do not come, and
  # for threads of a failed save.
  os._exit(code)


def _check_arguments(coordinator, num_processes, process_id):
  if num_processes is not None and num_processes < 1:
    raise ValueError(f"num_processes is {num_processes}; choose 1 or more")
  if coordinator is None and process_id is None and num_processes in (None, 1):
    return
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} not given; --coordinator=HOST:PORT, "
      "--num_processes=N and --process_id=I go together, or leave all out on "
      "a TPU pod, under SLURM and on one machine"
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"process_id is {process_id}; choose 0 to {num_processes - 1}, as "
      f"num_processes is {num_processes}"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(
      f"coordinator is {coordinator!r}; give the host of process 0 and a free "
      "port, such as 10.0.0.1:8476"
    )


def _found() -> dict | None:
  """Arguments of jax.distributed.initialize, or None where it is not needed."""
  environment = os.environ
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and (
    "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment
  ):
    found = {"cluster_detection_method": "slurm"}
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    # JAX takes one GPU a task, which here would leave the others idle.
    if re.fullmatch(r"1(\(x\d+\))?", per_node) and gpus.isdigit():
      found["local_device_ids"] = list(range(int(gpus)))
    return found
  platforms = environment.get("JAX_PLATFORMS", "")
  if jax.config.jax_platforms == "cpu" or platforms == "cpu":
    return None
  devices = pathlib.Path("/dev")
  chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
  if chips and importlib.util.find_spec("libtpu"):
    return {}
  return None


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
