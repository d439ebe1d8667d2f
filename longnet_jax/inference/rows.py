"""Chosen rows of an array whose positions lie over a mesh."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from longnet_jax.parallel import sharding


def take(
  x: Shaped[Array, "B T K H"],
  positions: Int[Array, "B S R"],
  heads: Int[Array, " S"],
  *,
  mesh: jax.sharding.Mesh,
) -> Shaped[Array, "B S R H"]:
  """Returns row `positions[b, s, r]` of head `heads[s]`, 0 where that is -1.

  Each device looks up the rows that it holds, and only what was asked for is
  sent: a compiler left to itself may gather all of `x` first.

  Args:
    x: examples over `data`, positions over `seq` (which divides T), heads over
      `model`; an axis that does not divide is whole on each device.
    positions: of each example, stream and row; at most T - 1.
    heads: of each stream.
    mesh: a mesh of `make_mesh`.
  """
  batch_axis, row_axis, head_axis, _ = sharding.fit(
    ("data", "seq", "model", None), x.shape, mesh
  )

  def local(x, positions, heads):
    row = positions - _start(row_axis, x.shape[1])
    head = heads[:, None] - _start(head_axis, x.shape[2])
    held = (head >= 0) & (head < x.shape[2])
    mine = held[None] & (row >= 0) & (row < x.shape[1])
    mine &= positions >= 0
    found = jax.vmap(lambda x, row: x.at[row, head].get(mode="clip"))(x, row)
    found = jnp.where(mine[..., None], found, jnp.zeros((), x.dtype))
    split = tuple(axis for axis in (row_axis, head_axis) if axis)
    # Of each row all devices but one add zeros: exact in any type.
    return lax.psum(found, split) if split else found

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(batch_axis, row_axis, head_axis), P(batch_axis), P()),
    out_specs=P(batch_axis),
  )(x, positions, heads)


def _start(axis, size):
  """Returns the first index, along a split axis, that this device holds."""
  return lax.axis_index(axis) * size if axis else 0
