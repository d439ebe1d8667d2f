"""A setting in words and numbers: its branches, gaps, cost and reach."""

import numpy as np

from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import costs, reach

# Keys followed through the layers, and the length up to which that takes
# seconds.
_SAMPLED_KEYS = 64
_LONGEST_WALK = 1 << 22


def describe(
  pattern: pattern_lib.Pattern,
  *,
  head_dim: int = 64,
  num_kv_heads: int | None = None,
  itemsize: int = 2,
) -> None:
  """Prints `summary` of the same arguments."""
  print(
    summary(
      pattern,
      head_dim=head_dim,
      num_kv_heads=num_kv_heads,
      itemsize=itemsize,
    )
  )


def summary(
  pattern: pattern_lib.Pattern,
  *,
  head_dim: int = 64,
  num_kv_heads: int | None = None,
  itemsize: int = 2,
) -> str:
  """Returns a setting's branches, gaps, cost beside dense, and reach as text.

  Args:
    pattern: the setting.
    head_dim: width of a head.
    num_kv_heads: key/value heads (None: as many as query heads).
    itemsize: bytes of a number in q, k, v, out and the cache.
  """
  sizes = dict(head_dim=head_dim, num_kv_heads=num_kv_heads, itemsize=itemsize)
  causal = "causal" if pattern.is_causal else "bidirectional"
  return "\n".join(
    [
      f"{pattern.length:,} positions, {pattern.num_heads} heads of {head_dim}, "
      f"{causal}, {pattern.head_phase} phases",
      "",
      *_branch_lines(pattern),
      "",
      *_gap_lines(pattern),
      "",
      *_cost_lines(pattern, sizes),
      "",
      *_reach_lines(pattern),
    ]
  )


def _branch_lines(pattern):
  yield f"{'segment':>13} {'rate':>10} {'keys a segment':>15} {'pairs':>8}"
  heads = range(pattern.num_heads)
  pairs = [
    sum(pattern_lib.count_pairs(pattern, branch, head) for head in heads)
    for branch in range(len(pattern.branches))
  ]
  for (width, rate), scored in zip(pattern.branches, pairs, strict=True):
    keys = pattern_lib.max_kept(min(width, pattern.length), rate)
    share = scored / max(sum(pairs), 1)
    yield f"{width:>13,} {rate:>10,} {keys:>15,} {share:>8.2%}"


def _gap_lines(pattern):
  found = False
  for (width, rate), gap in zip(
    pattern.branches, pattern_lib.gaps(pattern), strict=True
  ):
    if gap:
      found = True
      yield (
        f"gap: branch ({width:,}, {rate:,}) has phases 0 to {gap[-1]:,}, heads "
        f"read only 0 to {gap[0] - 1:,}"
      )
  if not found:
    yield "no gaps: every phase of every branch is read by some head"
    return
  unread = pattern_lib.num_unread(pattern)
  yield (
    f"positions in no branch at all: {unread:,} of {pattern.length:,}"
    + (", carried by the residual connection alone" if unread else "")
  )


def _cost_lines(pattern, sizes):
  ours = costs.cost(pattern, **sizes)
  full = costs.cost(pattern_lib.dense(pattern), **sizes)
  rows = (
    ("forward", "forward_flops", _flops),
    ("backward", "backward_flops", _flops),
    ("moved forward, at least", "forward_bytes", _bytes),
    ("moved backward, at least", "backward_bytes", _bytes),
    ("saved for backward", "saved_bytes", _bytes),
    ("decoding cache", "cache_bytes", _bytes),
  )
  heading = ("one layer", "LongNet", "dense", "dense / LongNet")
  yield "{:<26} {:>12} {:>12} {:>16}".format(*heading)
  for name, field, text in rows:
    mine, other = getattr(ours, field), getattr(full, field)
    ratio = f"{other / mine:,.2f}" if mine else "-"
    yield f"{name:<26} {text(mine):>12} {text(other):>12} {ratio:>16}"


def _reach_lines(pattern):
  if pattern.length > _LONGEST_WALK:
    yield f"reach: not walked beyond {_LONGEST_WALK:,} positions"
    return
  keys = np.linspace(0, pattern.length - 1, _SAMPLED_KEYS).astype(np.int64)
  keys = np.unique(keys)
  who = (
    "every key" if keys.size == pattern.length else f"{keys.size} spread keys"
  )
  pairs = "causal pairs" if pattern.is_causal else "pairs"
  yield f"{pairs} of {who} that are connected"
  shares = reach.coverage(pattern, sources=keys)
  for layer, share in enumerate(shares, start=1):
    yield f"  by {layer:>2} layer{' ' if layer == 1 else 's'} {share:>10.4%}"
  if shares[-1] < 1:
    yield "  the others are never connected"


def _flops(number):
  return _scaled(number, 1000, "FLOP", ("", "k", "M", "G", "T", "P", "E", "Z"))


def _bytes(number):
  return _scaled(number, 1024, "B", ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))


def _scaled(number, base, unit, prefixes):
  """Writes a number to three digits or so with the prefix that fits."""
  power = 0
  while number >= base and power < len(prefixes) - 1:
    number, power = number / base, power + 1
  return f"{number:.4g} {prefixes[power]}{unit}"
