"""One far branch on one device: local queries, keys from all who share.

Rows are selected before they are sent, and go back by the same numbers
(`far.ordinal`). Heads are attended to one after the other, or a few at once.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import attention, blockwise, exchange, gathered
from longnet_jax.ops import far as far_lib
from longnet_jax.ops import problem as problem_lib
from longnet_jax.ops import windows as windows_lib
from longnet_jax.ops.attention import Rows


class Shard(NamedTuple):
  """What one device holds, and how the branches are computed."""

  settings: tuple
  query: jax.Array
  key: jax.Array
  value: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  seed: jax.Array | None
  part: problem_lib.Part  # of the near branches
  near: tuple  # settings of the branches inside the shards
  far: list
  start: jax.Array  # global position of the first row


def _head_phases(far):
  return far.phases[far.lanes]


def gather(shard, far):
  """Returns what `forward` and `backward` need from the other devices.

  Key and value rows of all slots (B, G, n, 2 H), in whose order are also their
  ids (B, G, n) and global positions (G, n).
  """
  batch, length, kv_heads, _ = shard.key.shape
  position, _ = far_lib.kept(shard.start[None], far, far.phases, length)
  local = jnp.minimum(position - shard.start, length - 1)
  head = jnp.repeat(jnp.arange(kv_heads), len(far.phases) // kv_heads)
  both = jnp.concatenate([shard.key, shard.value], axis=-1)
  rows = both[:, local, head[:, None]]
  documents = None
  if shard.segment_ids is not None:
    documents = exchange.gather(far.exchange, shard.segment_ids[:, local])
  arrived = exchange.gather(far.exchange, rows)

  device = exchange.first_device(far.exchange) + jnp.arange(far.exchange.slots)
  first, last = exchange.sharing(
    shard.start // length, far.branch[0], length, _shards(far)
  )
  position, valid = far_lib.kept(
    device[:, None] * length, far, far.phases[None], length
  )
  valid &= ((device >= first) & (device <= last))[:, None, None]
  position, valid = (
    jnp.moveaxis(x, 0, 1).reshape(len(far.phases), -1)
    for x in (position, valid)
  )
  shape = (batch, *position.shape)
  if documents is None:
    documents = jnp.zeros(shape, jnp.int32)
  seen = jnp.broadcast_to(valid[None], shape)
  if shard.lengths is not None:
    seen &= position[None] < shard.lengths[:, None, None]
  ids = jnp.where(seen, documents, attention.HIDDEN_KEY)
  arrived = jnp.where(seen[..., None], arrived, jnp.zeros((), arrived.dtype))
  return arrived, ids, position


def _shards(far):
  return lax.axis_size(far.exchange.axis_name)


def _over_heads(shard, far, keys, run, *more):
  """Returns `run(...)` of every example and head, stacked (B, N, ...)."""
  batch, length, num_heads, _ = shard.query.shape
  phases = _head_phases(far)
  position, valid = far_lib.kept(shard.start[None], far, phases, length)
  local = jnp.minimum(position - shard.start, length - 1)
  bounds = _bounds(shard, far)
  sizes = windows_lib.device_sizes()

  def one(index):
    example, head = index // num_heads, index % num_heads
    pick = functools.partial(
      _pick, example=example, head=head, rows=local[head], valid=valid[head]
    )
    masks = _masks(shard, far, keys, example, head, position[head], valid[head])
    dtype = problem_lib.product_dtype(shard.query.dtype)
    query = pick(shard.query).astype(dtype) * shard.settings.scale
    arrived = keys[0][example, far.lanes[head]].astype(dtype)
    key, value = jnp.split(arrived, 2, axis=-1)
    shape = blockwise.Shape(
      causal=False,
      tile=far.key_tile,
      block=sizes.block,
      key_block=sizes.key_block,
      dropout_rate=shard.settings.dropout_rate,
    )
    attend = (query, key, value), (*masks, bounds), shape
    return run(shard, pick, attend, *more)

  count = batch * num_heads
  limit = max(1, sizes.scores // (min(far.tile, sizes.block) * far.key_tile))
  together = max(d for d in range(1, count + 1) if not count % d and d <= limit)
  index = jnp.arange(count).reshape(-1, together)
  if together == 1:
    found = lax.map(one, index[:, 0])
  else:
    found = lax.map(jax.vmap(one), index)
  lead = 1 if together == 1 else 2
  return jax.tree.map(
    lambda x: x.reshape(batch, num_heads, *x.shape[lead:]), found
  )


def _pick(x, example, head, rows, valid, fill=0):
  """Returns rows (M, ...) of one head of x (B, L, N, ...)."""
  found = x.at[example, rows, head].get(mode="promise_in_bounds")
  shape = valid.shape + (1,) * (found.ndim - 1)
  return jnp.where(valid.reshape(shape), found, jnp.asarray(fill, x.dtype))


def _bounds(shard, far):
  """Returns for each tile of queries which tiles of keys it can see."""
  length = shard.query.shape[1]
  device = shard.start // length
  slot = exchange.first_device(far.exchange)
  first, last = exchange.sharing(device, far.branch[0], length, _shards(far))
  stop = (jnp.arange(far.rows // far.tile) + 1) * far.tile
  stop += (device - slot) * far.rows
  if not shard.settings.is_causal:
    stop = jnp.full_like(stop, 0) + (last - slot + 1) * far.rows
  start = jnp.full_like(stop, 0) + (first - slot) * far.rows
  return jnp.stack([start // far.key_tile, -(-stop // far.key_tile)], axis=-1)


def _masks(shard, far, keys, example, head, position, valid):
  """Returns the `Rows` of one head's queries and of the keys it meets."""
  _, key_ids, key_position = keys
  lane = far.lanes[head]
  key_position = key_position[lane]
  documents = jnp.zeros_like(position)
  if shard.segment_ids is not None:
    length = shard.query.shape[1]
    local = jnp.minimum(position - shard.start, length - 1)
    documents = shard.segment_ids[example, local]
  found = []
  query_ids = jnp.where(valid, documents, attention.HIDDEN_QUERY)
  for side, (ids, where) in enumerate(
    ((query_ids, position), (key_ids[example, lane], key_position))
  ):
    hashes = None
    if shard.seed is not None:
      hashes = attention.row_bits(
        shard.seed,
        far.index,
        shard.part.example + example,
        shard.part.head + head,
        where,
        side,
      )
    found.append(
      Rows(
        ids=ids,
        positions=where if shard.settings.is_causal else None,
        hashes=hashes,
        segments=None if far.exchange.aligned else where // far.branch[0],
      )
    )
  return found


def forward(shard, far, keys):
  """Returns out (B, L, N, H) and lse (B, L, N) of a branch."""
  out, lse = _over_heads(shard, far, keys, _forward_head)
  return _put_back(shard, far, out, 0), _put_back(shard, far, lse, -jnp.inf)


def _forward_head(shard, pick, attend):
  """Returns out (M, H) and lse (M,) of one head."""
  del shard, pick
  tensors, masks, shape = attend
  return gathered.forward(*tensors, *masks, shape=shape)


def _backward_head(shard, pick, attend, terms):
  """Returns dquery (M, H) and the gradient of key and value (n, 2 H)."""
  tensors, masks, shape = attend
  dout, lse, delta = terms
  dout = pick(dout).astype(tensors[0].dtype)
  lse, delta = pick(lse, fill=jnp.inf), pick(delta)
  if not shard.settings.mixing_gradient:
    out, _ = gathered.forward(*tensors, *masks, shape=shape)
    delta += (dout.astype(out.dtype) * out).sum(-1)
  dquery, *dkeys = gathered.backward(
    *tensors, dout, lse, delta, *masks, shape=shape
  )
  return dquery * shard.settings.scale, jnp.concatenate(dkeys, axis=-1)


def backward(shard, far, keys, terms):
  """Returns dquery, dkey, dvalue (B, L, ...) of a branch, summed over devices.

  `terms` are `mixture.backward_terms`.
  """
  batch, length, kv_heads, _ = shard.key.shape
  dquery, dkeys = _over_heads(shard, far, keys, _backward_head, terms)
  shape = (batch, len(far.phases), *dkeys.shape[2:])
  total = lax.full_like(dkeys, 0, shape=shape).at[:, far.lanes].add(dkeys)
  total = exchange.scatter(far.exchange, total)
  total = _put_back(shard, far, total, 0, far.phases)
  total = total.reshape(batch, length, kv_heads, -1, total.shape[-1]).sum(3)
  dquery = _put_back(shard, far, dquery, 0)
  return dquery, *jnp.split(total, 2, axis=-1)


def _put_back(shard, far, packed, fill, phases=None):
  """Returns (B, L, lanes, ...) from kept rows (B, lanes, M, ...)."""
  if phases is None:
    phases = _head_phases(far)
  w, r = far.branch
  position = shard.start + jnp.arange(shard.query.shape[1])[:, None]
  kept = position % w % r == phases[None]
  before = far_lib.ordinal(shard.start[None], far.branch, phases)[None]
  row = far_lib.ordinal(position, far.branch, phases[None]) - before
  row = jnp.clip(row, 0, far.rows - 1)
  found = packed[:, jnp.arange(len(phases))[None], row]
  kept = kept.reshape((1, *kept.shape) + (1,) * (found.ndim - 3))
  return jnp.where(kept, found, jnp.asarray(fill, found.dtype))
