"""Softmax attention of one head in blocks, forward and backward.

Forward keeps no score matrix larger than one block of query rows against one
tile of keys. Backward is that of flash attention with everything global given:
with P_ij = exp(s_ij - lse_i), dP = dO V^T and D = rowsum(dO * out) - dlse,

    dV = P^T dO,    dS = P * (dP - D),    dQ = dS K,    dK = dS^T Q.

Because lse and out may be those of a larger softmax that these keys are only
a part of, the same backward serves every branch of a mixture, and every tile
of a long sequence. The query comes multiplied by the scale.

On CPU a matrix product is fast while its large operand is not transposed;
hence the copies of keys, queries and dO that are transposed once a sequence.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from longnet_jax.ops import attention
from longnet_jax.ops.attention import Rows

_LARGEST_SMALL_SCORE = 40.0


class Shape(NamedTuple):
  """How one sequence of rows is cut, and the masks that need no arrays.

  causal: row i sees rows up to i of the same sequence.
  tile: rows of a tile; the sequence is whole tiles.
  block: query rows that meet a tile of keys at once, forward.
  key_block: key rows that meet a tile of queries at once, backward.
  dropout_rate: share of the probabilities to drop.
  small: whether all queries are `small`; forward then takes no maximum.
  """

  causal: bool
  tile: int
  block: int
  key_block: int
  dropout_rate: float = 0.0
  small: bool = False


def small_queries(
  query: Float[Array, "R H"], key: Float[Array, "R H"], is_causal: bool
) -> Bool[Array, " R"]:
  """Returns for which queries exp(s_ij) can be summed in float32 as it is.

      |s_ij| <= |q_i| max_j |k_j| <= 40

  by Cauchy and Schwarz, so that no sum leaves [e^-40, 2^31 e^40]. It is the
  query's own affair, of the keys it sees and of no others, whether it is
  small; where all are, a pass over the scores can be left out.
  """
  query, key = map(_norms, (query, key))
  largest = lax.cummax(key) if is_causal else key.max()
  return query * largest <= _LARGEST_SMALL_SCORE


@jax.custom_batching.custom_vmap
def all_small(
  query: Float[Array, "*rows H"], key: Float[Array, "*others H"]
) -> Bool[Array, ""]:
  """Returns whether all queries are small whatever keys they see."""
  return _norms(query).max() * _norms(key).max() <= _LARGEST_SMALL_SCORE


@all_small.def_vmap
def _all_of_a_batch(axis_size, is_batched, query, key):
  """One answer for a batch: a batched `cond` would compute both sides."""
  del axis_size, is_batched
  return all_small(query, key), False


def forward(
  query: Float[Array, "R H"],
  key: Float[Array, "R H"],
  value: Float[Array, "R H"],
  query_rows: Rows,
  key_rows: Rows,
  *,
  shape: Shape,
) -> tuple[Float[Array, "R H"], Float[Array, " R"]]:
  """Returns out (R, H) and lse (R,) of a sequence of whole tiles."""
  num_tiles = query.shape[0] // shape.tile
  keys = (key.T, value, key_rows)
  if num_tiles == 1:
    return forward_tile(query, *keys, query_rows, shape, shape.causal)

  def one_tile(i):
    queries, rows = _tile((query, query_rows), i, shape.tile)

    def step(j, mixed):
      tile = _key_tile(keys, j, shape.tile)
      found = forward_tile(queries, *tile, rows, shape, False)
      return attention.merge(*mixed, *found)

    if shape.causal:
      tile = _key_tile(keys, i, shape.tile)
      mixed = forward_tile(queries, *tile, rows, shape, True)
      return lax.fori_loop(0, i, step, mixed)
    nothing = jnp.zeros_like(queries, attention.accumulator(queries.dtype))
    nothing = nothing, jnp.full_like(nothing[:, 0], -jnp.inf)
    return lax.fori_loop(0, num_tiles, step, nothing)

  out, lse = lax.map(one_tile, jnp.arange(num_tiles))
  return out.reshape(query.shape), lse.reshape(-1)


def backward(
  query: Float[Array, "R H"],
  key: Float[Array, "R H"],
  value: Float[Array, "R H"],
  dout: Float[Array, "R H"],
  lse: Float[Array, " R"],
  delta: Float[Array, " R"],
  query_rows: Rows,
  key_rows: Rows,
  *,
  shape: Shape,
) -> tuple[Float[Array, "R H"], Float[Array, "R H"], Float[Array, "R H"]]:
  """Returns (dquery, dkey, dvalue) given the global lse and D (`delta`).

  A row with lse = +inf takes no part.
  """
  num_tiles = query.shape[0] // shape.tile
  across = transpose(query), transpose(dout)
  down = query, dout, lse, delta, query_rows
  keys = key, value, key_rows
  if num_tiles == 1:
    dquery_t, dkey, dvalue = backward_tile(
      across, down, keys, shape, shape.causal
    )
    return dquery_t.T, dkey, dvalue

  def add_tile(i, j, grads, diagonal):
    dquery_t, dkey, dvalue = grads
    queries = tuple(
      lax.dynamic_slice_in_dim(x, i * shape.tile, shape.tile, 1) for x in across
    )
    dq_t, dk, dv = backward_tile(
      queries,
      _tile(down, i, shape.tile),
      _tile(keys, j, shape.tile),
      shape,
      diagonal,
    )
    return (
      _add_at(dquery_t, dq_t, i * shape.tile, 1),
      _add_at(dkey, dk, j * shape.tile, 0),
      _add_at(dvalue, dv, j * shape.tile, 0),
    )

  def one_row(i, grads):
    if shape.causal:
      grads = add_tile(i, i, grads, True)
    return lax.fori_loop(
      0,
      i if shape.causal else num_tiles,
      lambda j, grads: add_tile(i, j, grads, False),
      grads,
    )

  zeros = tuple(
    jnp.zeros_like(x, attention.accumulator(x.dtype))
    for x in (across[0], key, value)
  )
  dquery_t, dkey, dvalue = lax.fori_loop(0, num_tiles, one_row, zeros)
  return dquery_t.T, dkey, dvalue


def forward_tile(query, key_t, value, key_rows, query_rows, shape, diagonal):
  """Returns (out, lse) of query rows against one tile of keys.

  On the diagonal a block of queries meets the keys up to its own end only, so
  blocks above the diagonal are never computed.
  """

  def one_block(queries, rows, start, stop):
    seen = _cut(key_rows, 0, stop)
    scores = _dot(queries, key_t[:, :stop])
    mask = _mask(rows, seen, scores.shape, start, diagonal)
    if mask is not None:
      scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.zeros_like(scores, shape=(len(scores), 1))
    if not shape.small:
      top = scores.max(-1, keepdims=True)
      unshifted = jnp.isneginf(top)
      if rows.small is not None:
        unshifted |= rows.small[:, None]
      top = jnp.where(unshifted, 0, top)
      scores -= top
    weights = jnp.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if shape.dropout_rate:
      factor = attention.dropout_factor(rows, seen, shape.dropout_rate)
      weights *= factor.astype(weights.dtype)
    out = _dot(weights.astype(value.dtype), value[:stop])
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return out / jnp.where(total > 0, total, 1), lse[:, 0]

  return _over_blocks(one_block, (query, query_rows), shape.block, diagonal)


def backward_tile(across, down, keys, shape, diagonal):
  """Returns dquery (H, M), transposed, and dkey, dvalue (n, H) of one tile.

  Goes over blocks of keys, so that only dquery accumulates; on the diagonal a
  block of keys meets the queries from its own start only.
  """
  query_t, _ = across
  dquery_t = jnp.zeros(query_t.shape, attention.accumulator(query_t.dtype))
  dkey, dvalue = [], []
  for start in range(0, keys[0].shape[0], shape.key_block):
    first = start if diagonal else 0
    key, value, key_rows = _cut(keys, start, start + shape.key_block)
    query_t, dout_t = (x[:, first:] for x in across)
    query, dout, lse, delta, query_rows = _cut(down, first, None)
    scores = _dot(key, query_t)
    mask = _mask(query_rows, key_rows, scores.shape[::-1], 0, diagonal)
    if mask is not None:
      scores = jnp.where(mask.T, scores, -jnp.inf)
    weights = jnp.exp(scores - lse[None, :])
    dweights = _dot(value, dout_t)
    dropped = weights
    if shape.dropout_rate:
      factor = attention.dropout_factor(
        query_rows, key_rows, shape.dropout_rate
      )
      factor = factor.T.astype(weights.dtype)
      dropped, dweights = weights * factor, dweights * factor
    dscores = weights * (dweights - delta[None, :])
    dropped, dscores = (x.astype(key.dtype) for x in (dropped, dscores))
    dvalue.append(_dot(dropped, dout))
    dkey.append(_dot(dscores, query))
    dquery_t = dquery_t.at[:, first:].add(_dot(key.T, dscores))
  return dquery_t, jnp.concatenate(dkey), jnp.concatenate(dvalue)


def _over_blocks(one_block, queries, block, diagonal):
  """Applies `one_block(*queries, start, stop of its keys)`, joins the rows."""
  size = queries[0].shape[0]
  if not diagonal and size > block and size % block == 0:
    cut = jax.tree.map(
      lambda x: x.reshape(size // block, block, *x.shape[1:]), queries
    )
    found = lax.map(lambda x: one_block(*x, 0, None), cut)
    return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), found)
  found = []
  for start in range(0, size, block):
    stop = min(start + block, size)
    rows = _cut(queries, start, stop)
    found.append(one_block(*rows, start, stop if diagonal else None))
  return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _mask(query_rows, key_rows, shape, start, diagonal):
  """Returns which of (M, n) pairs are seen, or None; query 0 is row `start`."""
  mask = attention.visible(query_rows, key_rows)
  if diagonal:
    row = start + lax.broadcasted_iota(jnp.int32, shape, 0)
    past = row >= lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = past if mask is None else mask & past
  return mask


def _cut(rows, start, stop):
  return jax.tree.map(lambda x: x[start:stop], rows)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=attention.accumulator(a.dtype))


def _norms(x):
  return jnp.sqrt(jnp.square(x).sum(-1))


def transpose(x):
  """Returns x.T in memory: folded into a product it would be slow there."""
  return lax.optimization_barrier(x.T)


def _tile(rows, i, tile):
  return jax.tree.map(
    lambda x: lax.dynamic_slice_in_dim(x, i * tile, tile), rows
  )


def _key_tile(keys, j, tile):
  key_t, value, rows = keys
  key_t = lax.dynamic_slice_in_dim(key_t, j * tile, tile, 1)
  return key_t, *_tile((value, rows), j, tile)


def _add_at(total, part, start, axis):
  old = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
  return lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
