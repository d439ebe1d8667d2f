"""Whether a training step fits devices that nobody has to own, and its cost.

The step of `experiments.train` is compiled for a topology by the compiler of
the devices themselves, which need not be there; whether it fits is that
compiler's verdict, and bytes are its own. Time is an estimate, for TPUs alone:
the cycles that their compiler expects of everything outside kernels, kernels by
their FLOPs, and links by their bytes. `estimate.py` compiles nothing.
"""

import collections
import dataclasses
import math
import re
import time

import jax

from longnet_jax.analysis import collectives, costs, hlo
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.data import pipeline
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib

# Share of the matrix units' rate that kernels are taken to reach.
KERNEL_SHARE = 0.8
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
# "Used 20.1G of 15.7G hbm", or since it says so of temporaries alone "... HLO
# temporaries (25.1G) exceeds available HBM (15.7G)".
_USED = re.compile(
  r"(?:Used |temporaries \()([\d.]+)([KMGT])\)? "
  r"(?:of |exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a compiled step takes, of one device where nothing else is said.

  Attributes:
    topology: what it was compiled for.
    devices: how many that are.
    fits: whether there is room.
    peak_bytes: most memory at a time; of a step that is refused what the
      compiler says of it, which may be without its arguments, or None.
    limit_bytes: memory there is.
    host_bytes: what lies in the memory of the host instead, see `remat`.
    parameter_bytes: parameters, in float32.
    optimizer_bytes: their moments.
    model_flops: of a step over all devices, as published: without what is
      computed again.
    computed_flops: with it.
    collectives: kind, type and group -> bytes received in a step.
    unknown_loops: loops that were counted once.
    seconds: name -> estimated seconds of a step; None without an estimate.
    share_of_peak: model FLOPs over what the chips could do in that time.
    compile_seconds: CPU seconds of tracing and compiling; None of an estimate.
  """

  topology: str
  devices: int
  fits: bool
  peak_bytes: int | None
  limit_bytes: int
  host_bytes: int
  parameter_bytes: int
  optimizer_bytes: int
  model_flops: int
  computed_flops: int
  collectives: dict[tuple[str, str, int], int]
  unknown_loops: int
  seconds: dict[str, float] | None
  share_of_peak: float | None
  compile_seconds: float | None

  def to_dict(self) -> dict:
    """JSON-ready, for records."""
    received = [
      {"kind": kind, "dtype": dtype, "group": group, "bytes": size}
      for (kind, dtype, group), size in sorted(self.collectives.items())
    ]
    return {**dataclasses.asdict(self), "collectives": received}


def make(config: config_lib.ExperimentConfig, topology: str) -> Plan:
  """Compiles the train step of a config for a topology.

  Raises RefusedError where the config does not fit the mesh or the devices.
  """
  found = topology_lib.parse(topology)
  devices = topology_lib.find_devices(topology)
  mesh = mesh_lib.make_mesh(
    config.mesh.data, config.mesh.seq, config.mesh.model, devices
  )
  run_lib.check_mesh(config, mesh)
  start = time.process_time()
  with kernels.compiling_for(found.platform):
    update = run_lib.make_update(config, mesh)
    lowered = update.train_step.lower(
      update.abstract_state, _abstract_batch(config, mesh)
    )
    compiled, used = _compile(lowered)
  seconds = time.process_time() - start
  return _describe(
    config, found, mesh, update.abstract_state, compiled, used, seconds
  )


def _abstract_batch(config, mesh):
  batch = pipeline.abstract_batch(config.data, config.training.batch_size)
  where = sharding.batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch
  )


def _compile(lowered):
  """Returns what compiled, or None, and (bytes used, limit) if it did not."""
  try:
    return lowered.compile(), None
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    match = _USED.search(str(error))
    if not match:
      return None, (None, None)
    used, unit, limit, limit_unit = match.groups()
    return None, (
      int(float(used) * _UNITS[unit]),
      int(float(limit) * _UNITS[limit_unit]),
    )


def _describe(config, topology, mesh, state, compiled, used, compile_seconds):
  """Returns the `Plan` of a compiled step, or of a refused one."""
  chip, platform = topology.chip, topology.platform
  windows, window = config.training.batch_size, config.data.window
  model_flops = windows * costs.train_flops(config.model, window)
  received, unknown, seconds, share, host = {}, 0, None, None, 0
  peak, limit = used or (None, None)
  if compiled is not None:
    memory = compiled.memory_analysis()
    peak, host = memory.peak_memory_in_bytes, memory.host_temp_size_in_bytes
    text = compiled.as_text()
    program = hlo.read(text)
    unknown = program.unknown_loops
    received = _received(program)
    if chip.clock:
      seconds = _seconds(program, received, chip)
      share = model_flops / mesh.size / seconds["step"] / chip.peak_flops
  limit = limit or chip.hbm
  return Plan(
    topology=topology.name,
    devices=mesh.size,
    # Only compilers for TPUs refuse what is too large.
    fits=compiled is not None and peak <= limit,
    peak_bytes=peak,
    limit_bytes=limit,
    host_bytes=host,
    parameter_bytes=device_bytes(state.params),
    optimizer_bytes=device_bytes(state.opt_state),
    model_flops=model_flops,
    computed_flops=windows
    * costs.computed_flops(config.model, window, platform),
    collectives=received,
    unknown_loops=unknown,
    seconds=seconds,
    share_of_peak=share,
    compile_seconds=compile_seconds,
  )


def _received(program):
  """Returns (kind, type, group) -> bytes that a device receives in a step."""
  total = collections.Counter()
  for found, times in collectives.of_program(program):
    total[found[:3]] += found.received * times
  return dict(total)


def _seconds(program, received, chip):
  """Returns name -> seconds; nothing is taken to run beside anything else."""
  kernel_flops = sum(
    int(match[1]) * line.times
    for line in program.lines
    if (match := _KERNEL_FLOPS.search(line.text))
  )
  seconds = {
    "compiler": hlo.cycles(program) / chip.clock,
    "kernels": kernel_flops / (KERNEL_SHARE * chip.peak_flops),
    "links": sum(received.values()) / chip.links,
  }
  return {**seconds, "step": sum(seconds.values())}


def device_bytes(tree) -> int:
  """Returns the bytes of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
