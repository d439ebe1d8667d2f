"""The mesh of devices: axes data (batch), seq (positions), model (heads)."""

import math

import jax
from jax.sharding import AxisType

from longnet_jax import checked

AXES = ("data", "seq", "model")


def make_mesh(
  data: int = 1, seq: int = 1, model: int = 1, devices=None
) -> jax.sharding.Mesh:
  """A data x seq x model mesh over the first devices, or those given.

  Raises ValueError where there are fewer devices than the product, or where a
  process would have none in the mesh.
  """
  devices = jax.devices() if devices is None else devices
  shape = (data, seq, model)
  needed = check_count(shape, len(devices))
  idle = {d.process_index for d in devices[needed:]} - {
    d.process_index for d in devices[:needed]
  }
  if idle:
    raise checked.RefusedError(
      f"mesh data x seq x model = {data} x {seq} x {model} leaves process "
      f"{min(idle)} without a device; choose sizes whose product is "
      f"{len(devices)}"
    )
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:needed],
  )


def check_count(shape: tuple[int, int, int], devices: int) -> int:
  """Returns the devices of a mesh; raises ValueError where there are fewer."""
  needed = math.prod(shape)
  if needed > devices:
    data, seq, model = shape
    raise checked.RefusedError(
      f"mesh data x seq x model = {data} x {seq} x {model} needs {needed} "
      f"devices and there are {devices}; choose sizes whose product is "
      f"at most {devices}"
    )
  return needed
