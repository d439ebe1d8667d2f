"""What a record was measured on."""

import os
import platform

import jax


def describe() -> dict:
  """Returns the device and the versions, JSON-ready."""
  device = jax.devices()[0]
  name = device.device_kind
  if device.platform == "cpu":
    name = _cpu_name()
  return {
    "device": name,
    "backend": device.platform,
    "cpu_cores": os.cpu_count(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def _cpu_name():
  try:
    with open("/proc/cpuinfo") as lines:
      names = [x.split(":")[1].strip() for x in lines if "model name" in x]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()
