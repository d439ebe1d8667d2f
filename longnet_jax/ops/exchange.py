"""Which shards of a sequence hear from which, and the collectives for it.

The sequence lies in order along a mesh axis of P devices, L rows each. The
devices that share a segment of w rows exchange rows, in one of two ways:

- groups: an all-gather among D consecutive devices, if groups of equal size
  (all that a collective allows) cover every segment; w = D L is the usual case;
- shifts: one permutation for each distance to a device of the same segment,
  where no group but a much larger one would cover the segments.

Whichever brings fewer rows is taken. Either way a device ends up with the rows
of `slots` consecutive devices, in order, those that it does not need hidden.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Shaped
import numpy as np


class Exchange(NamedTuple):
  """A static plan for one segment length.

  axis_name: the mesh axis.
  slots: devices whose rows a device holds afterwards, itself included.
  own_slot: the slot of the device itself under shifts; None under groups.
  pairs: for each slot the (source, target) pairs of its permutation.
  aligned: whether all slots always belong to one and the same segment.
  """

  axis_name: str
  slots: int
  own_slot: int | None
  pairs: tuple[tuple[tuple[int, int], ...], ...]
  aligned: bool


def make_exchange(
  w: int, shard: int, shards: int, *, is_causal: bool, axis_name: str
) -> Exchange:
  """Returns the plan for segments of `w` rows over shards of `shard` rows."""
  device = np.arange(shards)
  first, last = sharing(device, w, shard, shards)
  if is_causal:
    last = device
  size = next(
    d
    for d in range(1, shards + 1)
    if shards % d == 0 and (first // d == last // d).all()
  )
  past, future = int((device - first).max()), int((last - device).max())
  if past + future < size - 1:
    pairs = tuple(
      tuple(
        (int(p + shift), int(p))
        for p in device
        if first[p] <= p + shift <= last[p]
      )
      for shift in range(-past, future + 1)
    )
    return Exchange(axis_name, past + future + 1, past, pairs, False)
  start = device // size * size * shard
  segment = (start + size * shard - 1) // w
  return Exchange(
    axis_name, size, None, (), bool((start // w == segment).all())
  )


def sharing(device, w: int, shard: int, shards: int):
  """Returns the first and the last device that `device` shares a segment with.

  Works on ints, NumPy arrays and traced arrays alike.
  """
  first = device * shard // w * w // shard
  end = ((device + 1) * shard - 1) // w * w + w
  numpy = jnp if isinstance(end, jax.Array) else np
  return first, numpy.minimum((end - 1) // shard, shards - 1)


def first_device(exchange: Exchange) -> Int[Array, ""]:
  """Returns the device of slot 0; out of range where there is none."""
  device = lax.axis_index(exchange.axis_name)
  if exchange.own_slot is None:
    return device // exchange.slots * exchange.slots
  return device - exchange.own_slot


def gather(
  exchange: Exchange, rows: Shaped[Array, "B S M *rest"]
) -> Shaped[Array, "B S n *rest"]:
  """Returns the rows of all slots, n = slots * M; eq. 23's all-gather."""
  if exchange.own_slot is None:
    return lax.all_gather(
      rows,
      exchange.axis_name,
      axis=2,
      tiled=True,
      axis_index_groups=_groups(exchange),
    )
  found = [
    rows
    if slot == exchange.own_slot
    else lax.ppermute(rows, exchange.axis_name, pairs)
    for slot, pairs in enumerate(exchange.pairs)
  ]
  return jnp.concatenate(found, axis=2)


def scatter(
  exchange: Exchange, rows: Float[Array, "B S n *rest"]
) -> Float[Array, "B S M *rest"]:
  """Returns for each own row the sum over all that gathered it.

  The transpose of `gather`, summed in the type of `rows`.
  """
  if exchange.own_slot is None:
    return lax.psum_scatter(
      rows,
      exchange.axis_name,
      scatter_dimension=2,
      tiled=True,
      axis_index_groups=_groups(exchange),
    )
  parts = jnp.split(rows, exchange.slots, axis=2)
  total = parts[exchange.own_slot]
  for slot, pairs in enumerate(exchange.pairs):
    if slot != exchange.own_slot:
      back = [(target, source) for source, target in pairs]
      total += lax.ppermute(parts[slot], exchange.axis_name, back)
  return total


def _groups(exchange):
  """Returns the lists of devices that talk; None for all of them."""
  shards = lax.axis_size(exchange.axis_name)
  if exchange.slots == shards:
    return None
  return np.arange(shards).reshape(-1, exchange.slots).tolist()
