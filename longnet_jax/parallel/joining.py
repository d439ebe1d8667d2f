"""How a process finds the others of its run, and waits for them."""

from collections.abc import Mapping
import importlib.util
import os
import pathlib
import re
import socket
import threading
import time

import jax

from longnet_jax import checked
from longnet_jax.parallel import liveness

# What JAX reads in a task of a SLURM step.
_SLURM = (
  "SLURM_STEP_NODELIST",
  "SLURM_PROCID",
  "SLURM_LOCALID",
  "SLURM_JOB_ID",
)


def check_arguments(coordinator, num_processes, process_id):
  """Raises RefusedError for flags that do not belong together."""
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


def find() -> dict | None:
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


def join(found: dict, coordinator: str | None, timeout: int) -> None:
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
    raise liveness.LostError(
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
        raise liveness.LostError(
          f"process 0 has not answered at {coordinator} for {timeout} seconds "
          f"({error.strerror or error}); {advice}"
        ) from error
      time.sleep(0.2)


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
