"""How dilated attention is cut into work: all static, known before tracing.

Segments of every branch restart at each multiple of the window W, the least
common multiple of the segment lengths, so windows are independent problems and
are computed one after another. Inside a window the unit of work is a
*sequence*: the rows that one head keeps of one segment of one branch. Branches
whose sequences have equally many rows share one compiled loop.
"""

import contextlib
import contextvars
import math
from typing import NamedTuple

import jax
import numpy as np

from longnet_jax import pattern


class Sizes(NamedTuple):
  """Sizes that a sweep chose for one kind of device; results do not depend.

  block: query rows that meet a tile of keys at once, forward.
  key_block: key rows that meet a tile of queries at once, backward.
  tile: rows of a tile when a sequence is cut into several.
  whole: sequences of at most so many rows are not cut.
  scores: scores in flight, which decides how many sequences run together.
  window: elements of the windows that are computed together.
  unshifted: length from which on softmax of small scores goes without the
    maximum: below, compiling both ways costs more than it saves. 0 for never.
  """

  block: int
  key_block: int
  tile: int
  whole: int
  scores: int
  window: int
  unshifted: int = 0


SIZES = {
  "cpu": Sizes(
    block=256,
    key_block=320,
    tile=2048,
    whole=4096,
    scores=2**19,
    window=2**23,
    unshifted=2048,
  ),
  "gpu": Sizes(
    block=512, key_block=512, tile=2048, whole=2048, scores=2**29, window=2**28
  ),
  "tpu": Sizes(
    block=512, key_block=512, tile=2048, whole=2048, scores=2**27, window=2**27
  ),
}


_PLATFORM = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
  """Sizes and types are those of a platform that JAX need not run on."""
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def platform() -> str:
  """Returns the platform that JAX runs on, or that is being compiled for."""
  return _PLATFORM.get() or jax.default_backend()


def device_sizes() -> Sizes:
  """Returns the sizes for the devices that JAX runs on."""
  return SIZES.get(platform(), SIZES["gpu"])


class Windows(NamedTuple):
  """How the inputs are cut: static.

  length: rows W of a window; the segments of each branch restart there.
  per_example: windows of one example.
  per_step: windows that are computed together.
  steps: number of steps over the batch.
  """

  length: int
  per_example: int
  per_step: int
  steps: int


def plan_windows(branches, shape, sizes):
  """Returns the windows of inputs (B, T, N, H)."""
  batch, length, num_heads, width = shape
  window = min(math.lcm(*(w for w, _ in branches)), length)
  if length % window and length < 4 * window:
    window = length  # a ragged last window would cost more than it saves
  per_example = -(-length // window)
  per_step = max(1, sizes.window // (window * num_heads * width))
  per_step = min(per_step, batch * per_example)
  return Windows(
    window, per_example, per_step, -(-batch * per_example // per_step)
  )


class Sequences(NamedTuple):
  """Sequences of one compiled loop, in the order window, segment, head.

  rows: rows of each, padding included; a multiple of `tile`.
  branches: (index of the branch, number of its sequences), in order.
  table: int32 (sequences, 6): branch, window of the step, start of the
    segment in its window, segment length, rate, head.
  """

  rows: int
  tile: int
  branches: tuple[tuple[int, int], ...]
  table: np.ndarray


def plan_sequences(branches, group, windows, num_heads, sizes):
  """Returns the sequences of some branches, by their number of rows.

  Args:
    branches: all branches (w, r).
    group: indices of the branches to plan.
    windows: the `Windows`.
    num_heads: N.
    sizes: the `Sizes`.
  """
  classes = {}
  for index in group:
    w, r = branches[index]
    rows = tile = pattern.max_kept(w, r)
    if rows > sizes.whole:
      tiles = -(-rows // sizes.tile)
      tile = -(-rows // (tiles * sizes.block)) * sizes.block
      rows = tile * -(-rows // tile)
    columns = np.broadcast_arrays(
      index,
      np.arange(windows.per_step)[:, None, None],
      np.arange(0, windows.length, w)[:, None],
      w,
      r,
      np.arange(num_heads),
    )
    table = np.stack(columns, axis=-1).reshape(-1, len(columns))
    classes.setdefault((rows, tile), []).append((index, table))
  return [
    Sequences(
      rows,
      tile,
      tuple((index, len(table)) for index, table in members),
      np.concatenate([table for _, table in members]).astype(np.int32),
    )
    for (rows, tile), members in classes.items()
  ]


def sequences_together(sequences, sizes):
  """Returns how many sequences are computed at once."""
  scores = min(sequences.rows, sizes.block) * sequences.tile
  return min(len(sequences.table), max(1, sizes.scores // scores))


def chunk(table, size):
  """Cuts a table (C, columns) into (ceil(C / size), size, columns).

  The last line is repeated to fill up; what it computes again is not read.
  """
  lines = np.arange(-(-len(table) // size) * size)
  return table[np.minimum(lines, len(table) - 1)].reshape(
    -1, size, table.shape[1]
  )


def branch_groups(branches):
  """Splits the branches so that the packed rows of a group stay below 3 T.

  All branches of a group are put back in one pass; with the usual geometric
  rates there is one group, and many dense branches cost time, not memory.
  """
  groups, share = [[]], 0.0
  for index, (_, r) in enumerate(branches):
    if groups[-1] and share + 1 / r > 3:
      groups.append([])
      share = 0.0
    groups[-1].append(index)
    share += 1 / r
  return groups
