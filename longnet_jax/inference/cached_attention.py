"""Attention of new rows over a cache of what came before them.

New rows come in chunks, one row being a chunk as well. A chunk is taken segment
by segment: its kept rows of the segment go to their slots first, and then each
reads the slots up to its own. Branches mix as they do in the whole sequence.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from longnet_jax import pattern
from longnet_jax.inference import cache as cache_lib
from longnet_jax.models import config as config_lib
from longnet_jax.ops import attention

# Slots whose scores exist at once; a longer store is read tile by tile, as far
# as any row sees. Reading is what one row costs, so that a CPU gains by small
# tiles, which leave more unread; many rows gain by large products.
_TILE = 4096
_CPU_ROW_TILE = 1024


class _Located(NamedTuple):
  """Which rows of a chunk a stream deals with, each (S, M).

  rows: of the chunk; the chunk's length where there is none.
  slots: where keys and values go; the number of slots where they are not kept.
  seen: slots that the query sees, the first ones.
  """

  rows: Int[Array, "S M"]
  slots: Int[Array, "S M"]
  seen: Int[Array, "S M"]


def attend(
  config: config_lib.LongNetConfig,
  cache: cache_lib.Cache,
  layer: Int[Array, ""],
  query: Float[Array, "B C N H"],
  key: Float[Array, "B C K H"],
  value: Float[Array, "B C K H"],
  counts: Int[Array, " B"],
) -> tuple[Float[Array, "B C N H"], cache_lib.Cache]:
  """Stores a chunk's keys and values of one layer and attends to all it sees.

  The chunk's rows follow `cache.position`, which is a multiple of C and does
  not move here. One row at a time is a chunk as well.

  Args:
    config: of the model.
    cache: of all layers.
    layer: index of the layer.
    query: rotated, N heads.
    key: rotated, K heads.
    value: K heads.
    counts: rows of the chunk that exist, the first ones; the others are not
      stored and get 0.

  Returns:
    What causal attention over all rows so far gives, and the new cache.
  """
  branches = cache_lib.branches(config, cache.max_length)
  step = functools.partial(_attend_example, branches, cache.max_length, layer)
  out, keys, values = jax.vmap(step)(
    cache.keys, cache.values, cache.position, query, key, value, counts
  )
  return out.astype(query.dtype), cache.replace(keys=keys, values=values)


def _attend_example(
  branches, max_length, layer, keys, values, position, query, key, value, count
):
  """One example: returns out (C, N, H) and the new keys and values."""
  keys, values = list(keys), list(values)
  mixed = None
  for i, branch in enumerate(branches):

    def one_pass(index, found, branch=branch):
      located = _locate(branch, index, position, count, query, found[0])
      return _store_and_attend(
        branch, located, layer, (query, key, value), found
      )

    found = (
      keys[i],
      values[i],
      jnp.zeros(query.shape, jnp.float32),
      jnp.full(query.shape[:2], -jnp.inf, jnp.float32),
    )
    passes = _passes(branch, query.shape[0], max_length)
    if passes == 1:
      found = one_pass(0, found)
    else:
      found = lax.fori_loop(0, passes, one_pass, found)
    keys[i], values[i], *part = found
    mixed = attention.merge(*mixed, *part) if mixed else part
  return mixed[0], tuple(keys), tuple(values)


def _passes(branch, chunk, max_length):
  """Returns how many segments an aligned chunk can touch."""
  length = branch.length
  if branch.summary or length >= max_length or length % chunk == 0:
    return 1
  if chunk % length == 0:
    return chunk // length
  return (chunk - 2) // length + 2


def _locate(branch, index, position, count, query, keys):
  """Finds the chunk's rows of the `index`-th segment that it touches."""
  chunk, slots = query.shape[0], keys.shape[2]
  if branch.summary:
    return _locate_summary(branch, position, count, chunk, slots)
  length, rate = branch.length, branch.rate
  # The segment's first position and the first kept one, as rows of the chunk.
  origin = index * length - position % length
  first = origin + jnp.asarray(branch.phases)[:, None]
  skipped = jnp.maximum(0, (rate - 1 - first) // rate)
  kept = min(pattern.max_kept(length, rate), pattern.max_kept(chunk, rate))
  slot = skipped + jnp.arange(kept)[None]
  row = first + rate * slot
  exists = (row - origin < length) & (row < count)
  return _Located(
    rows=jnp.where(exists, row, chunk),
    slots=jnp.where(exists, slot, slots),
    seen=slot + 1,
  )


def _locate_summary(branch, position, count, chunk, slots):
  """All rows read the summaries of earlier blocks; some become summaries."""
  row = jnp.arange(chunk)
  block = (position + row) // branch.length
  column = (position + row) % branch.length - branch.length + branch.summary
  earlier = block * branch.summary
  exists = row < count
  located = _Located(
    rows=jnp.where(exists, row, chunk),
    slots=jnp.where(exists & (column >= 0), earlier + column, slots),
    seen=earlier,
  )
  streams = len(branch.kv_heads)
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (streams, chunk)), located
  )


def _store_and_attend(branch, located, layer, rows, found):
  """Returns the stores with the located rows, and their (out, lse) put in."""
  query, key, value = rows
  keys, values, out, lse = found
  streams = np.arange(len(branch.kv_heads), dtype=np.int32)[:, None]
  # Rows that do not exist are read from the last one and never put anywhere.
  source = located.rows, branch.kv_heads[:, None]
  slots = layer, streams, located.slots
  keys = keys.at[slots].set(key.at[source].get(mode="clip"), mode="drop")
  values = values.at[slots].set(value.at[source].get(mode="clip"), mode="drop")

  readers = located.rows[:, None], branch.members[:, :, None]
  found = _attend_to_first(
    query.at[readers].get(mode="clip"), keys, values, layer, located.seen
  )
  heads = np.arange(len(branch.places), dtype=np.int32)[:, None]
  stream = branch.places // branch.members.shape[1]
  put = located.rows[stream], heads
  found_out, found_lse = (
    x.reshape(-1, *x.shape[2:])[branch.places] for x in found
  )
  out = out.at[put].set(found_out, mode="drop")
  return keys, values, out, lse.at[put].set(found_lse, mode="drop")


def _attend_to_first(query, keys, values, layer, seen):
  """Returns (out, lse) of queries (S, G, M, H) over the first `seen` slots."""
  streams, slots, width = keys.shape[1:]
  one_on_cpu = query.shape[2] == 1 and jax.default_backend() == "cpu"
  tile = min(slots, _CPU_ROW_TILE if one_on_cpu else _TILE)
  scale = width**-0.5

  def take(x, start):
    sizes = (1, streams, tile, width)
    return lax.dynamic_slice(x, (layer, 0, start, 0), sizes)[0]

  def attend_to_tile(i, mixed):
    # The last tile is moved back to end with the store.
    start = jnp.minimum(i * tile, slots - tile)
    slot = start + jnp.arange(tile)
    mask = slot[None, None] < seen[..., None]
    mask &= (slot >= i * tile)[None, None]
    scores = scale * jnp.einsum(
      "sgmh,srh->sgmr",
      query,
      take(keys, start),
      preferred_element_type=jnp.float32,
    )
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    found = jnp.einsum(
      "sgmr,srh->sgmh",
      weights.astype(values.dtype),
      take(values, start),
      preferred_element_type=jnp.float32,
    )
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)[..., 0]
    out = found / jnp.where(total > 0, total, 1)
    return attention.merge(*mixed, out, lse) if mixed else (out, lse)

  if tile == slots:
    return attend_to_tile(0, None)
  nothing = (
    jnp.zeros(query.shape, jnp.float32),
    jnp.full(query.shape[:3], -jnp.inf, jnp.float32),
  )
  tiles = jnp.minimum((seen.max() + tile - 1) // tile, -(-slots // tile))
  return lax.fori_loop(0, tiles, attend_to_tile, nothing)
