"""Dilated attention's pattern pair by pair, from its definition alone."""

import itertools

import numpy as np

from longnet_jax import analysis


def masks(pattern):
  """Returns booleans (branches, heads, N, N): does the query read the key."""
  n, heads = pattern.length, pattern.num_heads
  out = np.zeros((len(pattern.branches), heads, n, n), bool)
  for b, (w, r) in enumerate(pattern.branches):
    for j in range(heads):
      blocked = j // int(np.ceil(heads / r))
      s = j % r if pattern.head_phase == "interleaved" else blocked
      for t, u in itertools.product(range(n), repeat=2):
        kept = (t % w) % r == s and (u % w) % r == s
        past = u <= t or not pattern.is_causal
        out[b, j, t, u] = t // w == u // w and kept and past
  return out


def layers(pattern):
  """Returns the (N, N) layers from key to query, -1 where never."""
  one = masks(pattern).any((0, 1)) | np.eye(pattern.length, dtype=bool)
  reached = np.eye(pattern.length, dtype=bool)
  out = np.where(reached, 0, -1)
  for layer in range(1, pattern.length + 1):
    reached = one.astype(int) @ reached.astype(int) > 0
    out[reached & (out < 0)] = layer
  return out


def random_patterns(count):
  """Yields settings of every kind: ragged, w > N, r > H, gaps, both phases."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    branches = rng.integers(1, 4)
    yield analysis.Pattern(
      int(rng.integers(1, 24)),
      int(rng.integers(1, 7)),
      tuple(map(int, rng.integers(1, 30, branches))),
      tuple(map(int, rng.integers(1, 9, branches))),
      is_causal=bool(rng.integers(2)),
      head_phase=str(rng.choice(["interleaved", "blocked"])),
    )
