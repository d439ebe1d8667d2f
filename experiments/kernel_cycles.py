"""Counts the cycles of the TPU kernel without a TPU; docs/tpu_kernel.json.

  python -m experiments.kernel_cycles

NOTHING HERE RAN ON A TPU. libtpu compiles the kernel for one and writes its
schedule, of which each bundle of instructions is taken for one cycle. `records`
holds, for each topology, head width and pass of a causal sequence,

  block, block_need: bundles for a block of queries and one of keys, below the
    diagonal, and the cycles that their products keep all matrix units busy;
  sequence, sequence_need: bundles for all of a sequence, and cycles for the
    products of the pairs that see each other;
  temporary_bytes: beyond arguments and results.

Where a need is more than the bundles, the matrix units are what is waited for.
"""

import collections
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import tempfile

from absl import flags
import jax
from jax import numpy as jnp
from jax.experimental import layout, topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import command, hardware
from longnet_jax import checked
from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import pallas_tpu

_OUTPUT = flags.DEFINE_string(
  "output", "docs/tpu_kernel.json", "where to write"
)

ROWS, SEGMENTS = 2048, 16
# Topologies whose four matrix units multiply 128 x 128 numbers a cycle each.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")
_PRODUCTS_A_CYCLE = 4 * 128 * 128
_PRODUCTS = {"forward": 2, "backward": 5}  # matrix products of two blocks


def main(_) -> None:
  """Compiles, counts and writes."""
  if importlib.util.find_spec("libtpu") is None:
    raise checked.RefusedError(
      "the TPU compiler is not here: pip install 'jax[tpu]'"
    )
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )
    records = [
      _measured(topology, width, which, pathlib.Path(folder))
      for topology in TOPOLOGIES
      for width in (128, 64)
      for which in _PRODUCTS
    ]
  record = {
    "command": command.line(),
    "hardware": {**hardware.describe(), "libtpu": _libtpu_version()},
    "note": "compiled, not run on a TPU: one bundle counts as one cycle",
    "sizes": pallas_tpu.SIZES._asdict(),
    "rows": ROWS,
    "records": records,
  }
  output = pathlib.Path(_OUTPUT.value)
  output.write_text(json.dumps(record, indent=1) + "\n")
  print(f"wrote {output}")


def compile_kernel(
  topology: str, width: int, which: str, dtype: str = "bfloat16"
) -> jax.stages.Compiled:
  """Compiles a pass for one chip; XLA chooses how arrays lie.

  Args:
    topology: such as v5e:2x2.
    width: of the heads, 768 / width of them.
    which: "forward" or "backward".
    dtype: of query, key and value.
  """
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = jax.make_mesh((1,), ("seq",), devices=devices[:1])
  placed = layout.Format(layout.Layout.AUTO, NamedSharding(mesh, P()))
  shape = 1, SEGMENTS * ROWS, 768 // width, width
  rows = jax.ShapeDtypeStruct(shape, dtype)
  lse = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
  arguments = [rows] * 3
  if which == "backward":
    arguments += rows, lse, rows

  def run(*arrays):
    function = getattr(kernels.load("pallas_tpu", "tpu"), which)
    cut = [x.reshape(1, SEGMENTS, ROWS, *x.shape[2:]) for x in arrays]
    if which == "backward":
      cut.append(None)
    cut.insert(3, kernels.Mask(is_causal=True))
    found = function(*cut, scale=width**-0.5)
    return [x.reshape(1, -1, *x.shape[3:]) for x in found]

  run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())
  run = jax.jit(run, in_shardings=placed, out_shardings=placed)
  return run.lower(*arguments).compile()


def _measured(topology, width, which, folder):
  """Returns a record; the folder is where libtpu writes its schedules."""
  for path in folder.iterdir():
    path.unlink()
  compiled = compile_kernel(topology, width, which)
  (path,) = folder.glob(f"*longnet_{which}*[0-9]-final_bundles.txt")
  tile, blocks, pair = _bundles(path.read_text())
  count = ROWS // pallas_tpu.SIZES.block
  products = _PRODUCTS[which] * width / _PRODUCTS_A_CYCLE
  record = {
    "topology": topology,
    "width": width,
    "pass": which,
    "block": pair,
    "block_need": math.ceil(products * pallas_tpu.SIZES.block**2),
    "sequence": tile + count * blocks + math.comb(count, 2) * pair,
    "sequence_need": math.ceil(products * math.comb(ROWS + 1, 2)),
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }
  print(record, flush=True)
  return record


def _bundles(text):
  """Returns the bundles of a tile, of a block of queries, and of two blocks.

  Each is a loop inside the one before it. A line is a bundle, and as many `>`
  as loops around it follow its number.
  """
  depths = re.findall(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]+)? *: *(>*)", text, re.M)
  found = collections.Counter(map(len, depths))
  if max(found) != 3:
    raise ValueError(f"loops are nested {max(found)} deep, not 3")
  return found[1], found[2], found[3]


def _libtpu_version():
  return importlib.metadata.version("libtpu")


if __name__ == "__main__":
  command.run(main)
