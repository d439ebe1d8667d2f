"""Far branches: those whose segments lie on several devices. All static.

Rows of one phase are numbered over the whole sequence, `ordinal`, so that the
rows that a shard keeps are a range, whether or not segments, rates and shards
divide one another.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax import pattern
from longnet_jax.ops import exchange
from longnet_jax.ops import windows as windows_lib


class Far(NamedTuple):
  """A branch (w, r) whose segments lie on several devices.

  What is sent of a key head is a lane for each phase that its query heads
  have. `phases` (parts, G) are those of the lanes, and `lanes` (parts, N) the
  lane of each query head, a line for each part that the heads are split into;
  `of_heads` picks one.

  index: the branch's place among all.
  branch: (w, r).
  exchange: which devices send what to which.
  rows: the most rows that a device keeps; whole tiles.
  tile: query rows of a tile.
  key_tile: key rows of a tile; divides rows * slots.
  """

  index: int
  branch: tuple[int, int]
  exchange: exchange.Exchange
  rows: int
  tile: int
  key_tile: int
  phases: np.ndarray | jax.Array
  lanes: np.ndarray | jax.Array


def plan(
  settings, length, all_heads, *, num_heads, kv_heads, shards, axis_name
) -> tuple[list[tuple[int, tuple[int, int]]], list[Far]]:
  """Splits the branches into near ones, (index, (w, r)), and far ones.

  Args:
    settings: static arguments of the operation.
    length: rows of a shard.
    all_heads: query heads over all devices.
    num_heads: query heads of a device.
    kv_heads: key heads of a device.
    shards: devices along the axis.
    axis_name: the axis.
  """
  near, far = [], []
  for index, (w, r) in enumerate(settings.branches):
    w = min(w, length * shards)
    if length % w == 0:
      near.append((index, (w, r)))
      continue
    branch = max(w, r), r
    phases = pattern.phases(all_heads, r, settings.head_phase)
    found = exchange.plan(
      branch[0],
      length,
      shards,
      is_causal=settings.is_causal,
      axis_name=axis_name,
    )
    edges = np.arange(shards + 1)[:, None] * length
    counts = np.diff(ordinal(edges, branch, np.unique(phases)), axis=0)
    tiles = _tiles(max(1, int(counts.max())), found.slots)
    lanes = _lanes(phases, num_heads, kv_heads)
    far.append(Far(index, branch, found, *tiles, *lanes))
  return near, far


def of_heads(far: Far, part) -> Far:
  """Returns the branch with the phases and lanes of one part of the heads."""
  return far._replace(
    phases=jnp.asarray(far.phases)[part], lanes=jnp.asarray(far.lanes)[part]
  )


def received_bytes(far: Far, *, batch, head_width, itemsize) -> int:
  """Returns the most that one gather of keys and values brings to a device.

      B G (slots - 1) M 2 H values

  Backward brings the same again, and as many float32 gradients.
  """
  lanes = far.phases.shape[-1]
  values = batch * lanes * (far.exchange.slots - 1) * far.rows * 2 * head_width
  return values * itemsize


def _tiles(rows, slots):
  """Returns rows (filled up to whole tiles), tile and key tile."""
  sizes = windows_lib.device_sizes()
  if rows > sizes.whole:
    tiles = -(-rows // sizes.tile)
    tile = -(-rows // (tiles * sizes.block)) * sizes.block
    return tile * -(-rows // tile), tile, tile
  together = max(
    d
    for d in range(1, slots + 1)
    if slots % d == 0 and (d == 1 or d * rows <= sizes.tile)
  )
  return rows, rows, rows * together


def _lanes(phases, num_heads, kv_heads):
  """Returns what to send of each key head: rows of every phase it is read at.

  Args:
    phases: the phase of each head of all devices.
    num_heads: heads of a device.
    kv_heads: key heads of a device.

  Returns:
    phases (devices, kv_heads * U) and the lane of each head (devices, N).
  """
  phases = phases.reshape(-1, kv_heads, num_heads // kv_heads)
  distinct = [[np.unique(heads) for heads in part] for part in phases]
  width = max(len(x) for part in distinct for x in part)
  lane_phases = np.array(
    [[np.resize(x, width) for x in part] for part in distinct]
  )
  lanes = np.array(
    [
      [
        np.searchsorted(found, heads) + i * width
        for i, (found, heads) in enumerate(zip(of_heads, part, strict=True))
      ]
      for of_heads, part in zip(distinct, phases, strict=True)
    ]
  )
  shape = len(phases), -1
  return (
    lane_phases.reshape(shape).astype(np.int32),
    lanes.reshape(shape).astype(np.int32),
  )


def ordinal(position, branch, phase):
  """Returns how many rows of a phase are kept before a global position."""
  w, r = branch
  kept = (position % w - phase + r - 1) // r  # of its segment; phase < r
  a_segment = (w - phase + r - 1) // r
  return position // w * a_segment + kept


def kept(start, far, phases, length):
  """Returns positions (..., M) of the rows kept of a shard, and which exist."""
  w, r = far.branch
  a_segment = ((w - phases + r - 1) // r)[..., None]
  row = ordinal(start, far.branch, phases)[..., None]
  row += jnp.arange(far.rows).reshape((1,) * (row.ndim - 1) + (-1,))
  position = row // a_segment * w + phases[..., None] + row % a_segment * r
  return position, position < start[..., None] + length
