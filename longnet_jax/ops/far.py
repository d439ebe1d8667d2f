"""One far branch on one device: its own queries, keys of all who share.

A causal far branch is a near one plus the past: the device's own rows, square
and causal, and the rows of the devices before it, a rectangle whose keys are a
prefix of what was gathered. Rows are listed in the order of their positions, a
list for each head. Where segments do not begin at shards, a shard is cut into
pieces that lie in one segment each, and the phase of a piece is rotated to

    (phase - start of the piece in its segment) mod r,

so that selecting stays a reshape; where r does not divide a piece, its last
place is a hole. Ids then tell which places a row sees.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from longnet_jax.ops import (
  attention,
  exchange,
  kernels,
  near,
  selection,
  sharded,
)


class Keys(NamedTuple):
  """Rows of keys as they are sent, in lanes (`sharded.Far`).

  both: key and value, (B, 1, n, K U, 2 H).
  documents: ids (B, 1, n, K U) each.
  """

  both: jax.Array
  documents: tuple


def make_branch(call: near.Call, far: sharded.Far) -> near.Branch:
  """Returns a far branch as a near one, whose kernel talks to other devices.

  Its segments are the pieces of this device, cut at the rotated phases. The
  kernel has the functions of any other, but gets keys in lanes, and makes the
  masks itself.
  """
  phases = call.local(call.all_phases(far.r))[:, None], call.local(far.phases)
  cuts = tuple(_cut(call, far, x) for x in phases)
  others = None
  if not call.dense:
    # Sent first, so that near branches are computed meanwhile. In a tree the
    # rows to send are not there yet: they are selected from those of a parent.
    key, value = (selection.select(x, cuts[1]) for x in call.inputs[1:3])
    others = _gather(far, _own(call, cuts[1], key, value))
  kernel = kernels.Kernel(
    functools.partial(_forward, call, far, others),
    functools.partial(_backward, call, far, others),
  )
  return near.Branch(far.index, far.piece, far.r, far=(kernel, cuts))


def _own(call, cut, key, value):
  """Returns the `Keys` of the device itself."""
  both = jnp.concatenate([key, value], axis=-1)
  documents = (selection.select_ids(x, cut) for x in call.inputs.documents)
  return jax.tree.map(_one_list, Keys(both, tuple(documents)))


def _gather(far, own):
  """Returns the `Keys` of all slots."""
  return jax.tree.map(lambda x: exchange.gather(far.exchange, x), own)


def _forward(call, far, others, query, key, value, mask, *, scale):
  """Returns out (B, P, R, N, H) and lse (B, P, R, N).

  Args:
    call: the `near.Call`.
    far: the `sharded.Far`.
    others: the `Keys` of all slots, if they have come already.
    query: the device's own rows, (B, P, R, N, H), of P pieces.
    key: (B, P, R, K U, H), in lanes.
    value: as key.
    mask: causal or not.
    scale: of the scores.
  """
  del mask, scale
  seen = _rectangles(call, far, others, query, key, value)
  found = _attend_rectangles(call, *seen)
  return tuple(x.reshape(query.shape[: x.ndim]) for x in found)


def _backward(
  call, far, others, query, key, value, mask, out, lse, dout, dlse, *, scale
):
  """Returns dquery, dkey, dvalue of the device's own rows, over all devices."""
  del mask
  rows, rectangles = _rectangles(call, far, others, query, key, value)
  terms = (None if x is None else _one_list(x) for x in (out, lse, dout, dlse))
  terms = tuple(terms)
  dquery, dboth = [], []
  for tensors, mask in rectangles:
    found, dkey, dvalue = call.kernel.backward(
      rows, *tensors, mask, *terms, scale=scale
    )
    dquery.append(found)
    dboth.append(_to_lanes(call, far, jnp.concatenate([dkey, dvalue], -1)))
  *own, theirs = dboth
  padding = [(0, 0)] * theirs.ndim
  padding[2] = (0, far.exchange.slots * rows.shape[2] - theirs.shape[2])
  total = exchange.scatter(far.exchange, jnp.pad(theirs, padding))
  total = sum(own, start=total)
  total = total.reshape(*key.shape[:-1], -1)
  return sum(dquery).reshape(query.shape), *jnp.split(total, 2, axis=-1)


def _attend_rectangles(call, query, rectangles):
  """Returns out and lse of the query rows over all rectangles of keys."""
  found = [
    call.kernel.forward(query, *tensors, mask, scale=call.settings.scale)
    for tensors, mask in rectangles
  ]
  return found[0] if len(found) == 1 else attention.merge(*found[0], *found[1])


def _rectangles(call, far, others, query, key, value):
  """Returns the query rows (B, 1, M, N, H), and what these see.

  That is ((key, value), mask) of the device's own rows, and of the past; or
  without causality, of all that was gathered.
  """
  own = _own(call, _cut(call, far, call.local(far.phases)), key, value)
  others = others or _gather(far, own)
  query = _one_list(query).astype(call.product)
  first = exchange.first_device(far.exchange)
  if not call.settings.is_causal:
    devices = first + jnp.arange(far.exchange.slots)
    return query, [_rectangle(call, far, others, devices)]
  device = _device(call)
  square = _rectangle(call, far, own, device[None], is_causal=True)
  # The last slot is nobody's past: it is the device itself under shifts, the
  # last device of a group otherwise.
  slots, rows = far.exchange.slots - 1, query.shape[2]
  others = jax.tree.map(lambda x: x[:, :, : slots * rows], others)
  lengths = None
  if far.exchange.own_slot is None:
    # A group, whose later devices are the future.
    lengths = (device - first) * rows
  past = _rectangle(
    call, far, others, first + jnp.arange(slots), lengths=lengths
  )
  return query, [square, past]


def _rectangle(
  call: near.Call,
  far: sharded.Far,
  keys: Keys,
  devices,
  *,
  is_causal=False,
  lengths=None,
):
  """Returns (key, value) as a kernel takes them, and their mask.

  Args:
    call: the `near.Call`.
    far: the `sharded.Far`.
    keys: the `Keys` of some devices.
    devices: which these are, in order.
    is_causal: whether they are the device itself.
    lengths: how many of the keys are seen, or None for all.
  """
  inputs, w = call.inputs, far.w
  phases = call.all_phases(far.r)
  rows = _positions(call, far, _device(call)[None], call.local(phases)[:, None])
  both, ids = keys.both, []
  if not far.is_regular or inputs.lengths is not None:
    position, seen = _seen(call, far, devices)
    # Nobody looks at the others: there may be NaN, and 0 * NaN is NaN.
    both = jnp.where(seen[..., None], both, jnp.zeros((), both.dtype))
    ids.append((rows[0][None, None] // w, jnp.where(seen, position // w, -1)))
  query_cut = _cut(call, far, call.local(phases)[:, None])
  for x, others in zip(inputs.documents, keys.documents, strict=True):
    ids.append((_one_list(selection.select_ids(x, query_cut)), others))
  ids = tuple((x, _to_heads(call, far, y)) for x, y in ids)
  bits = None
  if inputs.seed is not None:
    columns, _ = _positions(call, far, devices, call.local(phases)[:, None])
    bits = tuple(
      call.bits(far.index, x[None], side)
      for side, x in enumerate((rows[0], columns))
    )
  both = _to_heads(call, far, both).astype(call.product)
  rate = call.settings.dropout_rate
  mask = kernels.Mask(is_causal, lengths, ids, bits, rate)
  return tuple(jnp.split(both, 2, axis=-1)), mask


def _seen(call: near.Call, far: sharded.Far, devices):
  """Returns positions (1, 1, n, K U) and which are seen, of any device's rows.

  Those are real rows, of a device that shares a segment, before the length.
  """
  length = call.inputs.query.shape[1]
  shards = lax.axis_size(far.exchange.axis_name)
  position, real = _positions(call, far, devices, call.local(far.phases))
  first, last = exchange.sharing(_device(call), far.w, length, shards)
  device = lax.div(position, np.int32(length))
  seen = real & (position >= 0) & (device >= first) & (device <= last)
  position, seen = position[None, None], seen[None, None]
  if call.inputs.lengths is not None:
    seen &= position < call.inputs.lengths[:, None, None, None]
  return position, seen


def _device(call: near.Call):
  """Returns the number of the device along the axis of the positions."""
  return lax.div(call.place.start, np.int32(call.inputs.query.shape[1]))


def _cut(call: near.Call, far: sharded.Far, phases):
  """Returns how the device's rows are cut; phases (K, G) as of segments."""
  rotated = _rotated(call, far, _device(call)[None], phases)
  return selection.Cut(far.piece, far.r, rotated[0], call.way)


def _rotated(call: near.Call, far: sharded.Far, devices, phases):
  """Returns the phases (devices, pieces or 1, K, G) of the pieces."""
  w, r = far.w, far.r
  if far.piece % r == 0:
    return phases[None, None]
  length = call.inputs.query.shape[1]
  start = np.arange(0, length, far.piece, dtype=np.int32)[None]
  start = (devices[:, None] * length + start) % w
  return (phases[None, None] - start[..., None, None]) % r


def _positions(call: near.Call, far: sharded.Far, devices, phases):
  """Returns the positions (n, N) of all places, and which of them are rows."""
  length, r = call.inputs.query.shape[1], far.r
  rotated = _rotated(call, far, devices, phases)[:, :, None]
  row = r * np.arange(-(-far.piece // r), dtype=np.int32)
  inside = rotated + row[None, None, :, None, None]
  start = np.arange(0, length, far.piece, dtype=np.int32)[None]
  start = (devices[:, None] * length + start)[..., None, None, None]
  position = start + inside
  real = jnp.broadcast_to(inside < far.piece, position.shape)
  heads = phases.size
  return position.reshape(-1, heads), real.reshape(-1, heads)


def _one_list(rows):
  """Returns (B, 1, P R, N, ...), one list of a device's (B, P, R, N, ...)."""
  return rows.reshape(rows.shape[0], 1, -1, *rows.shape[3:])


def _to_heads(call: near.Call, far: sharded.Far, x):
  """Returns (B, 1, n, K or N, ...) from lanes (B, 1, n, K U, ...)."""
  if far.in_order or x.shape[3] == 1:
    return x
  reads = _reads(call, far)
  reads = reads.reshape(1, 1, 1, *reads.shape, *[1] * (x.ndim - 4))
  x = x.reshape(*x.shape[:3], reads.shape[3], -1, 1, *x.shape[4:])
  x = jnp.where(reads, x, jnp.zeros((), x.dtype)).sum(4, dtype=x.dtype)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _to_lanes(call: near.Call, far: sharded.Far, x):
  """The transpose of `_to_heads`."""
  if far.in_order:
    return x
  reads = _reads(call, far)
  reads = reads.reshape(1, 1, 1, *reads.shape, *[1] * (x.ndim - 4))
  x = x.reshape(*x.shape[:3], reads.shape[3], 1, -1, *x.shape[4:])
  x = jnp.where(reads, x, jnp.zeros((), x.dtype)).sum(5)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _reads(call: near.Call, far: sharded.Far):
  """Returns (K, U, G), whether a head reads a lane."""
  lane = np.arange(far.phases.shape[-1], dtype=np.int32)[None, :, None]
  return lane == call.local(far.lanes)[:, None]
