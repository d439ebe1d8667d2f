"""Checks sequence parallelism on fake devices and writes what it found.

  python -m experiments.check_parallel
  python -m experiments.check_parallel --topology=v5e:4x4

The first writes docs/parallel.json: `errors`, case x mesh -> the largest
relative error of attention and of a whole model's loss and gradients; `bytes`,
what each collective of an attention layer brings to a device, by formula and
in the compiled program; `scaling`, the same with the compilation's CPU seconds
at fixed tokens a device. The second compiles layers of real size for a TPU pod
and writes their `bytes`; it needs libtpu, but no TPU.
"""

import importlib.util
import itertools
import json
import os
import pathlib

from absl import flags
import jax
from jax.experimental import topologies

from experiments import command, communication, equality, hardware
from longnet_jax import checked
from longnet_jax.parallel import mesh as mesh_lib

_OUTPUT = flags.DEFINE_string(
  "output", None, "where to write; by default docs/parallel[_TOPOLOGY].json"
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
  if _TOPOLOGY.value:
    name, found = _TOPOLOGY.value, _pod(_TOPOLOGY.value)
    output = f"docs/parallel_{name.partition(':')[0]}.json"
  else:
    output, found = "docs/parallel.json", _fake_devices()
  record = {
    "command": command.line(),
    "hardware": hardware.describe(),
    **found,
  }
  output = pathlib.Path(_OUTPUT.value or output)
  output.write_text(json.dumps(record, indent=1) + "\n")
  print(f"wrote {output}")


def _fake_devices():
  """Returns the tables for eight fake devices."""
  # Most of the time is compilation; unoptimised code halves it.
  extra = " --xla_backend_optimization_level=0"
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + extra
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  scaling = [_scaled(devices) for devices in (1, 2, 4, 8)]
  layers = [_measured(layer) for layer in LAYERS]
  errors = {}
  for case, is_causal in itertools.product(equality.CASES, (True, False)):
    kind = "causal" if is_causal else "bidirectional"
    errors[f"{case}, {kind}"] = {
      _name(sizes): equality.attention_error(
        case, is_causal, mesh_lib.make_mesh(*sizes)
      )
      for sizes in ATTENTION_MESHES
    }
    print(case, kind, errors[f"{case}, {kind}"], flush=True)
  for core in ("dilated", "sparse"):
    wanted = equality.model_loss(core, mesh_lib.make_mesh())
    errors[f"model, {core}"] = {
      _name(sizes): equality.largest_error(
        equality.model_loss(core, mesh_lib.make_mesh(*sizes)), wanted
      )
      for sizes in MODEL_MESHES
    }
    print(core, errors[f"model, {core}"], flush=True)
  return {"scaling": scaling, "bytes": layers, "errors": errors}


def _name(sizes):
  return " x ".join(map(str, sizes))


def _measured(layer, devices=None):
  """Returns a layer and the rows of its table."""
  compiled = communication.compile_layer(layer, devices)
  rows = communication.table(layer, compiled)
  for row in rows:
    print(row, flush=True)
  return {
    **layer._asdict(),
    "rows": rows,
    "compile_cpu_seconds": compiled.cpu_seconds,
  }


def _scaled(devices):
  """Returns the table with one branch inside a shard, of two shards, of all."""
  length = SHARD * devices
  branches = [(SHARD, 1)]
  if devices > 1:
    branches.append((2 * SHARD, 2))
  if devices > 2:
    branches.append((length, devices))
  return _measured(communication.Layer(length, devices, tuple(branches)))


def _pod(topology):
  """Returns the tables for layers of real size on a pod."""
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
  layers = [
    communication.Layer(
      length, len(devices), branches, heads, width, "bfloat16"
    )
    for heads, width in ((6, 128), (12, 64))
  ]
  return {
    "topology": topology,
    "device": devices[0].device_kind,
    "bytes": [_measured(layer, devices) for layer in layers],
  }


if __name__ == "__main__":
  command.run(main)
