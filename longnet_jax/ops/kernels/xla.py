"""The portable kernel: blocks of plain products, which XLA compiles anywhere.

Forward holds the scores of one block of queries against one tile of keys; on
the diagonal a block meets the keys up to its own end only. Backward goes over
blocks of keys, so that only dquery accumulates. Sequences and heads are batch
axes of every product: what is split over devices along them stays so.

On CPU a product is fast while its large operand is not transposed, hence the
copies of keys, queries and dO that are transposed once a tile.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from longnet_jax.ops import attention, kernels

# Rows are axis 4 of everything inside this file, (B, S, K, G, rows, ...): G is
# the query heads of a key head, and 1 for keys.
_ROWS = 4


class Sizes(NamedTuple):
  """Sizes that a sweep chose for one kind of device; results do not depend.

  block: query rows that meet a tile of keys at once, forward.
  key_block: key rows that meet a tile of queries at once, backward.
  tile: rows of a tile where a sequence is cut into several.
  whole: sequences of at most so many rows are not cut.
  scores: scores in flight: more make blocks smaller.
  """

  block: int
  key_block: int
  tile: int
  whole: int
  scores: int


SIZES = {
  "cpu": Sizes(block=256, key_block=320, tile=2048, whole=4096, scores=2**23),
  "gpu": Sizes(block=512, key_block=512, tile=2048, whole=2048, scores=2**29),
  "tpu": Sizes(block=512, key_block=512, tile=2048, whole=2048, scores=2**27),
}


def make_kernel(platform: str) -> kernels.Kernel:
  """Returns the kernel with the sizes of a platform."""
  sizes = SIZES.get(platform, SIZES["gpu"])
  return kernels.Kernel(
    functools.partial(_forward, sizes=sizes),
    functools.partial(_backward, sizes=sizes),
    functools.partial(_together, sizes=sizes),
  )


class _Rows(NamedTuple):
  """Rows of queries or of keys, and what `_mask` compares of them."""

  tensors: tuple
  ids: tuple
  bits: Array | None

  @property
  def size(self):
    return self.tensors[0].shape[_ROWS]


class _Plan(NamedTuple):
  """What is the same for all tiles."""

  mask: kernels.Mask
  lengths: Array | None  # of the mask, (B, S, K, G, 1, 1)
  sizes: Sizes
  tile: int  # rows of a tile of queries
  key_tile: int
  key_tiles: Array | int  # how many of them are seen at all


def _forward(query, key, value, mask, *, scale, sizes):
  """Returns out (B, S, M, N, H) and lse (B, S, M, N)."""
  queries, keys, plan = _plan((query * scale,), (key, value), mask, sizes)

  def one_tile(first, queries):
    if keys.size == plan.key_tile:
      return _forward_tile(queries, keys, plan, 0, mask.is_causal)

    def step(j, mixed):
      start = j * plan.key_tile
      tile = _slice(keys, start, plan.key_tile)
      found = _forward_tile(queries, tile, plan, start, False)
      return attention.merge(*mixed, *found)

    if mask.is_causal:
      tile = _slice(keys, first, plan.key_tile)
      mixed = _forward_tile(queries, tile, plan, first, True)
      return lax.fori_loop(0, first // plan.key_tile, step, mixed)
    out = _zeros_like(queries.tensors[0])
    mixed = out, jnp.full_like(out[..., 0], -jnp.inf)
    return lax.fori_loop(0, plan.key_tiles, step, mixed)

  found = _over_rows(one_tile, queries, plan.tile, alike=True)
  return tuple(_heads_last(x)[:, :, : query.shape[2]] for x in found)


def _backward(query, key, value, mask, out, lse, dout, dlse, *, scale, sizes):
  """Returns dquery (B, S, M, N, H) and dkey, dvalue (B, S, n, K, H)."""
  wide = attention.accumulator(query.dtype)
  delta = (dout.astype(wide) * out.astype(wide)).sum(-1)
  if dlse is not None:
    delta = delta - dlse
  down = query * scale, dout.astype(query.dtype), lse, delta
  queries, keys, plan = _plan(down, (key, value), mask, sizes)

  def add_tile(grads, i, j, diagonal):
    starts = i * plan.tile, j * plan.key_tile, j * plan.key_tile
    rows = _slice(queries, starts[0], plan.tile)
    seen = _slice(keys, starts[1], plan.key_tile)
    found = _backward_tile(rows, seen, plan, starts[1], diagonal)
    return tuple(map(_add_at, grads, found, starts))

  def one_tile(i, grads):
    step = lambda j, grads: add_tile(grads, i, j, False)
    if mask.is_causal:
      return lax.fori_loop(0, i, step, add_tile(grads, i, i, True))
    return lax.fori_loop(0, plan.key_tiles, step, grads)

  if queries.size == plan.tile and keys.size == plan.key_tile:
    grads = _backward_tile(queries, keys, plan, 0, mask.is_causal)
  else:
    zeros = tuple(map(_zeros_like, (queries.tensors[0], *keys.tensors)))
    grads = lax.fori_loop(0, queries.size // plan.tile, one_tile, zeros)
  dquery, dkey, dvalue = map(_heads_last, grads)
  rows, num_keys = query.shape[2], key.shape[2]
  return dquery[:, :, :rows] * scale, dkey[:, :, :num_keys], dvalue[
    :, :, :num_keys
  ]


def _together(rows, heads, *, sizes):
  """Returns how many segments' sequences fill the scores in flight."""
  scores = heads * min(rows, sizes.block) * _tile(rows, sizes)
  return max(1, sizes.scores // scores)


def _plan(queries, keys, mask, sizes):
  """Returns `_Rows` of queries and keys, filled to whole tiles, and the plan."""
  num_keys, kv_heads = keys[0].shape[2:4]
  tile, key_tile = (_tile(x[0].shape[2], sizes) for x in (queries, keys))
  lengths, key_tiles = mask.lengths, -(-num_keys // key_tile)
  if lengths is not None and not lengths.ndim:
    key_tiles = (lengths + (key_tile - 1)) // key_tile
    lengths = lengths.reshape(1, 1, 1)
  elif num_keys % key_tile and not mask.is_causal:
    end = jnp.full((1, 1, 1), num_keys, jnp.int32)
    lengths = end if lengths is None else jnp.minimum(lengths, end)
  if lengths is not None:
    lengths = _heads_first(lengths[:, :, None], kv_heads)[..., None]
  ids = zip(*mask.ids, strict=True) if mask.ids else ((), ())
  bits = mask.bits or (None, None)
  rows = [
    jax.tree.map(
      lambda x, size=size: _fill(_heads_first(x, kv_heads), size), _Rows(*side)
    )
    for size, *side in zip(
      (tile, key_tile), (queries, keys), ids, bits, strict=True
    )
  ]
  return *rows, _Plan(mask, lengths, sizes, tile, key_tile, key_tiles)


def _tile(rows, sizes):
  """Returns the rows of a tile: all, or as many as make equal tiles."""
  if rows <= sizes.whole:
    return max(rows, 1)
  tiles = -(-rows // sizes.tile)
  return -(-rows // (tiles * sizes.block)) * sizes.block


def _forward_tile(queries, keys, plan, start, diagonal):
  """Returns (out, lse) of queries against the keys from `start` on.

  On the diagonal the queries have the same positions as the keys.
  """
  key, value = (x[:, :, :, 0] for x in keys.tensors)
  key_t = _transposed(key)

  def one_block(first, block):
    stop = first + block.size if diagonal else keys.size
    seen = _slice(keys, 0, stop)
    scores = _dot("bskgmh,bskhn->bskgmn", *block.tensors, key_t[..., :stop])
    mask = _mask(block, seen, plan, start, first if diagonal else None)
    scores = _hide(scores, mask)
    top = scores.max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if plan.mask.bits is not None:
      weights *= _dropout(block, seen, plan).astype(weights.dtype)
    weights = weights.astype(value.dtype)
    out = _dot("bskgmn,bsknh->bskgmh", weights, value[:, :, :, :stop])
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return out / jnp.where(total > 0, total, 1), lse[..., 0]

  size = _block(plan.sizes.block, queries, keys.size, plan)
  return _over_rows(one_block, queries, size, alike=not diagonal)


def _backward_tile(queries, keys, plan, start, diagonal):
  """Returns dquery, dkey, dvalue of queries and of the keys from `start` on.

  On the diagonal a block of keys meets the queries from its own start only.
  """
  query_t, dout_t = (_transposed(x) for x in queries.tensors[:2])
  dquery_t = _zeros_like(query_t)
  dkey, dvalue = [], []
  block = _block(plan.sizes.key_block, queries, queries.size, plan)
  for column in range(0, keys.size, block):
    first = column if diagonal else 0
    seen = _slice(keys, column, min(block, keys.size - column))
    rows = _slice(queries, first, queries.size - first)
    key, value = (x[:, :, :, 0] for x in seen.tensors)
    query, dout, lse, delta = rows.tensors
    scores = _dot("bsknh,bskghm->bskgnm", key, query_t[..., first:])
    mask = _mask(rows, seen, plan, start + column, 0 if diagonal else None)
    scores = _hide(scores, None if mask is None else mask.swapaxes(-1, -2))
    weights = jnp.exp(scores - lse[..., None, :])
    dweights = _dot("bsknh,bskghm->bskgnm", value, dout_t[..., first:])
    dropped = weights
    if plan.mask.bits is not None:
      factor = _dropout(rows, seen, plan).swapaxes(-1, -2)
      factor = factor.astype(weights.dtype)
      dropped, dweights = weights * factor, dweights * factor
    dscores = weights * (dweights - delta[..., None, :])
    dropped, dscores = (x.astype(key.dtype) for x in (dropped, dscores))
    dvalue.append(_dot("bskgnm,bskgmh->bsknh", dropped, dout))
    dkey.append(_dot("bskgnm,bskgmh->bsknh", dscores, query))
    found = _dot("bsknh,bskgnm->bskghm", key, dscores)
    dquery_t = dquery_t.at[..., first:].add(found)
  dkey, dvalue = (
    jnp.concatenate(x, axis=3)[:, :, :, None] for x in (dkey, dvalue)
  )
  return dquery_t.swapaxes(-1, -2), dkey, dvalue


def _mask(rows, keys, plan, start, first):
  """Returns which of (..., M, n) pairs are seen; None: all of them.

  Args:
    rows: of queries.
    keys: of keys.
    plan: the `_Plan`.
    start: number of the first key, for the lengths.
    first: of the first query, counted from the first key, on the diagonal;
      else None.
  """
  found = []
  shape = (1, 1, 1, 1, rows.size, keys.size)
  column = lax.broadcasted_iota(jnp.int32, shape, _ROWS + 1)
  if first is not None:
    row = first + lax.broadcasted_iota(jnp.int32, shape, _ROWS)
    found.append(row >= column)
  if plan.lengths is not None:
    found.append(start + column < plan.lengths)
  for ids, others in zip(rows.ids, keys.ids, strict=True):
    found.append(ids[..., None] == others[..., None, :])
  return functools.reduce(jnp.logical_and, found) if found else None


def _hide(scores, mask):
  return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _dropout(rows, keys, plan):
  return attention.dropout_factor(rows.bits, keys.bits, plan.mask.dropout_rate)


def _block(block, queries, others, plan):
  """Returns the rows of a block: fewer where many heads share the scores.

  others: the rows of the other side that a block meets.
  """
  heads = [x for x in queries.tensors[0].shape[:_ROWS] if isinstance(x, int)]
  fitting = plan.sizes.scores // (math.prod(heads) * others)
  return min(block, max(fitting // 32 * 32, 32))


def _over_rows(run, rows, size, *, alike):
  """Joins `run(first, block)` over blocks of `size` rows.

  alike: whether one compiled `run` serves all blocks, in a loop.
  """
  count, rest = divmod(rows.size, size)
  if alike and count > 1 and not rest:
    starts = jnp.arange(count, dtype=jnp.int32) * size
    found = lax.map(lambda start: run(start, _slice(rows, start, size)), starts)
    join = lambda x: jnp.moveaxis(x, 0, _ROWS).reshape(
      *x.shape[1 : _ROWS + 1], -1, *x.shape[_ROWS + 2 :]
    )
    return jax.tree.map(join, found)
  found = [
    run(start, _slice(rows, start, min(size, rows.size - start)))
    for start in range(0, rows.size, size)
  ]
  if len(found) == 1:
    return found[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=_ROWS), *found)


def _slice(rows, start, size):
  """Returns `size` rows of each array from `start` on."""
  cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, _ROWS)
  if isinstance(start, int):
    cut = lambda x: lax.slice_in_dim(x, start, start + size, axis=_ROWS)
  return jax.tree.map(cut, rows)


def _add_at(total, part, start):
  old = lax.dynamic_slice_in_dim(total, start, part.shape[_ROWS], _ROWS)
  return lax.dynamic_update_slice_in_dim(total, old + part, start, _ROWS)


def _heads_first(x, kv_heads):
  """Returns (B, S, K, G, rows, ...) from (B, S, rows, N, ...), K = G = 1 of 1."""
  x = jnp.moveaxis(x, 3, 2)
  groups = kv_heads if x.shape[2] > 1 else 1
  return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _heads_last(x):
  """Returns (B, S, rows, N, ...) from (B, S, K, G, rows, ...)."""
  x = x.reshape(*x.shape[:2], -1, *x.shape[_ROWS:])
  return jnp.moveaxis(x, 2, 3)


def _fill(x, size):
  """Fills the rows up to a multiple of `size` with zeros."""
  padding = [(0, 0)] * x.ndim
  padding[_ROWS] = (0, -x.shape[_ROWS] % size)
  return jnp.pad(x, padding) if padding[_ROWS][1] else x


def _transposed(x):
  """Returns the transposed matrices in memory: folded into products, slow."""
  return lax.optimization_barrier(x.swapaxes(-1, -2))


def _zeros_like(x):
  return jnp.zeros_like(x, attention.accumulator(x.dtype))


def _dot(spec, a, b):
  wide = attention.accumulator(a.dtype)
  return jnp.einsum(spec, a, b, preferred_element_type=wide)
