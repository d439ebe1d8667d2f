"""What a pattern reads and reaches, cell by cell: (n, n) arrays for pictures.

A cell is a block of queries by a block of keys; a block of one position makes
it a pair.
"""

from jaxtyping import Bool, Int
import numpy as np

from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import reach

# Of each block, to see when the pairs of two blocks are connected.
_SAMPLED_KEYS, _SAMPLED_QUERIES = 2, 8
_NEVER = np.iinfo(np.int32).max


def block_pairs(
  pattern: pattern_lib.Pattern, branch: int, head: int, block: int
) -> Int[np.ndarray, "n n"]:
  """Returns how many pairs of each cell [query, key] one head reads.

  Exact at any length: two blocks share only segments that cross a boundary of
  blocks, fewer than there are blocks; all others lie in one block and are
  alike.
  """
  width, rate = pattern.branches[branch]
  offset = pattern_lib.phase(pattern, rate, head)
  edges = _edges(pattern, block)
  inner = edges[1:-1]
  starts = np.unique(inner[inner % width != 0] // width) * width
  ends = np.minimum(starts + width, pattern.length)
  inside = np.clip(edges[:, None], starts, ends) - starts
  kept = np.diff(np.maximum(-(-(inside - offset) // rate), 0), axis=0)
  found = np.rint(kept.astype(float) @ kept.T).astype(np.int64)
  diagonal = _among(kept, pattern.is_causal).sum(axis=1)
  # Segments that lie in one block, and the ragged last where it does.
  whole = np.maximum(edges[1:] // width + -edges[:-1] // width, 0)
  rows = pattern_lib.kept_per_segment(width, rate, offset)
  diagonal += whole * _among(rows, pattern.is_causal)
  rest = pattern.length % width
  if rest and pattern.length - rest >= edges[-2]:
    rows = pattern_lib.kept_per_segment(rest, rate, offset)
    diagonal[-1] += _among(rows, pattern.is_causal)
  np.fill_diagonal(found, diagonal)
  return np.tril(found) if pattern.is_causal else found


def branch_mask(
  pattern: pattern_lib.Pattern, branch: int, head: int, block: int = 1
) -> Bool[np.ndarray, "n n"]:
  """Returns whether one head reads any pair of each cell [query, key]."""
  return block_pairs(pattern, branch, head, block) > 0


def multiplicity(
  pattern: pattern_lib.Pattern, block: int = 1
) -> Int[np.ndarray, "n n"]:
  """Returns how many (branch, head) read each pair, summed over a cell."""
  return sum(
    block_pairs(pattern, branch, head, block)
    for branch in range(len(pattern.branches))
    for head in range(pattern.num_heads)
  )


def cell_pairs(
  pattern: pattern_lib.Pattern, block: int
) -> Int[np.ndarray, "n n"]:
  """Returns the pairs of each cell that dense attention would score."""
  return multiplicity(_one_dense_head(pattern), block)


def block_layers(
  pattern: pattern_lib.Pattern, block: int
) -> Int[np.ndarray, "n n"]:
  """Returns the layers that connect half of the pairs of each cell, or -1.

  Of a sample of positions of each block, drawn at random; time grows with the
  length times the number of blocks.
  """
  edges, random = _edges(pattern, block), np.random.default_rng(0)
  draw = lambda count: random.integers(
    edges[:-1, None], edges[1:, None], (len(edges) - 1, count)
  )
  keys, queries = draw(_SAMPLED_KEYS), draw(_SAMPLED_QUERIES)
  queries[:, -1] = edges[1:] - 1  # sees every key of its own block
  layers = np.concatenate(
    [
      _layers(pattern, part, queries.reshape(-1))
      for part in np.array_split(keys.reshape(-1), -(-keys.size // 64))
    ],
    axis=1,
  )
  cells = layers.reshape(*queries.shape, *keys.shape).swapaxes(1, 2)
  if pattern.is_causal:
    future = queries[:, None, :, None] < keys[None, :, None, :]
    cells = np.where(future, _NEVER, cells)
    counted = np.sum(~future, axis=(2, 3))
  else:
    counted = np.full(cells.shape[:2], cells[0, 0].size)
  ordered = np.sort(cells.reshape(*cells.shape[:2], -1), axis=2)
  middle = np.maximum(counted - 1, 0)[..., None] // 2
  half = np.take_along_axis(ordered, middle, axis=2)[..., 0]
  return np.where(half == _NEVER, -1, np.maximum(half, 1))


def _layers(pattern, keys, queries):
  """Returns the layers from each of up to 64 keys to each query, or _NEVER."""
  bits = np.arange(keys.size, dtype=np.uint64)
  words = np.zeros(pattern.length, np.uint64)
  np.bitwise_or.at(words, keys, np.uint64(1) << bits)
  layers = np.full((queries.size, keys.size), _NEVER, np.int32)
  for layer in range(pattern.length):
    heard = words[queries][:, None] >> bits & np.uint64(1) != 0
    layers = np.where(heard & (layers == _NEVER), np.int32(layer), layers)
    further = reach.spread(pattern, words)
    if np.array_equal(further, words):
      break
    words = further
  return layers


def _edges(pattern, block):
  """Returns where blocks begin, and the length, (n + 1,)."""
  count = -(-pattern.length // block)
  return np.minimum(np.arange(count + 1) * block, pattern.length)


def _one_dense_head(pattern):
  return pattern_lib.Pattern(
    pattern.length, 1, (pattern.length,), (1,), is_causal=pattern.is_causal
  )


def _among(rows, is_causal):
  """Returns the pairs among rows that all see one another, or their past."""
  return rows * (rows + 1) // 2 if is_causal else rows * rows
