"""Attention of a shard's query rows over keys gathered from several shards.

As `blockwise.py`, but M query rows meet n key rows, and which keys a row sees
is told by `Rows` alone. `bounds` (M / query tile, 2) names for each tile of
queries the key tiles from the first to before the last that it can see at all;
the others are never computed.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from longnet_jax.ops import attention, blockwise
from longnet_jax.ops.attention import Rows


def forward(
  query: Float[Array, "M H"],
  key: Float[Array, "n H"],
  value: Float[Array, "n H"],
  query_rows: Rows,
  key_rows: Rows,
  bounds: Int[Array, "tiles 2"],
  *,
  shape: blockwise.Shape,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
  """Returns out (M, H) and lse (M,); `shape.tile` is the tile of keys."""

  def one_tile(args):
    queries, rows, (first, last) = args

    def step(j, mixed):
      keys, values, seen = _tile((key, value, key_rows), j, shape.tile)
      found = blockwise.forward_tile(
        queries, blockwise.transpose(keys), values, seen, rows, shape, False
      )
      return attention.merge(*mixed, *found)

    out = jnp.zeros_like(queries, attention.accumulator(queries.dtype))
    lse = jnp.full_like(out[:, 0], -jnp.inf)
    return lax.fori_loop(first, last, step, (out, lse))

  cut = _cut((query, query_rows), len(bounds))
  out, lse = lax.map(one_tile, (*cut, (bounds[:, 0], bounds[:, 1])))
  return out.reshape(query.shape), lse.reshape(-1)


def backward(
  query: Float[Array, "M H"],
  key: Float[Array, "n H"],
  value: Float[Array, "n H"],
  dout: Float[Array, "M H"],
  lse: Float[Array, " M"],
  delta: Float[Array, " M"],
  query_rows: Rows,
  key_rows: Rows,
  bounds: Int[Array, "tiles 2"],
  *,
  shape: blockwise.Shape,
) -> tuple[Float[Array, "M H"], Float[Array, "n H"], Float[Array, "n H"]]:
  """Returns (dquery, dkey, dvalue) given the global lse and D (`delta`)."""
  tile = shape.tile

  def one_tile(grads, args):
    *down, (first, last) = args
    queries, douts = down[:2]
    across = blockwise.transpose(queries), blockwise.transpose(douts)

    def step(j, carry):
      dquery_t, dkey, dvalue = carry
      dq_t, dk, dv = blockwise.backward_tile(
        across,
        tuple(down),
        _tile((key, value, key_rows), j, tile),
        shape,
        False,
      )
      return (
        dquery_t + dq_t,
        _add_at(dkey, dk, j * tile),
        _add_at(dvalue, dv, j * tile),
      )

    wide = attention.accumulator(queries.dtype)
    start = jnp.zeros_like(across[0], wide), *grads
    dquery_t, *grads = lax.fori_loop(first, last, step, start)
    return tuple(grads), dquery_t.T

  wide = attention.accumulator(key.dtype)
  zeros = jnp.zeros_like(key, wide), jnp.zeros_like(value, wide)
  cut = _cut((query, dout, lse, delta, query_rows), len(bounds))
  grads, dquery = lax.scan(
    one_tile, zeros, (*cut, (bounds[:, 0], bounds[:, 1]))
  )
  return dquery.reshape(query.shape), *grads


def _cut(rows, tiles):
  return jax.tree.map(lambda x: x.reshape(tiles, -1, *x.shape[1:]), rows)


def _tile(rows, j, tile):
  return jax.tree.map(
    lambda x: lax.dynamic_slice_in_dim(x, j * tile, tile), rows
  )


def _add_at(total, part, start):
  old = lax.dynamic_slice_in_dim(total, start, len(part))
  return lax.dynamic_update_slice_in_dim(total, old + part, start, 0)
