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
import socket
import sys
import threading
import time
import typing

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

from longnet_jax import checked
from longnet_jax.parallel import liveness

# The end of a process that has lost another one.
LOST = 5
# What Gloo, NCCL, gRPC and JAX's coordination say of a process that has gone.
_GONE = re.compile(
  r"Gloo|gloo/|NCCL (operation|communicator)|nccl(Remote|System)Error"
  r"|remote process exited|[Cc]oordination ?[Ss]ervice|heartbeat"
  r"|Connection (reset|closed|refused)|Socket closed|[Bb]arrier timed out"
)
# What JAX reads in a task of a SLURM step.
_SLURM = (
  "SLURM_STEP_NODELIST",
  "SLURM_PROCID",
  "SLURM_LOCALID",
  "SLURM_JOB_ID",
)
# Seconds to wait for the others at the start, unless told otherwise.
JOIN_TIMEOUT = 300
# Seconds that a failed process 0 gives the others to fail in the same way.
_PATIENCE = 5
_watches = []  # of the other processes, once all have come


class LostError(RuntimeError):
  """Another process of the run has ended, or never came."""

  def __init__(self, text: str = ""):
    super().__init__(
      text
      or "another process of this run has ended; see what it said, then start "
      "all again: they go on from the last checkpoint"
    )


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
  _check_arguments(coordinator, num_processes, process_id)
  if join_timeout < 1:
    raise checked.RefusedError(
      f"join_timeout is {join_timeout}; choose 1 or more seconds"
    )
  if fake_devices is not None:
    if fake_devices < 1:
      raise checked.RefusedError(
        f"fake_devices is {fake_devices}; choose 1 or more"
      )
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
  _join(found, coordinator, join_timeout)
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


def _join(found: dict, coordinator: str | None, timeout: int) -> None:
  """Runs jax.distributed.initialize, which past its timeout would abort."""
  where = coordinator or "what the TPU pod or SLURM names"
  advice = (
    "start all processes, with an address and a free port of process 0 that "
    "every host reaches, or give --num_processes=1 to run alone"
  )
  if coordinator is not None:
    _check_port(coordinator, found["process_id"], timeout, advice)
  errors = []

  def initialize():
    try:
      jax.distributed.initialize(**found, initialization_timeout=10 * timeout)
    except Exception as error:
      errors.append(error)

  joining = threading.Thread(target=initialize, daemon=True)
  joining.start()
  joining.join(timeout)
  if joining.is_alive():
    raise LostError(
      f"not all processes have come to {where} in {timeout} seconds "
      f"(--join_timeout); {advice}"
    )
  if errors:
    raise checked.RefusedError(
      f"cannot join the other processes at {where}: {_first_line(errors[0])}; "
      f"{advice}"
    ) from errors[0]


def _check_port(coordinator, process_id, timeout, advice):
  """Raises unless process 0 can listen, or the others can reach it in time."""
  host, _, port = coordinator.rpartition(":")
  address = (host.strip("[]"), int(port))
  if process_id == 0:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else 0) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(("", address[1]))
      except OSError as error:
        raise checked.RefusedError(
          f"port {port} of {coordinator} cannot be used by process 0 "
          f"({error.strerror}); choose another for all processes"
        ) from error
    return
  stop = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection(address, timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > stop:
        raise LostError(
          f"process 0 has not answered at {coordinator} for {timeout} seconds "
          f"({error.strerror or error}); {advice}"
        ) from error
      time.sleep(0.2)


def _leave_lost(who: str) -> None:
  text = f"{who} has not been heard of for {liveness.PATIENCE:.0f} seconds: "
  print(f"error: {text}{LostError()}", file=sys.stderr)
  leave(LOST)


def _check_arguments(coordinator, num_processes, process_id):
  if num_processes is not None and num_processes < 1:
    raise checked.RefusedError(
      f"num_processes is {num_processes}; choose 1 or more"
    )
  if coordinator is None and process_id is None and num_processes in (None, 1):
    return
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if missing:
    raise checked.RefusedError(
      f"{' and '.join(missing)} not given; --coordinator=HOST:PORT, "
      "--num_processes=N and --process_id=I go together, or leave all out on "
      "a TPU pod, under SLURM and on one machine"
    )
  if not 0 <= process_id < num_processes:
    raise checked.RefusedError(
      f"process_id is {process_id}; choose 0 to {num_processes - 1}, as "
      f"num_processes is {num_processes}"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise checked.RefusedError(
      f"coordinator is {checked.shown(coordinator)}; give the host of process "
      "0 and a free port, such as 10.0.0.1:8476"
    )


def _found() -> dict | None:
  """Arguments of jax.distributed.initialize, or None where it is not needed."""
  environment = os.environ
  if _slurm_tasks(environment) > 1:
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


def _slurm_tasks(environment: Mapping[str, str]) -> int:
  """Tasks of the SLURM step that this process is one of; 1 outside of a step.

  Of variables that were left by another shell only some are there.
  """
  text = environment.get("SLURM_NTASKS", "1")
  present = [name for name in _SLURM if environment.get(name)]
  if not text.isdigit() or int(text) == 1 or len(present) < 2:
    return 1
  missing = [name for name in _SLURM if name not in present]
  if missing:
    raise checked.RefusedError(
      f"SLURM_NTASKS is {text} and {', '.join(missing)} not set: start with "
      "srun, or give --num_processes=1 to run alone"
    )
  return int(text)


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
