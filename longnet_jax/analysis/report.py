"""A setting in words and numbers: its branches, gaps, cost and reach."""

from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import costs, reach


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


def reach_line(
  pattern: pattern_lib.Pattern, num_layers: int | None = None
) -> str:
  """Returns in a line how far heads and layers reach in one window.

  Args:
    pattern: the setting, as long as the window.
    num_layers: layers of the model; None: as many as there could be.
  """
  longest, length = max(pattern.segment_lengths), pattern.length
  if longest < length:
    held = (
      f"the window of {length:,} is longer than the longest segment, "
      f"{longest:,}, and no head reads beyond its segment"
    )
  else:
    held = f"the longest segment holds the window of {length:,}"
  gaps = sum(map(bool, pattern_lib.gaps(pattern)))
  found = f"gaps in {gaps} of {len(pattern.branches)} branches"
  shares = reach.estimated_coverage(pattern, num_layers)
  layers = (
    "layers connect" if num_layers is None else f"{num_layers} layers connect"
  )
  if num_layers == 1:
    layers = "1 layer connects"
  parts = [held, found if gaps else "no gaps"]
  if shares is not None:
    parts.append(f"{layers} {percent(shares[-1])} of its pairs")
  return f"reach: {'; '.join(parts)}"


def model_reach_line(config, length: int) -> str:
  """Returns `reach_line` of a decoder at a window, or what stands for it.

  Args:
    config: a `LongNetConfig`, of any attention.
    length: positions of the window.
  """
  if config.attention == "sparse":
    return (
      f"reach: blocks of {config.sparse_block:,} and the last "
      f"{config.sparse_summary:,} columns of all blocks before"
    )
  pattern = pattern_lib.from_config(config, length)
  return reach_line(pattern, config.num_layers)


def percent(share: float) -> str:
  """0.0314 -> "3.1%"; "0%" of nothing alone, and "100%" of all there is."""
  if round(share, 9) in (0, 1):
    return f"{share:.0%}"
  return f"{min(share, 0.999):.1%}" if share >= 0.001 else "under 0.1%"


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
  shares = reach.estimated_coverage(pattern)
  if shares is None:
    yield "reach: segments are too long to walk"
    return
  pairs = "causal pairs" if pattern.is_causal else "pairs"
  yield f"{pairs} that are connected"
  for layer, share in enumerate(shares, start=1):
    if share < 1:  # all is said where it is all
      share = min(share, 0.999999)
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
