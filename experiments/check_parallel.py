"""Checks sequence parallelism on fake devices and writes what it found.

  python -m experiments.check_parallel
  python -m experiments.check_parallel --topology=v5e:4x4

The first writes runs/parallel/parallel.json, anew after each case, so that it
holds what was found whenever it ends: `errors`, case x mesh -> the largest
relative error of attention and of a whole model's loss and gradients; `bytes`,
what each collective of an attention layer brings to a device, by formula and
in the compiled program; `scaling`, the same with the compilation's CPU seconds
at fixed tokens a device. The second compiles layers of real size for a TPU pod
and writes their `bytes`; it needs libtpu, but no TPU.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib

from absl import flags
import jax
from jax.experimental import topologies

from experiments import command, communication, equality, hardware, progress
from longnet_jax import checked, storage
from longnet_jax.parallel import mesh as mesh_lib

_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "where to write; by default runs/parallel/parallel[_TOPOLOGY].json",
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "a TPU pod to compile for, such as v5e:4x4 or v5p:2x2x4"
)

# data, seq, model; attention has 2 examples and as few as 2 key heads.
ATTENTION_MESHES = ((1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))
MODEL_MESHES = tuple(
  sizes
  for sizes in itertools.product((1, 2, 4, 8), repeat=3)
  if sizes[0] * sizes[1] * sizes[2] == 8
)
# T doubles with w / r fixed, then with the devices; then segments that no
# group of devices matches.
LAYERS = (
  communication.Layer(64, 8, ((8, 1), (16, 2), (64, 8))),
  communication.Layer(128, 8, ((16, 2), (32, 4), (128, 16))),
  communication.Layer(256, 8, ((32, 4), (64, 8), (256, 32))),
  communication.Layer(64, 8, ((24, 3),)),
)
SHARD = 256  # positions a device when only the devices grow
_POD_SHARD = 2048


def main(_) -> None:
  """Builds the tables and writes them."""
  topology = _TOPOLOGY.value
  name = f"parallel_{topology.partition(':')[0]}" if topology else "parallel"
  output = pathlib.Path(_OUTPUT.value or f"runs/parallel/{name}.json")
  output.parent.mkdir(parents=True, exist_ok=True)
  shown = progress.Progress()
  record = {}
  for found in _pod(topology, shown) if topology else _fake_devices(shown):
    shown.clear()
    # Once devices are set up, which asking for them would prevent.
    record = record or {
      "command": command.line(),
      "hardware": hardware.describe(),
    }
    record |= command.rounded(found)
    storage.write_whole(output, json.dumps(record, indent=1) + "\n")
  print(f"wrote {output}")


def _fake_devices(shown):
  """Yields the tables for eight fake devices as they grow."""
  # Most of the time is compilation; unoptimised code halves it.
  extra = " --xla_backend_optimization_level=0"
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + extra
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  scaling, layers, errors = [], [], {}
  for devices in (1, 2, 4, 8):
    scaling.append(_scaled(devices, shown))
    yield {"scaling": scaling}
  for layer in LAYERS:
    layers.append(_measured(layer, shown))
    yield {"bytes": layers}
  for case, is_causal in itertools.product(equality.CASES, (True, False)):
    name = f"{case}, {'causal' if is_causal else 'bidirectional'}"
    errors[name] = _errors(
      name,
      ATTENTION_MESHES,
      functools.partial(equality.attention_error, case, is_causal),
      shown,
    )
    yield {"errors": errors}
  for core in ("dilated", "sparse"):
    shown.show(f"model, {core} on one device")
    wanted = equality.model_loss(core, mesh_lib.make_mesh())
    errors[f"model, {core}"] = _errors(
      f"model, {core}",
      MODEL_MESHES,
      functools.partial(_model_error, core, wanted),
      shown,
    )
    yield {"errors": errors}


def _model_error(core, wanted, mesh):
  return equality.largest_error(equality.model_loss(core, mesh), wanted)


def _errors(name, meshes, error, shown):
  """Returns mesh -> error of one case, and prints them."""
  found = {}
  for sizes in meshes:
    mesh = " x ".join(map(str, sizes))
    shown.show(f"{name} on {mesh}")
    found[mesh] = error(mesh_lib.make_mesh(*sizes))
  shown.clear()
  listed = ", ".join(f"{mesh}: {value:.1e}" for mesh, value in found.items())
  print(f"{name}: {listed}", flush=True)
  return found


def _measured(layer, shown, devices=None):
  """Returns a layer and the rows of its table."""
  shown.show(f"compiling {layer.length:,} tokens on {layer.devices} devices")
  compiled = communication.compile_layer(layer, devices)
  rows = communication.table(layer, compiled)
  shown.clear()
  for row in rows:
    print(
      f"{row['pass']:<9}{row['kind']:<15}{row['dtype']:<5}groups of "
      f"{row['group']}: {row['measured']:,} bytes, by formula "
      f"{row['formula']:,}",
      flush=True,
    )
  return {
    **layer._asdict(),
    "rows": rows,
    "compile_cpu_seconds": compiled.cpu_seconds,
  }


def _scaled(devices, shown):
  """Returns the table with one branch inside a shard, of two shards, of all."""
  length = SHARD * devices
  branches = [(SHARD, 1)]
  if devices > 1:
    branches.append((2 * SHARD, 2))
  if devices > 2:
    branches.append((length, devices))
  return _measured(communication.Layer(length, devices, tuple(branches)), shown)


def _pod(topology, shown):
  """Yields the tables for layers of real size on a pod."""
  if importlib.util.find_spec("libtpu") is None:
    raise checked.RefusedError(
      f"--topology={topology} needs the TPU compiler: pip install 'jax[tpu]'"
    )
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  jax.config.update("jax_platforms", "cpu")
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except (RuntimeError, ValueError) as error:
    raise checked.RefusedError(
      f"--topology={topology} is not one that libtpu knows; try v5e:4x4"
    ) from error
  length = _POD_SHARD * len(devices)
  branches = ((2048, 1), (4 * 2048, 4), (length, len(devices)))
  layers = []
  for heads, width in ((6, 128), (12, 64)):
    layer = communication.Layer(
      length, len(devices), branches, heads, width, "bfloat16"
    )
    layers.append(_measured(layer, shown, devices))
    yield {
      "topology": topology,
      "device": devices[0].device_kind,
      "bytes": layers,
    }


if __name__ == "__main__":
  command.run(main)
