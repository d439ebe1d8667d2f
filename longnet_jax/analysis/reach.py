"""How far information travels through 1, 2, ... layers of a setting.

In one layer a position reads every position that shares a segment and a phase
with it in some branch, through whichever head keeps that phase, and itself
through the residual connection. Between layers the heads mix, so that layers
compose. All counts are exact and memory grows with N, never with N x N.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
from typing import SupportsIndex

from jaxtyping import Int
import numpy as np

from longnet_jax import checked
from longnet_jax import pattern as pattern_lib

_WORD = 64  # sources followed at once, one bit each
# Positions a layer that an estimate visits: a second or two in all.
_VISITS = 1 << 21
_LONGEST_WALK = 1 << 22


def spread(pattern: pattern_lib.Pattern, words: np.ndarray) -> np.ndarray:
  """Returns what every position holds after one layer.

    out[t] = words[t] | OR of words[u] over the keys u that query t reads

  Args:
    pattern: the setting.
    words: (N,) booleans or unsigned integers whose bits are facts to carry.

  Returns:
    (N,) of the same type.
  """
  out = words.copy()
  for width, rate in pattern.branches:
    phases = pattern_lib.num_phases(pattern, rate)
    start = 0
    for rows, how_many in pattern_lib.segments(pattern.length, width):
      here = slice(start, start + rows * how_many)
      source = words[here].reshape(how_many, rows)
      target = out[here].reshape(how_many, rows)
      for offset in range(min(phases, rows)):
        target[:, offset::rate] |= _gather(
          source[:, offset::rate], pattern.is_causal
        )
      start = here.stop
  return out


def hops_from(pattern: pattern_lib.Pattern, source: int) -> np.ndarray:
  """Returns the layers that information at `source` needs to each position.

  Args:
    pattern: the setting.
    source: the key position that the information starts from.

  Returns:
    (N,) int32: 0 at the source itself, -1 where no number of layers suffices.
    O(N) memory; time O(N * branches) a layer.
  """
  hops = np.full(pattern.length, -1, np.int32)
  for layer, reached in enumerate(_fronts(pattern, source)):
    hops[reached & (hops < 0)] = layer
  return hops


def hops(pattern: pattern_lib.Pattern, source: int, target: int) -> int | None:
  """Returns the layers from key `source` to query `target`, None if never."""
  _check_position(pattern, target)
  for layer, reached in enumerate(_fronts(pattern, source)):
    if reached[target]:
      return layer
  return None


def reached_pairs(
  pattern: pattern_lib.Pattern,
  num_layers: SupportsIndex | None = None,
  *,
  sources: Sequence[int] | Int[np.ndarray, " n"] | None = None,
) -> tuple[int, ...]:
  """Returns how many (query, key) pairs 1, 2, ... layers connect.

  Follows 64 keys at a time, one bit each: O(N) memory and, over all keys,
  O(N^2 / 64 * branches) time a layer: seconds at 2^15 positions, minutes at
  2^18. No segment crosses a common multiple of all segment lengths, so that
  only one such block and the ragged rest are walked. At lengths beyond that
  give `sources`.

  Args:
    pattern: the setting.
    num_layers: entries to return; None: until another layer adds no pair.
    sources: key positions to follow, each counted once; None: all of them.
  """
  if num_layers is not None:
    num_layers = pattern_lib.as_int("num_layers", num_layers)
  if sources is not None:
    keys = _check_sources(pattern, sources)
    return _pad(_count(pattern, keys, num_layers), num_layers)
  counts = []
  for rows, how_many in _blocks(pattern):
    part = dataclasses.replace(pattern, length=rows)
    counts.append(
      [how_many * n for n in _count(part, np.arange(rows), num_layers)]
    )
  return _pad(_total(counts), num_layers)


def coverage(
  pattern: pattern_lib.Pattern,
  num_layers: SupportsIndex | None = None,
  *,
  sources: Sequence[int] | Int[np.ndarray, " n"] | None = None,
) -> tuple[float, ...]:
  """Returns the fraction of pairs that 1, 2, ... layers connect.

  Of all (query, key) pairs, or, when causal, of those with key <= query; a
  position counts as reaching itself. Arguments and limits: `reached_pairs`.
  """
  if sources is None:
    total = pattern.num_pairs
  else:
    keys = _check_sources(pattern, sources)
    total = _num_pairs(pattern, keys)
  counts = reached_pairs(pattern, num_layers, sources=sources)
  return tuple(count / total for count in counts)


def estimated_coverage(
  pattern: pattern_lib.Pattern, num_layers: SupportsIndex | None = None
) -> tuple[float, ...] | None:
  """Returns `coverage` in seconds at any length, of some keys where many.

  One block that no segment crosses stands for all of them. In blocks of up to
  8,192 positions every key counts, in longer ones a sample: 64 keys at 4
  million positions. None where a block is even longer.
  """
  if num_layers is not None:
    num_layers = pattern_lib.as_int("num_layers", num_layers)
  counts = []
  for rows, how_many in _blocks(pattern):
    if rows > _LONGEST_WALK:
      return None
    part = dataclasses.replace(pattern, length=rows)
    keys = _spread_keys(rows)
    pairs, total = how_many * part.num_pairs, _num_pairs(part, keys)
    counts.append([n / total * pairs for n in _count(part, keys, num_layers)])
  shares = [count / pattern.num_pairs for count in _total(counts)]
  return _pad(shares, num_layers)


def logarithmic_bound(pattern: pattern_lib.Pattern) -> float:
  """Returns the paper's number of layers between two tokens.

    L = log_a(N (a - 1) / w_0),  a = (w_last / w_0) ** (1 / (branches - 1))

  Source: arXiv 2307.02486, section 2.4: segment lengths that grow by a span
  about w_0 a^i / (a - 1) with i branches. A token climbs to the branch that
  spans both and comes down again, so that without causality 2 L + 1 hops are
  enough for any two positions if w_last >= N, a >= 2, r_1 = 1 and every rate
  divides the segment length before it. Causal attention may need more, and
  some of its pairs never meet: those are counted by `reached_pairs`.
  """
  first, last = pattern.segment_lengths[0], pattern.segment_lengths[-1]
  if last <= first:
    raise checked.RefusedError(
      f"segment_lengths {pattern.segment_lengths} do not grow: the bound "
      "needs two branches or more in increasing order"
    )
  growth = (last / first) ** (1 / (len(pattern.segment_lengths) - 1))
  return math.log(pattern.length * (growth - 1) / first, growth)


def _blocks(pattern):
  """Returns (rows, how many) of the blocks that no segment crosses."""
  block = math.lcm(*pattern.segment_lengths)
  return pattern_lib.segments(pattern.length, block)


def _spread_keys(length):
  """Returns every position, or one at random of each of many equal parts."""
  count = _WORD * max(1, _VISITS // length)
  if count >= length:
    return np.arange(length)
  places = np.arange(count) + np.random.default_rng(0).random(count)
  return np.unique((places * length / count).astype(np.int64))


def _num_pairs(pattern, keys):
  """Returns the pairs of distinct keys that dense attention would score."""
  earlier = int(keys.sum()) if pattern.is_causal else 0
  return keys.size * pattern.length - earlier


def _gather(rows, is_causal):
  """ORs (segments, rows of one phase) up to each row, or over all of them."""
  if is_causal:
    return np.bitwise_or.accumulate(rows, axis=1)
  return np.bitwise_or.reduce(rows, axis=1, keepdims=True)


def _fronts(pattern, source) -> Iterator[np.ndarray]:
  """Yields who holds the source's information after 0, 1, ... layers."""
  _check_position(pattern, source)
  reached = np.zeros(pattern.length, bool)
  reached[source] = True
  while True:
    yield reached
    further = spread(pattern, reached)
    if np.array_equal(further, reached):
      return
    reached = further


def _count(pattern, keys, num_layers):
  """Returns the pairs after each layer until the last that adds one."""
  return _total(
    [
      _count_word(pattern, keys[first : first + _WORD], num_layers)
      for first in range(0, keys.size, _WORD)
    ]
  )


def _count_word(pattern, keys, num_layers):
  """Follows at most 64 keys and returns their pairs after each layer."""
  words = np.zeros(pattern.length, np.uint64)
  words[keys] = np.uint64(1) << np.arange(keys.size, dtype=np.uint64)
  counts = []
  while num_layers is None or len(counts) < num_layers:
    words = spread(pattern, words)
    counts.append(int(np.bitwise_count(words).sum(dtype=np.int64)))
    if counts[-1] == (counts[-2] if len(counts) > 1 else keys.size):
      return counts[:-1] or counts
  return counts


def _total(counts):
  """Adds series that stay at their last entry where they end."""
  length = max((len(series) for series in counts), default=0)
  padded = [_pad(series, length) for series in counts]
  return [sum(layer) for layer in zip(*padded, strict=True)]


def _pad(series, length):
  """Repeats the last entry up to `length` entries (None: as it is)."""
  missing = 0 if length is None else length - len(series)
  return tuple(itertools.chain(series, itertools.repeat(series[-1], missing)))


def _check_sources(pattern, sources):
  """Returns the distinct positions in increasing order, or refuses them."""
  keys = np.unique(np.asarray(sources))
  if not keys.size:
    raise checked.RefusedError(
      "sources is empty: give a position or None for all"
    )
  _check_position(pattern, keys[0])
  _check_position(pattern, keys[-1])
  return keys.astype(np.int64)


def _check_position(pattern, position):
  return pattern_lib.index("position", position, pattern.length)
