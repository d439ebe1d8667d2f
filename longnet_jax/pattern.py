"""Which positions each branch and head of dilated attention reads, and counts.

A branch (w, r) cuts positions 0..T-1 into segments of w. Head j keeps of every
segment the rows whose in-segment position p has p mod r == phase(j, r)
(eqs. 4-6 and section 2.3 of arXiv 2307.02486); the m-th of them is

    position(n, j, m) = n w + phase(j, r) + r m,    0 <= m < ceil(w / r).

Attention, caches and costs all follow from these definitions. NumPy is all they
need.
"""

from collections.abc import Iterable
import dataclasses
import operator

import numpy as np

from longnet_jax import checked

HEAD_PHASES = ("interleaved", "blocked")


@dataclasses.dataclass(frozen=True)
class Pattern:
  """One setting of dilated attention over one sequence.

  Attributes:
    length: positions in the sequence, N.
    num_heads: query heads, H.
    segment_lengths: w of every branch; a w above the length is one segment.
    dilation_rates: r of every branch.
    is_causal: whether a query reads only keys at or before itself.
    head_phase: "interleaved" (head j keeps j mod r) or "blocked"
      (j // ceil(H / r)).
  """

  length: int
  num_heads: int
  segment_lengths: tuple[int, ...]
  dilation_rates: tuple[int, ...]
  _: dataclasses.KW_ONLY
  is_causal: bool = True
  head_phase: str = "interleaved"

  def __post_init__(self):
    for name in ("segment_lengths", "dilation_rates"):
      object.__setattr__(self, name, _ints(name, getattr(self, name)))
    for name in ("length", "num_heads"):
      object.__setattr__(self, name, as_int(name, getattr(self, name)))
    lengths, rates = self.segment_lengths, self.dilation_rates
    if not lengths:
      raise checked.RefusedError(
        "segment_lengths is empty: give at least one branch"
      )
    if len(lengths) != len(rates):
      raise checked.RefusedError(
        f"dilation_rates has {len(rates)} entries, segment_lengths "
        f"{len(lengths)}: give one of each for every branch"
      )
    if self.head_phase not in HEAD_PHASES:
      raise checked.RefusedError(
        f"head_phase is {checked.shown(self.head_phase)}: choose one of"
        f" {HEAD_PHASES}"
      )

  @property
  def branches(self) -> tuple[tuple[int, int], ...]:
    """(segment length, dilation rate) of every branch."""
    return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

  @property
  def num_pairs(self) -> int:
    """(Query, key) pairs that dense attention would score for one head."""
    return _pairs(self.length, self.is_causal)


def as_int(name: str, value: int) -> int:
  """Returns a Python int, which has no overflow; refuses all but 1, 2, ..."""
  try:
    if isinstance(value, (bool, np.bool_)):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    raise checked.RefusedError(
      f"{name} is {checked.shown(value)}: must be an int"
    ) from None
  if number < 1:
    raise checked.RefusedError(f"{name} is {value}: must be 1 or more")
  return number


def index(name: str, value: int, size: int) -> int:
  """Returns a Python int in [0, size), refuses anything else."""
  try:
    number = operator.index(value)
  except TypeError:
    raise checked.RefusedError(
      f"{name} is {checked.shown(value)}: must be an int"
    ) from None
  if not 0 <= number < size:
    raise checked.RefusedError(f"{name} is {value}: must be in 0 .. {size - 1}")
  return number


def _ints(name, values):
  if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
    raise checked.RefusedError(
      f"{name} is {checked.shown(values)}: give a sequence of ints such as"
      " (2048, 4096)"
    )
  return tuple(as_int(f"an entry of {name}", value) for value in values)


def dense(pattern: Pattern) -> Pattern:
  """Returns the setting that reads every pair: one segment, no dilation."""
  return dataclasses.replace(
    pattern, segment_lengths=(pattern.length,), dilation_rates=(1,)
  )


def from_config(config, length: int, *, is_causal: bool = True) -> Pattern:
  """Returns the pattern of a model's configuration at one length.

  Args:
    config: a `LongNetConfig`, dilated or dense.
    length: positions in the sequence.
    is_causal: True for the decoder, False for an encoder.
  """
  if config.attention == "sparse":
    raise checked.RefusedError(
      "attention is 'sparse': only 'dilated' and 'dense' have branches"
    )
  is_dense = config.attention == "dense"
  return Pattern(
    length,
    config.num_heads,
    (length,) if is_dense else config.segment_lengths,
    (1,) if is_dense else config.dilation_rates,
    is_causal=is_causal,
    head_phase=config.head_phase,
  )


def phases(num_heads: int, rate: int, head_phase: str) -> np.ndarray:
  """Returns each head's phase, (N,) ints in [0, rate).

  `interleaved`: j mod r, the paper's. `blocked`: j // ceil(N / r), that of
  torchscale and every released checkpoint.
  """
  heads = np.arange(num_heads)
  if head_phase == "interleaved":
    return heads % rate
  return heads // -(-num_heads // rate)


def max_kept(segment_length: int, rate: int) -> int:
  """Returns ceil(w / r), the most rows a head keeps of one segment."""
  return -(-segment_length // rate)


def phase(pattern: Pattern, rate: int, head: int) -> int:
  """Returns which in-segment residue, modulo `rate`, a head keeps."""
  return int(phases(pattern.num_heads, rate, pattern.head_phase)[head])


def num_phases(pattern: Pattern, rate: int) -> int:
  """Returns P: the phases that some head reads are 0 .. P - 1."""
  return 1 + int(phases(pattern.num_heads, rate, pattern.head_phase).max())


def gaps(pattern: Pattern) -> tuple[range, ...]:
  """Returns, for every branch, the phases that hold rows but no head reads.

  They exist where a rate exceeds the number of heads and, with blocked phases,
  where ceil(H / r) heads a phase run out before the last phase. Positions there
  take no part in that branch.
  """
  return tuple(
    range(num_phases(pattern, rate), min(rate, width, pattern.length))
    for width, rate in pattern.branches
  )


def segments(length: int, width: int) -> tuple[tuple[int, int], ...]:
  """Returns (rows, how many) of the full segments and of the ragged last."""
  full, rest = divmod(length, width)
  return tuple((rows, n) for rows, n in ((width, full), (rest, 1)) if rows * n)


def kept_per_segment(rows: int, rate: int, offset: int) -> int:
  """Returns how many of a segment's rows have residue `offset`."""
  return len(range(offset, rows, rate))


def kept_rows(pattern: Pattern, branch: int, head: int) -> np.ndarray:
  """Returns the increasing positions that one head keeps in one branch."""
  branch = index("branch", branch, len(pattern.branches))
  head = index("head", head, pattern.num_heads)
  width, rate = pattern.branches[branch]
  position = np.arange(pattern.length)
  residue = position % width % rate
  return position[residue == phase(pattern, rate, head)]


def count_pairs(pattern: Pattern, branch: int, head: int) -> int:
  """Returns the (query, key) pairs that one head scores in one branch."""
  width, rate = pattern.branches[branch]
  offset = phase(pattern, rate, head)
  total = 0
  for rows, how_many in segments(pattern.length, width):
    kept = kept_per_segment(rows, rate, offset)
    total += how_many * _pairs(kept, pattern.is_causal)
  return total


def total_pairs(pattern: Pattern) -> int:
  """Returns the (query, key) pairs scored over all branches and heads."""
  return sum(
    count_pairs(pattern, branch, head)
    for branch in range(len(pattern.branches))
    for head in range(pattern.num_heads)
  )


def count_rows(pattern: Pattern, branch: int, offset: int) -> int:
  """Returns the positions of one phase in one branch."""
  width, rate = pattern.branches[branch]
  return sum(
    how_many * kept_per_segment(rows, rate, offset)
    for rows, how_many in segments(pattern.length, width)
  )


def sparse_pairs(length: int, block: int, summary: int) -> int:
  """Returns the causal pairs that a head of a Sparse Transformer scores.

  Those inside blocks, and of each row with the last `summary` columns of all
  earlier blocks.
  """
  whole, rest = divmod(length, block)
  inside = whole * _pairs(block, True) + _pairs(rest, True)
  return inside + summary * (block * _pairs(whole - 1, True) + rest * whole)


def num_unread(pattern: Pattern) -> int:
  """Returns how many positions no head keeps in any branch.

  Attention gives zero there; only the residual connection carries them. Walks
  the sequence in windows, so that memory does not grow with its length.
  """
  read = [(w, r, num_phases(pattern, r)) for w, r in pattern.branches]
  if any(phases >= min(r, w, pattern.length) for w, r, phases in read):
    return 0
  window, unread = 1 << 20, 0
  for start in range(0, pattern.length, window):
    position = np.arange(start, min(start + window, pattern.length))
    kept = np.zeros(position.shape, bool)
    for width, rate, phases in read:
      kept |= position % width % rate < phases
    unread += int(np.count_nonzero(~kept))
  return unread


def _pairs(rows, is_causal):
  """Returns the pairs among rows that all see one another, or their past."""
  return rows * (rows + 1) // 2 if is_causal else rows * rows
