"""The sharded operation equals the dense one, in values and gradients."""

import functools
import itertools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from tests.ops import family

# On 2, 4 and 8 devices segments lie inside a shard, equal it, and span 2, 4
# and all shards; the rate 6 divides neither its segments nor the shards.
EVEN = {
  "segment_lengths": (4, 8, 16, 32),
  "dilation_rates": (1, 2, 6, 4),
}
# 30 rows on 2, 4 and 8 devices: segments that straddle shards, span 3 of them,
# are cut by the end, and are longer than the sequence.
RAGGED = {
  "segment_lengths": (5, 12, 20, 40),
  "dilation_rates": (1, 2, 3, 6),
  "head_phase": "blocked",
}
CASES = {
  "even": (32, 4, EVEN, ()),
  "ragged": (30, 2, RAGGED, ("segment_ids", "key_value_seq_lengths")),
  "detached": (
    32,
    2,
    {**EVEN, "mixing_gradient": False, "dropout_rate": 0.3},
    ("dropout_key",),
  ),
  "nested": (
    32,
    4,
    {"segment_lengths": (4, 16, 32), "dilation_rates": (1, 2, 4)},
    ("segment_ids", "key_value_seq_lengths"),
  ),
}


def inputs(length, kv_heads):
  """Values that tell the global position they come from."""
  keys = jax.random.split(jax.random.key(0), 4)
  heads = 4, kv_heads, kv_heads, 4
  query, key, value, dout = (
    jax.random.normal(k, (2, length, n, 4))
    for k, n in zip(keys, heads, strict=True)
  )
  value += jnp.arange(length)[None, :, None, None] / length
  return query, key, value, dout


def traced(length, names):
  starts = jnp.array([[0, length // 3], [length // 5, length // 2]])
  position = jnp.arange(length)
  options = {
    "segment_ids": (position[None] >= starts[:, :1]).astype(jnp.int32)
    + (position[None] >= starts[:, 1:]).astype(jnp.int32),
    "key_value_seq_lengths": jnp.array([length - 7, length]),
    "dropout_key": jax.random.key(3),
  }
  return {name: options[name] for name in names}


def results(attend, case, is_causal):
  """Returns out, lse, dquery, dkey, dvalue of a case."""
  length, kv_heads, options, names = CASES[case]
  *tensors, dout = inputs(length, kv_heads)

  @jax.jit
  def run(tensors, dout, more):
    attend_case = functools.partial(
      attend, is_causal=is_causal, return_residual=True, **options, **more
    )
    (out, lse), vjp = jax.vjp(attend_case, *tensors)
    return out, lse, *vjp((dout, dout.sum(-1)))

  return run(tensors, dout, traced(length, names))


@functools.cache
def dense(case, is_causal):
  attend = functools.partial(
    longnet_jax.dilated_attention, implementation="reference"
  )
  return results(attend, case, is_causal)


QUICK = (
  ("even", True, 4),
  ("even", False, 8),
  ("ragged", True, 8),
  ("detached", True, 2),
)
MATRIX = [
  pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow)
  for x in itertools.product(CASES, (True, False), (2, 4, 8))
]
TREES = [
  pytest.param(*x, marks=() if x == ("nested", True, 4) else pytest.mark.slow)
  for x in itertools.product(CASES, (True, False), (2, 4, 8))
]


def check(found, case, is_causal):
  for name, x, y in zip(
    ("out", "lse", "dquery", "dkey", "dvalue"),
    found,
    dense(case, is_causal),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=5e-6, rtol=5e-6, err_msg=name)


@pytest.mark.parametrize("case, is_causal, devices", MATRIX)
def test_equals_one_device(case, is_causal, devices):
  mesh = mesh_lib.make_mesh(seq=devices)
  attend = functools.partial(longnet_jax.sequence_parallel_attention, mesh=mesh)
  check(results(attend, case, is_causal), case, is_causal)


@pytest.mark.parametrize("case, is_causal, devices", TREES)
def test_branches_are_a_tree_over_devices_too(case, is_causal, devices):
  """As on TPU: rows are selected from those of a branch before."""
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention,
    mesh=mesh_lib.make_mesh(seq=devices),
    implementation="xla",
  )
  with kernels.compiling_for("tpu"):
    check(results(attend, case, is_causal), case, is_causal)


def test_examples_and_heads_may_be_split_as_well():
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention,
    mesh=mesh_lib.make_mesh(data=2, seq=2, model=2),
    batch_axis="data",
    head_axis="model",
  )
  check(results(attend, "detached", True), "detached", True)


@pytest.mark.parametrize("case, is_causal", [("ragged", False), ("even", True)])
def test_long_rows_are_cut_into_tiles(case, is_causal):
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention, mesh=mesh_lib.make_mesh(seq=2)
  )
  with family.in_pieces():
    found = results(attend, case, is_causal)
  check(found, case, is_causal)
