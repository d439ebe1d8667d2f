"""What a layer of sharded attention sends: by formula, and as compiled.

Forward and backward are compiled apart, for fake devices or for a pod that
nobody has to own, and their collectives are read from the compiled text.
"""

import collections
from collections.abc import Sequence
import functools
import time
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longnet_jax.analysis import collectives
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence


class Layer(NamedTuple):
  """Attention of one layer, causal, split along seq over all devices.

  length: positions over all devices.
  devices: how many there are.
  branches: (w, r) of each.
  heads: query and key heads.
  width: of a head.
  dtype: of query, key and value.
  """

  length: int
  devices: int
  branches: tuple[tuple[int, int], ...]
  heads: int = 4
  width: int = 8
  dtype: str = "float32"


class Compiled(NamedTuple):
  """The two programs of a layer and the CPU seconds of compiling both."""

  platform: str
  forward: str
  backward: str
  cpu_seconds: float


def compile_layer(
  layer: Layer, devices: Sequence[jax.Device] | None = None
) -> Compiled:
  """Compiles a layer's forward and backward pass.

  Args:
    layer: what to compile.
    devices: real, fake or of a topology; by default those there are.
  """
  devices = jax.devices() if devices is None else devices
  mesh = mesh_lib.make_mesh(seq=layer.devices, devices=devices)
  attend = functools.partial(
    sequence.sequence_parallel_attention, mesh=mesh, **_options(layer)
  )
  rows = jax.ShapeDtypeStruct(
    _shape(layer).shape,
    layer.dtype,
    sharding=NamedSharding(mesh, P(None, "seq")),
  )

  def backward(pull, dout):
    return pull(dout)

  platform = devices[0].platform
  start = time.process_time()
  with kernels.compiling_for(platform):
    # What the forward pass leaves behind is an argument, so that its
    # collectives are not counted again.
    _, pull = jax.eval_shape(functools.partial(jax.vjp, attend), *(rows,) * 3)
    programs = [
      jax.jit(function).lower(*arguments).compile()
      for function, arguments in (
        (attend, (rows,) * 3),
        (backward, (pull, rows)),
      )
    ]
  seconds = time.process_time() - start
  texts = (program.as_text() for program in programs)
  return Compiled(platform, *texts, seconds)


def table(layer: Layer, compiled: Compiled) -> list[dict]:
  """Returns a row for each pass, kind, type and group size of a collective.

  `formula` and `measured` are the bytes that a device receives; what only one
  of them knows of has 0 in the other.
  """
  rows = []
  for name, text in (
    ("forward", compiled.forward),
    ("backward", compiled.backward),
  ):
    with kernels.compiling_for(compiled.platform):
      formula, branches = expected(layer, name)
    measured = collections.Counter()
    for found in collectives.collectives(text):
      measured[found[:3]] += found.received
    for key in sorted(formula.keys() | measured.keys()):
      rows.append(
        {
          "pass": name,
          **dict(zip(("kind", "dtype", "group"), key, strict=True)),
          "branches": branches.get(key, []),
          "formula": formula.get(key, 0),
          "measured": measured.get(key, 0),
        }
      )
  return rows


def expected(layer: Layer, name: str) -> tuple[dict, dict]:
  """Returns (kind, dtype, group) -> bytes received, and -> its branches.

  Both passes gather keys and values of the far branches; backward also adds up
  their gradients, in float32, on the way back.
  """
  shape = _shape(layer)
  where = {
    "mesh": jax.sharding.AbstractMesh((layer.devices,), ("seq",)),
    **_options(layer),
  }
  received = sequence.received_bytes(shape, shape, **where)
  formula, branches = collections.Counter(), {}
  for far in sequence.far_branches(shape, shape, **where):
    kinds, group = ("all-gather", "reduce-scatter"), far.exchange.slots
    if far.exchange.own_slot is not None:  # one permutation for each neighbour
      kinds, group = ("collective-permute",) * 2, 2
    size = received[far.w, far.r]
    moved = [(kinds[0], _hlo_name(layer.dtype), size)]
    if name == "backward":
      moved.append((kinds[1], "f32", size // shape.dtype.itemsize * 4))
    for kind, dtype, size in moved:
      formula[kind, dtype, group] += size
      branches.setdefault((kind, dtype, group), set()).add((far.w, far.r))
  return dict(formula), {k: sorted(v) for k, v in branches.items()}


def _hlo_name(dtype):
  return {"float32": "f32", "bfloat16": "bf16"}[dtype]


def _shape(layer):
  shape = (1, layer.length, layer.heads, layer.width)
  return jax.ShapeDtypeStruct(shape, layer.dtype)


def _options(layer):
  segment_lengths, dilation_rates = zip(*layer.branches, strict=True)
  return {
    "segment_lengths": segment_lengths,
    "dilation_rates": dilation_rates,
    "is_causal": True,
  }
