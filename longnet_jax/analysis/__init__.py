"""What an attention pattern costs and reaches, and how it looks.

  pattern = analysis.Pattern(length, num_heads, segment_lengths, dilation_rates)
  analysis.describe(pattern)            branches, gaps, cost, reach in words

  cost(pattern), dense(pattern)         FLOPs and bytes, and dense beside it
  decode_cache_bytes(pattern)           keys and values held while decoding
  coverage(pattern, num_layers)         fraction of pairs joined in 1, 2, ...
  estimated_coverage                    the same in seconds, of a sample
  reach_line(pattern, num_layers)       longest segment, gaps, share of pairs
  hops(pattern, source, target)         layers between two positions
  logarithmic_bound(pattern)            the paper's count of those layers
  gaps(pattern)                         phases that no head reads
  suggest(length, num_heads, budget)    a setting for a length and a budget
  draw_branches, draw_heads, draw_union, draw_reach, draw_overview

Counts are exact, in Python integers. Cost takes any length at once; reach
follows positions in O(N) memory, see `reached_pairs` for its time. NumPy and
matplotlib are all it needs.
"""

from longnet_jax.analysis.costs import Cost, cost, decode_cache_bytes
from longnet_jax.analysis.pictures import (
  draw_branches,
  draw_heads,
  draw_overview,
  draw_reach,
  draw_union,
)
from longnet_jax.analysis.reach import (
  coverage,
  estimated_coverage,
  hops,
  hops_from,
  logarithmic_bound,
  reached_pairs,
)
from longnet_jax.analysis.report import (
  describe,
  model_reach_line,
  reach_line,
  summary,
)
from longnet_jax.analysis.suggestion import Suggestion, suggest
from longnet_jax.pattern import (
  Pattern,
  dense,
  from_config,
  gaps,
  kept_rows,
  num_unread,
)

__all__ = [
  "Cost",
  "Pattern",
  "Suggestion",
  "cost",
  "coverage",
  "decode_cache_bytes",
  "dense",
  "describe",
  "draw_branches",
  "draw_heads",
  "draw_overview",
  "draw_reach",
  "draw_union",
  "estimated_coverage",
  "from_config",
  "gaps",
  "hops",
  "hops_from",
  "kept_rows",
  "logarithmic_bound",
  "model_reach_line",
  "num_unread",
  "reach_line",
  "reached_pairs",
  "suggest",
  "summary",
]
