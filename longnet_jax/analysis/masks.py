"""What a pattern reads, pair by pair: (N, N) arrays, for small N."""

import numpy as np

from longnet_jax import pattern as pattern_lib


def branch_mask(
  pattern: pattern_lib.Pattern, branch: int, head: int
) -> np.ndarray:
  """Returns the (N, N) booleans [query, key] that one head reads."""
  width, _ = pattern.branches[branch]
  rows = pattern_lib.kept_rows(pattern, branch, head)
  segment = np.full(pattern.length, -1)
  segment[rows] = rows // width
  mask = (segment[:, None] == segment[None, :]) & (segment[:, None] >= 0)
  return np.tril(mask) if pattern.is_causal else mask


def multiplicity(pattern: pattern_lib.Pattern) -> np.ndarray:
  """Returns how many (branch, head) read each [query, key]: (N, N)."""
  return sum(
    branch_mask(pattern, branch, head).astype(int)
    for branch in range(len(pattern.branches))
    for head in range(pattern.num_heads)
  )
