"""The portable kernel: blocks of plain products, which XLA compiles anywhere.

Written for one sequence. Forward holds the scores of one block of queries
against one tile of keys; on the diagonal a block meets the keys up to its own
end only. Backward goes over blocks of keys, so that only dquery accumulates.

On CPU a product is fast while its large operand is not transposed, hence the
copies of keys, queries and dO that are transposed once a tile.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from longnet_jax.ops import attention, kernels


class Sizes(NamedTuple):
  """Sizes that a sweep chose for one kind of device; results do not depend.

  block: query rows that meet a tile of keys at once, forward.
  key_block: key rows that meet a tile of queries at once, backward.
  tile: rows of a tile where a sequence is cut into several.
  whole: sequences of at most so many rows are not cut.
  scores: scores in flight: as many sequences are computed at once.
  by_head: whether a loop may go over heads and examples, too.
  """

  block: int
  key_block: int
  tile: int
  whole: int
  scores: int
  by_head: bool = False


SIZES = {
  "cpu": Sizes(
    block=256,
    key_block=320,
    tile=2048,
    whole=4096,
    scores=2**19,
    by_head=True,
  ),
  "gpu": Sizes(block=512, key_block=512, tile=2048, whole=2048, scores=2**29),
  "tpu": Sizes(block=512, key_block=512, tile=2048, whole=2048, scores=2**27),
}


def make_kernel(platform: str) -> kernels.Kernel:
  """Returns the kernel with the sizes of a platform."""
  sizes = SIZES.get(platform, SIZES["gpu"])
  return kernels.Kernel(
    functools.partial(_forward, sizes=sizes),
    functools.partial(_backward, sizes=sizes),
  )


class _Rows(NamedTuple):
  """Rows of one side of one sequence; ids and random bits are (M,).

  tensors: of queries, query (M, H) and backward dout (M, H), lse and D (M,);
    of keys, key and value (n, H).
  """

  tensors: tuple
  ids: tuple
  bits: Array | None

  @property
  def size(self):
    return len(self.tensors[0])

  def cut(self, start, size):
    """Returns `size` rows from `start` on, which may be traced."""
    if isinstance(start, int):
      return jax.tree.map(lambda x: x[start : start + size], self)
    return jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, size), self
    )


class _Shape(NamedTuple):
  """How one sequence is cut, and the masks that need no arrays; static.

  tile, key_tile: rows of a tile of queries, of keys.
  """

  is_causal: bool
  dropout_rate: float
  tile: int
  key_tile: int
  sizes: Sizes


def _forward(query, key, value, mask, *, scale, sizes):
  """Returns out (B, S, M, N, H) and lse (B, S, M, N)."""
  run = functools.partial(
    _forward_sequence, shape=_shape(query, key, mask, sizes)
  )
  found = _over_sequences(run, (query * scale,), (key, value), mask, sizes)
  return tuple(_heads_last(x) for x in found)


def _backward(query, key, value, mask, out, lse, dout, dlse, *, scale, sizes):
  """Returns dquery (B, S, M, N, H) and dkey, dvalue (B, S, n, K, H)."""
  wide = attention.accumulator(query.dtype)
  delta = (dout.astype(wide) * out.astype(wide)).sum(-1)
  if dlse is not None:
    delta = delta - dlse
  shape = _shape(query, key, mask, sizes)
  run = functools.partial(_backward_sequence, shape=shape)
  down = query * scale, dout.astype(query.dtype), lse, delta
  dquery, *dkeys = _over_sequences(run, down, (key, value), mask, sizes)
  dkeys = (_heads_last(x.sum(3, keepdims=True)) for x in dkeys)
  return _heads_last(dquery) * scale, *dkeys


def _shape(query, key, mask, sizes):
  def tile(rows):
    if rows <= sizes.whole:
      return rows
    tiles = -(-rows // sizes.tile)
    return -(-rows // (tiles * sizes.block)) * sizes.block

  tiles = tile(query.shape[2]), tile(key.shape[2])
  return _Shape(mask.is_causal, mask.dropout_rate, *tiles, sizes)


def _over_sequences(run, queries, keys, mask, sizes):
  """Returns arrays (B, S, K, G, ...) of what `run` returns of each sequence.

  As many at once as `sizes` allows, in a loop. It goes over segments: batch and
  heads stay axes of every product, so that what is split over devices along
  them stays so; over these too where a loop is faster and nothing is split.

  Args:
    run: (`_Rows` of queries, of keys, length or None) -> arrays.
    queries: (B, S, M, N, ...) each.
    keys: (B, S, n, K, ...) each.
    mask: the `kernels.Mask`.
    sizes: the `Sizes`.
  """
  rows, shared = _arranged(queries, keys, mask)
  axes = rows[0].tensors[0].shape[:4]
  alike = (
    mask.lengths if mask.lengths is not None and not mask.lengths.ndim else None
  )

  def one(rows, shared):
    rows, bits, length = rows
    length = alike if length is None else length[0]
    return run(rows, _Rows(*shared, bits), length)

  scores = min(queries[0].shape[2], sizes.block) * keys[0].shape[2]
  batch, _, kv_heads, group = axes
  known = isinstance(batch, int)  # or at run time only
  if sizes.by_head and known and kernels.is_local():
    spread = lambda x: jnp.broadcast_to(x, (*axes, *x.shape[4:]))
    flat = lambda x: x.reshape(-1, *x.shape[4:])
    shared = jax.tree.map(spread, shared)
    found = _few_at_once(
      one, jax.tree.map(flat, (rows, shared)), sizes.scores // scores
    )
    return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), found)
  shared = jax.tree.map(lambda x: x[:, :, :, 0], shared)
  every = jax.vmap(jax.vmap(jax.vmap(one, (0, None))))
  first = lambda x: jnp.moveaxis(x, 1, 0)
  heads = kv_heads * group * (batch if known else 1)
  found = _few_at_once(
    every,
    jax.tree.map(first, (rows, shared)),
    sizes.scores // (scores * heads),
  )
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _arranged(queries, keys, mask):
  """Returns what differs from sequence to sequence, (B, S, K, G, ...) each.

  That is (`_Rows` of queries, random bits of keys, length (1,)), and what the
  query heads of a key head share, G = 1: (key and value, ids).
  """
  heads_first = functools.partial(_heads_first, kv_heads=keys[0].shape[3])
  query_ids, key_ids = zip(*mask.ids, strict=True) if mask.ids else ((), ())
  bits, key_bits = mask.bits or (None, None)
  length = None
  if mask.lengths is not None and mask.lengths.ndim:
    length = mask.lengths[:, :, None]
  rows = _Rows(queries, query_ids, bits), key_bits, length
  rows, shared = jax.tree.map(heads_first, (rows, (keys, key_ids)))
  axes = rows[0].tensors[0].shape[:4]
  spread = lambda x, axes: jnp.broadcast_to(x, (*axes, *x.shape[4:]))
  return (
    jax.tree.map(lambda x: spread(x, axes), rows),
    jax.tree.map(lambda x: spread(x, (*axes[:3], 1)), shared),
  )


def _few_at_once(run, arrays, limit):
  """Returns `run(*x)` for each line of the arrays, up to `limit` at once."""
  count = jax.tree.leaves(arrays)[0].shape[0]
  few = min(max(limit, 1), count)
  few = next(n for n in range(few, 0, -1) if count % n == 0)
  if few == count:
    return jax.vmap(run)(*arrays)
  size = few if few > 1 else None
  return lax.map(lambda x: run(*x), arrays, batch_size=size)


def _forward_sequence(queries, keys, length, *, shape):
  """Returns out (M, H) and lse (M,)."""
  size = queries.size
  queries, keys, length = _filled(queries, keys, length, shape)

  def one_tile(start, rows):
    if keys.size == shape.key_tile:
      return _forward_tile(rows, keys, 0, length, shape, shape.is_causal)

    def step(j, mixed):
      first = j * shape.key_tile
      seen = keys.cut(first, shape.key_tile)
      found = _forward_tile(rows, seen, first, length, shape, False)
      return attention.merge(*mixed, *found)

    if shape.is_causal:
      seen = keys.cut(start, shape.key_tile)
      mixed = _forward_tile(rows, seen, start, length, shape, True)
      return lax.fori_loop(0, start // shape.key_tile, step, mixed)
    query = rows.tensors[0]
    out = jnp.zeros_like(query, attention.accumulator(query.dtype))
    nothing = out, jnp.full_like(out[:, 0], -jnp.inf)
    return lax.fori_loop(0, _tiles(keys, length, shape), step, nothing)

  found = _over_blocks(one_tile, queries, shape.tile, alike=True)
  return tuple(x[:size] for x in found)


def _backward_sequence(queries, keys, length, *, shape):
  """Returns dquery (M, H), dkey and dvalue (n, H)."""
  sizes = queries.size, keys.size, keys.size
  queries, keys, length = _filled(queries, keys, length, shape)

  def add_tile(i, j, grads, diagonal):
    starts = i * shape.tile, j * shape.key_tile, j * shape.key_tile
    rows = queries.cut(starts[0], shape.tile)
    seen = keys.cut(starts[1], shape.key_tile)
    found = _backward_tile(rows, seen, starts[1], length, shape, diagonal)
    return tuple(map(_add_at, grads, found, starts))

  def one_row(i, grads):
    step = lambda j, grads: add_tile(i, j, grads, False)
    if shape.is_causal:
      return lax.fori_loop(0, i, step, add_tile(i, i, grads, True))
    return lax.fori_loop(0, _tiles(keys, length, shape), step, grads)

  if (queries.size, keys.size) == (shape.tile, shape.key_tile):
    grads = _backward_tile(queries, keys, 0, length, shape, shape.is_causal)
  else:
    tensors = queries.tensors[0], *keys.tensors
    wide = attention.accumulator(tensors[0].dtype)
    grads = tuple(jnp.zeros_like(x, wide) for x in tensors)
    grads = lax.fori_loop(0, queries.size // shape.tile, one_row, grads)
  return tuple(x[:n] for x, n in zip(grads, sizes, strict=True))


def _forward_tile(queries, keys, first, length, shape, diagonal):
  """Returns (out, lse) of queries against one tile of keys, from `first` on."""
  key, value = keys.tensors
  key_t = _transposed(key)

  def one_block(start, rows):
    stop = start + rows.size if diagonal else keys.size
    seen = keys.cut(0, stop)
    (query,) = rows.tensors
    scores = _dot(query, key_t[:, :stop])
    scores = _masked(
      scores, rows, seen, start if diagonal else None, first, length
    )
    top = scores.max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if rows.bits is not None:
      weights *= _dropout(rows, seen, shape, weights.dtype)
    out = _dot(weights.astype(value.dtype), value[:stop])
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return out / jnp.where(total > 0, total, 1), lse[:, 0]

  return _over_blocks(one_block, queries, shape.sizes.block, alike=not diagonal)


def _backward_tile(queries, keys, first, length, shape, diagonal):
  """Returns dquery (M, H), dkey, dvalue (n, H) of one tile, from `first` on.

  On the diagonal a block of keys meets the queries from its own start only.
  """
  query_t, dout_t = (_transposed(x) for x in queries.tensors[:2])
  dquery_t = jnp.zeros_like(query_t, attention.accumulator(query_t.dtype))
  dkey, dvalue = [], []
  block = shape.sizes.key_block
  for start in range(0, keys.size, block):
    above = start if diagonal else 0
    seen = keys.cut(start, min(block, keys.size - start))
    rows = queries.cut(above, queries.size - above)
    key, value = seen.tensors
    query, dout, lse, delta = rows.tensors
    scores = _dot(key, query_t[:, above:])
    scores = _masked(
      scores.T, rows, seen, 0 if diagonal else None, first + start, length
    ).T
    weights = jnp.exp(scores - lse[None])
    dweights = _dot(value, dout_t[:, above:])
    dropped = weights
    if rows.bits is not None:
      factor = _dropout(rows, seen, shape, weights.dtype).T
      dropped, dweights = weights * factor, dweights * factor
    dscores = weights * (dweights - delta[None])
    dropped, dscores = (x.astype(key.dtype) for x in (dropped, dscores))
    dvalue.append(_dot(dropped, dout))
    dkey.append(_dot(dscores, query))
    dquery_t += jnp.pad(_dot(key.T, dscores), ((0, 0), (above, 0)))
  return dquery_t.T, jnp.concatenate(dkey), jnp.concatenate(dvalue)


def _masked(scores, rows, keys, start, first, length):
  """Returns scores (M, n), -inf where a key is not seen.

  Args:
    scores: (M, n).
    rows: of the queries.
    keys: of the keys.
    start: number of the first query, counted from the first key, where masked
      causally; else None.
    first: number of the first key, which `length` counts from 0.
    length: how many keys are seen; None for all.
  """
  row, column = (
    lax.broadcasted_iota(jnp.int32, scores.shape, i) for i in (0, 1)
  )
  seen = []
  if start is not None:
    seen.append(start + row >= column)
  if length is not None:
    seen.append(first + column < length)
  for ids, others in zip(rows.ids, keys.ids, strict=True):
    seen.append(ids[:, None] == others[None])
  if not seen:
    return scores
  return jnp.where(functools.reduce(jnp.logical_and, seen), scores, -jnp.inf)


def _dropout(rows, keys, shape, dtype):
  rate = shape.dropout_rate
  return attention.dropout_factor(rows.bits, keys.bits, rate).astype(dtype)


def _filled(queries, keys, length, shape):
  """Fills both sides up to whole tiles, with keys that nobody sees."""
  if keys.size % shape.key_tile and not shape.is_causal:
    size = jnp.int32(keys.size)
    length = size if length is None else jnp.minimum(length, size)
  fill = lambda n: (
    lambda x: jnp.pad(x, [(0, -len(x) % n)] + [(0, 0)] * (x.ndim - 1))
  )
  return (
    jax.tree.map(fill(shape.tile), queries),
    jax.tree.map(fill(shape.key_tile), keys),
    length,
  )


def _tiles(keys, length, shape):
  """Returns how many tiles of keys are seen; traced where a length says so."""
  if length is None:
    return keys.size // shape.key_tile
  return (length + (shape.key_tile - 1)) // shape.key_tile


def _over_blocks(run, rows, size, *, alike):
  """Joins `run(start, block)` over blocks of `size` rows.

  alike: whether one compiled `run` serves all blocks, in a loop.
  """
  count, rest = divmod(rows.size, size)
  if alike and count > 1 and not rest:
    starts = size * jnp.arange(count, dtype=jnp.int32)
    found = lax.map(lambda start: run(start, rows.cut(start, size)), starts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
  found = [
    run(start, rows.cut(start, min(size, rows.size - start)))
    for start in range(0, rows.size, size)
  ]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _add_at(total, part, start):
  old = lax.dynamic_slice_in_dim(total, start, len(part))
  return lax.dynamic_update_slice_in_dim(total, old + part, start, 0)


def _heads_first(x, kv_heads):
  """Returns (B, S, K, G, rows, ...) from (B, S, rows, N, ...); 1, 1 of 1."""
  x = jnp.moveaxis(x, 3, 2)
  groups = kv_heads if x.shape[2] > 1 else 1
  return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _heads_last(x):
  """Returns (B, S, rows, N, ...) from (B, S, K, G, rows, ...)."""
  x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
  return jnp.moveaxis(x, 2, 3)


def _transposed(x):
  """Returns the transposed matrix in memory: folded into a product, slow."""
  return lax.optimization_barrier(x.T)


def _dot(a, b):
  wide = attention.accumulator(a.dtype)
  return jnp.dot(a, b, preferred_element_type=wide)
