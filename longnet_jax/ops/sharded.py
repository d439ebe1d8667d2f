"""How one call is split over devices: near branches and far ones. All static.

Each device holds L rows, in order along a mesh axis (section 3 of arXiv
2307.02486). A branch whose segments lie inside the shards is near: it is
computed where it is. Of a far one the devices that share a segment exchange the
key and value rows that the heads keep (eq. 23), about L / r each; queries never
move, and what a device receives does not grow with the sequence:

    received forward = B K U (slots - 1) M 2 H values a branch,

with M the rows kept of a shard and U the different phases among the query heads
of a key head. Backward receives the same again, and reduce-scatters as many
gradients, in float32.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
import numpy as np

from longnet_jax import pattern
from longnet_jax.ops import arguments, exchange, near


class Layout(NamedTuple):
  """The mesh axes that arrays are split over, inside `jax.shard_map`.

  axis_name: of the positions.
  batch_axis: of the examples, or None.
  head_axis: of query and key heads, or None.
  """

  axis_name: str
  batch_axis: str | None = None
  head_axis: str | None = None


class Far(NamedTuple):
  """A branch (w, r) whose segments lie on several devices.

  What is sent of a key head is a *lane* for each of the U different phases that
  its query heads have.

  index: its place among all branches.
  exchange: which devices send what to which.
  piece: rows of a piece of a shard; each lies in one segment.
  phases: (parts, K, U), those of the lanes; a line for each part that the heads
    are split into.
  lanes: (parts, K, G), the lane that each query head reads.
  """

  index: int
  w: int
  r: int
  exchange: exchange.Exchange
  piece: int
  phases: np.ndarray
  lanes: np.ndarray

  @property
  def is_regular(self) -> bool:
    """Whether all that is gathered are rows of one segment, without holes."""
    return self.exchange.aligned and not self.piece % self.r

  @property
  def in_order(self) -> bool:
    """Whether the lanes are what a kernel takes: one, or those of the heads."""
    order = np.arange(self.lanes.shape[-1])
    return self.phases.shape[-1] == 1 or bool((self.lanes == order).all())

  def rows(self, length: int) -> int:
    """Returns M: places for rows that are kept of a shard of `length` rows."""
    return length // self.piece * -(-self.piece // self.r)


def find_place(layout: Layout, query: jax.Array) -> near.Place:
  """Returns where a device's part lies in the whole."""
  index = lambda name: lax.axis_index(name) if name else 0
  return near.Place(
    example=index(layout.batch_axis) * query.shape[0],
    start=index(layout.axis_name) * query.shape[1],
    head=index(layout.head_axis) * query.shape[2],
    parts=lax.axis_size(layout.head_axis) if layout.head_axis else 1,
  )


def split(
  call: near.Call, layout: Layout
) -> tuple[list[near.Branch], list[Far]]:
  """Returns the near branches of a call and the far ones.

  Raises:
    ValueError: padding="zeros" would need zero keys on several devices.
  """
  _, length, num_heads, _ = call.inputs.query.shape
  settings = call.settings
  shards = lax.axis_size(layout.axis_name)
  zeros = settings.padding == "zeros" and not settings.is_causal
  if shards > 1 and zeros and call.inputs.lengths is not None:
    raise ValueError(
      "padding='zeros' cannot be combined with key_value_seq_lengths over "
      "several devices; use padding='mask' or one device"
    )
  return near_and_far(
    settings,
    length=length,
    num_heads=num_heads,
    kv_heads=call.inputs.key.shape[2],
    parts=call.place.parts,
    shards=shards,
    axis_name=layout.axis_name,
  )


def near_and_far(
  settings: arguments.Settings,
  *,
  length: int,
  num_heads: int,
  kv_heads: int,
  parts: int,
  shards: int,
  axis_name: str,
) -> tuple[list[near.Branch], list[Far]]:
  """Returns the near branches and the far ones.

  Args:
    settings: the `arguments.Settings`.
    length: rows of a shard.
    num_heads: query heads of a device.
    kv_heads: key heads of a device.
    parts: how many the heads are split into.
    shards: devices along the axis.
    axis_name: the axis of the positions.

  Raises:
    ValueError: padding="zeros" would need zero keys.
  """
  if shards > 1:
    _refuse_zero_keys(settings, length * shards)
  near_branches, far_branches = [], []
  for index, (w, r) in enumerate(settings.branches):
    w = min(w, length * shards)
    if shards == 1 or length % w == 0:
      near_branches.append(near.Branch(index, w, r))
      continue
    w = max(w, r)  # a segment of r rows still holds a sequence shorter than r
    phases = pattern.phases(parts * num_heads, r, settings.head_phase)
    found = exchange.make_exchange(
      w,
      length,
      shards,
      is_causal=settings.is_causal,
      axis_name=axis_name,
    )
    lanes = _lanes(phases.reshape(parts, kv_heads, -1))
    piece = math.gcd(w, length)
    far_branches.append(Far(index, w, r, found, piece, *lanes))
  return near_branches, far_branches


def _refuse_zero_keys(settings, length):
  """Raises ValueError where a sharded sequence would need zero keys."""
  if settings.padding == "mask" or settings.is_causal:
    return
  for w, r in settings.branches:
    w = min(w, length)
    if length % w or w % r:
      raise ValueError(
        f"padding='zeros' adds zero keys to segments of {w} at rate {r} in a "
        f"length of {length}, which a sharded sequence does not have; use "
        "padding='mask', is_causal=True, or segments and rates that divide"
      )


def received_bytes(
  far: Far, *, batch: int, length: int, head_width: int, itemsize: int
) -> int:
  """Returns the most that one gather of keys and values brings to a device."""
  values = (far.exchange.slots - 1) * far.rows(length) * 2 * head_width
  return batch * far.phases[0].size * values * itemsize


def _lanes(phases):
  """Returns the lanes' phases (parts, K, U), and the lane of each head.

  Lanes are in the order in which heads first read them.

  Args:
    phases: those of the heads, (parts, K, G).
  """
  groups = phases.reshape(-1, phases.shape[-1]).tolist()
  found = [list(dict.fromkeys(group)) for group in groups]
  width = max(map(len, found))
  filled = [np.resize(lanes, width) for lanes in found]
  of_heads = [
    [lanes.index(phase) for phase in group]
    for lanes, group in zip(found, groups, strict=True)
  ]
  return (
    np.array(filled, np.int32).reshape(*phases.shape[:2], width),
    np.array(of_heads, np.int32).reshape(phases.shape),
  )
