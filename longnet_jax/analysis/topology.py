"""Devices that need not exist: what names mean, and compiling for them."""

import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from longnet_jax import checked
from longnet_jax.analysis import chips

EXAMPLES = ("v4:4x4x8", "v5e:16x16", "v5p:8x8x16", "v6e:16x16", "h100:8")
# Name: part of JAX's `device_kind`, and axes of the torus that joins them.
_KINDS = {
  "v4": ("TPU v4", 3),
  "v5e": ("TPU v5e", 2),
  "v5p": ("TPU v5", 3),
  "v6e": ("TPU v6", 2),
  "h100": ("H100", 1),
}
_ASKS_NOBODY = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
# What the compiler asks about a GPU, by the data sheet of an H100 SXM.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000  device_memory_size: 85899345920
  l2_cache_size: 52428800
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  threads_per_warp: 32  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Topology(NamedTuple):
  """What a name such as v5p:8x8x16 stands for.

  name: as it was given.
  platform: "tpu" or "gpu".
  chip: one of its devices, by its data sheet.
  devices: how many there are.
  """

  name: str
  platform: str
  chip: chips.Chip
  devices: int


def parse(name: str) -> Topology:
  """Returns what is known of a topology, or raises RefusedError."""
  kind, _, sizes = name.partition(":")
  chip, axes = _KINDS.get(kind, (None, 0))
  if not chip or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
    raise _unknown(name, "no such topology")
  sizes = [int(size) for size in sizes.split("x")]
  if len(sizes) != axes:
    raise _unknown(name, f"{kind} has {axes} axes")
  platform = "gpu" if kind == "h100" else "tpu"
  return Topology(name, platform, chips.named(chip), math.prod(sizes))


def find_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a topology, for its compiler.

  Raises RefusedError where it is not known, or the compiler is not installed.
  """
  found = parse(name)
  if found.platform == "gpu":
    return _gpus(found.devices)
  # A compiler, not a driver: it asks no machine, and shares the library.
  for variable, value in _ASKS_NOBODY.items():
    os.environ.setdefault(variable, value)
  # One device a chip, as on a pod; others are so anyway.
  v4 = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **v4
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise _unknown(name, str(error).partition(": ")[2]) from None
  except RuntimeError:
    raise checked.RefusedError(
      "the TPU compiler is not installed: pip install -e '.[tpu]' brings it, "
      "and needs no TPU"
    ) from None
  return list(devices)


def _gpus(count):
  """Returns H100s of one host."""
  try:
    devices = topologies.get_topology_desc(
      platform="cuda", target_config=_H100, topology=f"1x1x{count}"
    ).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise checked.RefusedError(
      "XLA's compiler for CUDA is not installed: pip install -e '.[cuda]' "
      "brings it, and needs no GPU"
    ) from error
  return list(devices)


def _unknown(name, why):
  return checked.RefusedError(
    f"topology is {name!r}: {why}; use one such as {', '.join(EXAMPLES)}"
  )
