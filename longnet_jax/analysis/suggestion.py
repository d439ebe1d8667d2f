"""Segment lengths and dilation rates for a length and a compute budget."""

import numbers
from typing import NamedTuple

from longnet_jax import checked
from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import costs


class Suggestion(NamedTuple):
  """A setting and what one attention layer with it costs."""

  pattern: pattern_lib.Pattern
  cost: costs.Cost


def suggest(
  length: int,
  num_heads: int,
  budget: float,
  *,
  head_dim: int = 64,
  is_causal: bool = True,
  ratio: int = 2,
  allow_gaps: bool = False,
) -> Suggestion:
  """Returns the geometric setting that makes the most of a budget.

  As in the paper, segment lengths grow by `ratio` from w_0 to the whole
  sequence and rates grow with them, so that far tokens are read more sparsely:

    w_i = w_0 ratio^i (the last: N),  r_i = the largest divisor of the heads
    that is at most ratio^i

  Rates that divide the heads leave no gaps, and each phase is read by equally
  many heads. Of branches with one rate only the longest is kept, which reads
  what the others would: so from r = H on there is the whole sequence alone,
  whose cost grows with N^2 / H^2. With `allow_gaps` rates go on growing past
  the heads and cost stays linear in N. w_0 is the one of 4, 5, 6 or 7 times a
  power of two that costs most within the budget; a budget that pays for dense
  attention gets it.

  Args:
    length: positions in the sequence, N.
    num_heads: query heads, H.
    budget: forward FLOPs of one attention layer over the sequence.
    head_dim: width of a head.
    is_causal: whether a query reads only keys at or before itself.
    ratio: growth of the segments from one branch to the next, 2 or more.
    allow_gaps: whether rates may exceed the number of heads.

  Raises:
    ValueError: a size is not a positive int, or the budget is below the
      cheapest such setting.
  """
  length = pattern_lib.as_int("length", length)
  num_heads = pattern_lib.as_int("num_heads", num_heads)
  if pattern_lib.as_int("ratio", ratio) < 2:
    raise checked.RefusedError(f"ratio is {ratio}: must be 2 or more")
  if not isinstance(budget, numbers.Real) or not budget > 0:
    raise checked.RefusedError(
      f"budget is {checked.shown(budget)}: must be a number of FLOPs above 0"
    )
  suggestions = [
    _priced(
      _geometric(length, num_heads, first, ratio, allow_gaps),
      head_dim,
      is_causal,
    )
    for first in _first_segments(length, ratio)
  ]
  flops = lambda suggestion: suggestion.cost.forward_flops
  if flops(suggestions[-1]) <= budget:
    return suggestions[-1]
  affordable = [s for s in suggestions if flops(s) <= budget]
  if not affordable:
    advice = "" if allow_gaps else " or pass allow_gaps=True"
    raise checked.RefusedError(
      f"budget is {budget:g} FLOPs and the cheapest setting for {length} "
      f"positions costs {min(map(flops, suggestions)):g}: raise it{advice}"
    )
  return max(affordable, key=flops)


def _first_segments(length, ratio):
  """Lists candidates for w_0, four in every doubling, at last the length."""
  octaves = range(length.bit_length())
  candidates = {m << octave for m in (4, 5, 6, 7) for octave in octaves}
  return [*sorted(w for w in candidates if ratio <= w < length), length]


def _geometric(length, num_heads, first, ratio, allow_gaps):
  """Returns the pattern's fields for segments that grow from `first`."""
  widths, rates = [first], [1]
  while widths[-1] < length:
    growth = ratio ** len(rates)
    widths.append(min(first * growth, length))
    if allow_gaps and growth > num_heads:
      rates.append(growth)
    else:
      rates.append(_largest_divisor(num_heads, growth))
  longest = dict(zip(rates, widths, strict=True))  # the last of each rate
  return length, num_heads, tuple(longest.values()), tuple(longest)


def _largest_divisor(number, limit):
  """Returns the largest divisor of `number` that is at most `limit`."""
  return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def _priced(fields, head_dim, is_causal):
  pattern = pattern_lib.Pattern(*fields, is_causal=is_causal)
  return Suggestion(pattern, costs.cost(pattern, head_dim=head_dim))
