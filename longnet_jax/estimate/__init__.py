"""What a training step takes, by arithmetic: a `plan.Plan` without a compiler.

Counted are the arrays that `models/transformer.py` and `training/loss.py` make,
in rows of one device: those that are held at a time (`memory.py`), those that
go through memory (`seconds.py`), and those that are sent (`links.py`).
"""

import dataclasses
import functools

import jax
from jax.sharding import AxisType

from longnet_jax import checked, plan
from longnet_jax.analysis import costs
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.estimate import links, memory, seconds
from longnet_jax.estimate import rows as rows_lib
from longnet_jax.models import transformer
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.training import config as config_lib
from longnet_jax.training import optimizer as optimizer_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import state as state_lib


def make(config: config_lib.ExperimentConfig, topology: str) -> plan.Plan:
  """Estimates the train step of a config on a topology.

  Raises RefusedError as `make_mesh`, or where attention is sparse, which is
  left to the compiler.
  """
  found = topology_lib.parse(topology)
  mesh = make_mesh(config, found)
  if config.model.attention == "sparse":
    raise checked.RefusedError(
      "model.attention is 'sparse', which only a compiler can plan: leave out "
      "--estimate and --search=mesh"
    )
  # Neither changes a shape.
  model = dataclasses.replace(config.model, remat="none", ffn_chunk=0)
  state = _state(model, config.optimizer)
  with kernels.compiling_for(found.platform):
    state = run_lib.with_shardings(state, mesh)
  return _describe(config, found, mesh, state)


def make_mesh(
  config: config_lib.ExperimentConfig, topology: topology_lib.Topology
) -> jax.sharding.AbstractMesh:
  """Returns the mesh of a config, without devices.

  Raises RefusedError where the config does not fit it, or there are fewer.
  """
  sizes = tuple(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
  mesh_lib.check_count(sizes, topology.devices)
  mesh = jax.sharding.AbstractMesh(
    sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes)
  )
  run_lib.check_mesh(config, mesh)
  return mesh


@functools.lru_cache(1)
def _state(model, optimizer):
  """Returns the abstract `TrainState`."""
  optimizer = optimizer_lib.make_optimizer(optimizer)
  model = transformer.LongNetLM(model)
  return jax.eval_shape(lambda: state_lib.init_state(model, optimizer, 0))


def _describe(config, topology, mesh, state):
  """Returns the `Plan` of a config that fits the mesh."""
  chip, platform = topology.chip, topology.platform
  windows, window = config.training.batch_size, config.data.window
  rows = rows_lib.of_device(config, mesh)
  received = links.received(config, platform, mesh, rows, state.params)
  times = seconds.of_step(config, chip, platform, mesh, rows, received)
  peak, host = memory.peak_and_host(config, platform, mesh, rows, state)
  model_flops = windows * costs.train_flops(config.model, window)
  step = mesh.size * times["step"] * chip.peak_flops
  return plan.Plan(
    topology=topology.name,
    devices=mesh.size,
    fits=peak <= chip.hbm,
    peak_bytes=peak,
    limit_bytes=chip.hbm,
    host_bytes=host,
    parameter_bytes=plan.device_bytes(state.params),
    optimizer_bytes=plan.device_bytes(state.opt_state),
    model_flops=model_flops,
    computed_flops=windows
    * costs.computed_flops(config.model, window, platform),
    collectives=received,
    unknown_loops=0,
    seconds=times,
    share_of_peak=model_flops / step,
    compile_seconds=None,
  )
