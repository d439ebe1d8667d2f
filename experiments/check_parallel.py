"""Checks sequence parallelism on fake devices and writes what it found.

  python -m experiments.check_parallel --output=docs/parallel.json

The JSON holds two tables: `errors`, mesh x case -> the largest difference of
values and gradients from the dense single-device definition, relative to the
largest entry; and `bytes`, what each collective brings to a device in a layer,
by formula and as counted in the compiled program.
"""

import functools
import json
import pathlib

from absl import flags
import jax

from experiments import command
import longnet_jax
from longnet_jax.analysis import collectives
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence

_DEVICES = flags.DEFINE_integer("devices", 8, "fake devices; a power of two")
_OUTPUT = flags.DEFINE_string("output", "docs/parallel.json", "where to write")

# name: T, key heads, options; on 8 devices of 8 rows segments lie inside a
# shard, equal it, span 2, 3, 4 and all, straddle shards, and are cut short.
CASES = {
  "inside": (64, 4, (4, 8), (1, 3)),
  "spans 2, 4, all": (64, 4, (16, 32, 64), (1, 2, 4)),
  "spans 3": (64, 4, (24,), (5,)),
  "ragged length": (59, 4, (8, 20, 64), (1, 3, 6)),
  "grouped heads": (64, 2, (8, 32), (1, 3)),
}
# (T, devices, branches): T doubles with w / r fixed, then with the devices.
SIZES = (
  (64, 8, ((8, 1), (16, 2), (64, 8))),
  (128, 8, ((16, 2), (32, 4), (128, 16))),
  (256, 8, ((32, 4), (64, 8), (256, 32))),
  (32, 4, ((8, 1), (16, 2), (32, 4))),
  (16, 2, ((8, 1), (16, 2))),
)
HEADS, WIDTH = 4, 8


def main(_):
  """Builds both tables and writes them."""
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  jax.config.update("jax_platforms", "cpu")
  counts = [2**i for i in range(1, _DEVICES.value.bit_length())]
  errors = {}
  for name in CASES:
    for is_causal in (True, False):
      case = f"{name}, {'causal' if is_causal else 'bidirectional'}"
      errors[case] = _errors(name, is_causal, counts)
      print(case, errors[case])
  sizes = [size for size in SIZES if size[1] <= _DEVICES.value]
  found = {"errors": errors, "bytes": [_bytes(*size) for size in sizes]}
  pathlib.Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")
  worst = max(max(row.values()) for row in errors.values())
  print(f"largest relative error {worst:.1e}; wrote {_OUTPUT.value}")


def _results(attend, name, is_causal):
  """Returns out, dquery, dkey, dvalue of a case."""
  length, kv_heads, lengths, rates = CASES[name]
  query, key, value, dout = (
    jax.random.normal(jax.random.key(i), (1, length, n, WIDTH))
    for i, n in enumerate((HEADS, kv_heads, kv_heads, HEADS))
  )
  options = {
    "segment_lengths": lengths,
    "dilation_rates": rates,
    "is_causal": is_causal,
  }

  @jax.jit
  def run(query, key, value, dout):
    call = functools.partial(attend, **options)
    out, vjp = jax.vjp(call, query, key, value)
    return out, *vjp(dout)

  return run(query, key, value, dout)


def _errors(name, is_causal, counts):
  """Returns mesh -> the largest relative error over values and gradients."""
  dense = functools.partial(
    longnet_jax.dilated_attention, implementation="reference"
  )
  wanted = jax.device_get(_results(dense, name, is_causal))
  errors = {}
  for seq in counts:
    attend = functools.partial(
      longnet_jax.sequence_parallel_attention,
      mesh=mesh_lib.make_mesh(seq=seq),
    )
    found = jax.device_get(_results(attend, name, is_causal))
    errors[f"seq {seq}"] = max(
      float(abs(x - y).max() / abs(y).max())
      for x, y in zip(found, wanted, strict=True)
    )
  return errors


def _bytes(length, devices, branches):
  """Returns the collectives of one forward pass, by formula and measured."""
  options = {
    "segment_lengths": tuple(w for w, _ in branches),
    "dilation_rates": tuple(r for _, r in branches),
    "is_causal": True,
  }
  mesh = mesh_lib.make_mesh(seq=devices)
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention, mesh=mesh, **options
  )
  shape = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), "float32")
  text = jax.jit(attend).lower(shape, shape, shape).compile().as_text()
  return {
    "length": length,
    "devices": devices,
    "branches": branches,
    "formula": [
      {"branch": branch, "received": received}
      for branch, received in sequence.received_bytes(
        shape, shape, mesh=mesh, **options
      ).items()
    ],
    "measured": [x._asdict() for x in collectives.collectives(text)],
  }


if __name__ == "__main__":
  command.run(main)
