"""Names the host that waited longest for its input: the others wait for it.

Of a step that all devices take together every host measures the same time;
only what comes before it differs.
"""

import socket

import jax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from longnet_jax.parallel import hosts


class Slowest:
  """Compares the hosts of a mesh; all of them call the same methods."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._processes = [device.process_index for device in mesh.devices.flat]
    self._names = hosts.texts(socket.gethostname())
    self._own = NamedSharding(mesh, P(mesh.axis_names))
    everywhere = NamedSharding(mesh, P())
    self._gather = jax.jit(lambda x: x, out_shardings=everywhere)
    self._before = 0.0

  def ask(self, total: float) -> Array:
    """Seconds of each device's host since the last call.

    `total` are those of this host since the start. The answer is computed
    behind the step and nothing waits for it: read it with the step's metrics.
    """
    seconds, self._before = total - self._before, total
    return self._gather(
      jax.make_array_from_callback(
        (len(self._processes),),
        self._own,
        lambda _: np.full((1,), seconds, np.float32),
      )
    )

  def values(self, seconds: np.ndarray) -> dict[str, int | float | str]:
    """What a record says of an answer."""
    device = int(np.argmax(seconds))
    process = self._processes[device]
    return {
      "slowest_process": process,
      "slowest_host": self._names[process],
      "slowest_input_seconds": float(seconds[device]),
    }
