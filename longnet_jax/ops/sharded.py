"""Dilated attention of one sequence over many devices, inside `shard_map`.

Each device holds L rows, in order along a mesh axis (section 3 of arXiv
2307.02486). A branch whose segments lie inside the shards is computed where it
is. Of every other branch the devices that share a segment exchange the key and
value rows that the heads keep (eq. 23), about L / r each, and each device
attends with its own query rows: queries never move, and what a device receives
does not grow with the sequence.

    received forward = B K U (slots - 1) M 2 H values a branch,

with M the rows kept of a shard and U the different phases among the query
heads of a key head. Backward receives the same again, and reduce-scatters as
many gradients in float32. The collectives of all branches come first, so that
they can run while the local branches are computed.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import attention, blockwise, exchange, gathered, mixture
from longnet_jax.ops import far as far_lib
from longnet_jax.ops import windows as windows_lib
from longnet_jax.ops.attention import Rows


class Layout(NamedTuple):
  """Static: the mesh axes that the arrays are split over, inside `shard_map`.

  axis_name: of the positions.
  batch_axis: of the examples, or None.
  head_axis: of query and key heads, or None.
  """

  axis_name: str
  batch_axis: str | None = None
  head_axis: str | None = None


def attend(settings, layout, inputs):
  """Returns the mixture's (out, lse) of this device's rows.

  Args:
    settings: static arguments.
    layout: the `Layout`.
    inputs: query, key, value, lengths, segment_ids, seed; lengths count
      global positions, everything else is this device's part.
  """
  query = inputs[0]
  if not query.size:
    return jnp.zeros_like(query), lax.full_like(
      query, -jnp.inf, jnp.float32, query.shape[:3]
    )
  length = query.shape[1] * lax.axis_size(layout.axis_name)
  settings = _without_zero_keys(settings, length)
  return _attend(settings, layout, *inputs)


def _without_zero_keys(settings, length):
  """Returns settings with padding="mask" if that computes the same."""
  if settings.padding == "mask":
    return settings
  for w, r in settings.branches:
    w = min(w, length)
    if not settings.is_causal and (length % w or w % r):
      raise ValueError(
        f"padding='zeros' adds zero keys to segments of {w} at rate {r} in a "
        f"length of {length}, which a sharded sequence does not have; use "
        "padding='mask', is_causal=True, or segments and rates that divide"
      )
  return settings._replace(padding="mask")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(settings, layout, *inputs):
  return _forward(settings, layout, *inputs)[0]


def _forward(settings, layout, *inputs):
  """Returns (out, lse) and what the backward pass needs."""
  shard = _make_shard(settings, layout, *inputs)
  arrived = [_gather(shard, branch) for branch in shard.far]
  mixed = []
  if shard.near.branches:
    mixed.append(mixture.forward(shard.near, inputs, shard.part))
  for branch, keys in zip(shard.far, arrived, strict=True):
    out, lse = _over_heads(shard, branch, keys, _forward_head)
    mixed.append(
      (
        _put_back(shard, branch, out, 0),
        _put_back(shard, branch, lse, -jnp.inf),
      )
    )
  out, lse = functools.reduce(
    lambda one, other: attention.merge(*one, *other), mixed
  )
  out, lse = out.astype(shard.query.dtype), lse.astype(jnp.float32)
  return (out, lse), (*inputs, out, lse)


def _backward(settings, layout, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  *inputs, out, lse = residuals
  shard = _make_shard(settings, layout, *inputs)
  arrived = [_gather(shard, branch) for branch in shard.far]
  terms = mixture.backward_terms(settings, out, lse, *grads)
  found = [
    _backward_far(shard, branch, keys, terms)
    for branch, keys in zip(shard.far, arrived, strict=True)
  ]
  if shard.near.branches:
    found.append(mixture.backward(shard.near, inputs, terms, shard.part))
  totals = (sum(parts) for parts in zip(*found, strict=True))
  dtype = shard.query.dtype
  return *(x.astype(dtype) for x in totals), None, None, None


_attend.defvjp(_forward, _backward)


class _Shard(NamedTuple):
  """What one device holds, and how the branches are computed."""

  settings: tuple
  query: jax.Array
  key: jax.Array
  value: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  seed: jax.Array | None
  part: mixture.Part  # of the near branches
  near: tuple  # settings of the branches inside the shards
  far: list
  start: jax.Array  # global position of the first row


def _make_shard(settings, layout, query, key, *rest):
  """Splits the branches into near and far ones."""
  batch, length, num_heads, _ = query.shape
  head_part, head_parts = _index(layout.head_axis)
  shards = lax.axis_size(layout.axis_name)
  near, far = far_lib.plan(
    settings,
    length,
    num_heads * head_parts,
    num_heads=num_heads,
    kv_heads=key.shape[2],
    shards=shards,
    axis_name=layout.axis_name,
  )
  far = [far_lib.of_heads(branch, head_part) for branch in far]
  start = lax.axis_index(layout.axis_name) * length
  part = mixture.Part(
    example=_index(layout.batch_axis)[0] * batch,
    position=start,
    head=head_part * num_heads,
    num_heads=num_heads * head_parts if head_parts > 1 else None,
    branches=tuple(index for index, _ in near),
    dtype=attention.accumulator(query.dtype),
  )
  near = settings._replace(branches=tuple(branch for _, branch in near))
  return _Shard(settings, query, key, *rest, part, near, far, start)


def _index(axis_name):
  """Returns this device's index along an axis, and how many there are."""
  if axis_name is None:
    return 0, 1
  return lax.axis_index(axis_name), lax.axis_size(axis_name)


def _head_phases(far):
  return far.phases[far.lanes]


def _gather(shard, far):
  """Returns key and value rows of all slots (B, G, n, 2 H), their `Rows`."""
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
    dtype = mixture.product_dtype(shard.query.dtype)
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


def _backward_far(shard, far, keys, terms):
  """Returns dquery, dkey, dvalue of a far branch, of this device's rows."""
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
