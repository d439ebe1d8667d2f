"""Exact FLOPs and bytes of a setting, from closed forms at any length.

Those of a model are counted as published: matrix products and attention scores
once forward and twice backward; what is recomputed to save memory is not work
of the model.
"""

import dataclasses

from longnet_jax import checked
from longnet_jax import pattern as pattern_lib

_LSE_BYTES = 4  # the logsumexp is float32 whatever the compute type


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one attention layer costs for one sequence, all heads together.

  Attributes:
    pairs: (query, key) pairs scored, over all branches and heads.
    forward_flops: 4 d a pair: the scores and the weighted sum of values.
    backward_flops: 10 d a pair: the scores again, dV, dP, dQ and dK.
    forward_bytes: every branch reads its rows of q, k, v once and writes its
      rows of out and logsumexp once. A lower bound: keys that do not stay on
      the chip are read again.
    backward_bytes: the same for reading q, k, v, dO, logsumexp and
      rowsum(dO * O), and writing dq, dk, dv.
    saved_bytes: q, k, v, out, logsumexp, held from forward to backward.
    cache_bytes: keys and values that decoding holds, see `decode_cache_bytes`.
  """

  pairs: int
  forward_flops: int
  backward_flops: int
  forward_bytes: int
  backward_bytes: int
  saved_bytes: int
  cache_bytes: int


def cost(
  pattern: pattern_lib.Pattern,
  *,
  head_dim: int = 64,
  num_kv_heads: int | None = None,
  itemsize: int = 2,
) -> Cost:
  """Returns what one attention layer costs; of `dense(pattern)`: dense's cost.

  Args:
    pattern: the setting.
    head_dim: width of a head, d.
    num_kv_heads: key/value heads, a divisor of the query heads (None: as many).
    itemsize: bytes of a number in q, k, v, out and the cache.

  Raises:
    ValueError: a size is below 1 or num_kv_heads does not divide num_heads.
  """
  num_kv_heads = _checked_kv_heads(pattern, num_kv_heads, head_dim, itemsize)
  heads = range(pattern.num_heads)
  pairs = pattern_lib.total_pairs(pattern)
  query_rows = sum(
    pattern_lib.count_rows(pattern, b, pattern_lib.phase(pattern, r, h))
    for b, (_, r) in enumerate(pattern.branches)
    for h in heads
  )
  key_rows = sum(
    pattern_lib.count_rows(pattern, b, offset)
    for b, (_, r) in enumerate(pattern.branches)
    for _, offset in _streams(pattern, r, num_kv_heads)
  )
  row, n = head_dim * itemsize, pattern.length
  return Cost(
    pairs=pairs,
    forward_flops=4 * head_dim * pairs,
    backward_flops=10 * head_dim * pairs,
    forward_bytes=query_rows * (2 * row + _LSE_BYTES) + key_rows * 2 * row,
    backward_bytes=query_rows * (3 * row + 2 * _LSE_BYTES) + key_rows * 4 * row,
    saved_bytes=n * (2 * pattern.num_heads + 2 * num_kv_heads) * row
    + n * pattern.num_heads * _LSE_BYTES,
    cache_bytes=decode_cache_bytes(
      pattern,
      head_dim=head_dim,
      num_kv_heads=num_kv_heads,
      itemsize=itemsize,
    ),
  )


def decode_cache_bytes(
  pattern: pattern_lib.Pattern,
  *,
  head_dim: int = 64,
  num_kv_heads: int | None = None,
  itemsize: int = 2,
) -> int:
  """Returns the bytes of keys and values that decoding one sequence holds.

  A branch needs only the kept rows of the current segment: for each head a
  ring of ceil(w / r) rows, so that, without grouped-query attention,

    bytes = sum_i ceil(min(w_i, N) / r_i) * H * d * 2 * itemsize

  and heads that share a key/value head and a phase share a ring. Constant in N
  once N exceeds every w; of `dense(pattern)`: N rows a key/value head.
  """
  num_kv_heads = _checked_kv_heads(pattern, num_kv_heads, head_dim, itemsize)
  rows = sum(
    pattern_lib.max_kept(min(w, pattern.length), r)
    * len(_streams(pattern, r, num_kv_heads))
    for w, r in pattern.branches
  )
  return rows * 2 * head_dim * itemsize


def train_flops(config, length: int) -> int:
  """Returns forward and backward FLOPs of one window of `length` positions.

  Args:
    config: a `LongNetConfig`.
    length: positions of the window.
  """
  projections, logits, pairs = _forward(config, length)
  return 3 * (2 * (projections + logits) + 4 * config.head_dim * pairs)


def _forward(config, length):
  """Returns multiplications in blocks and for logits, and pairs of scores."""
  width, heads = config.model_dim, config.num_heads
  projections = width * config.head_dim * (2 * heads + 2 * config.kv_heads)
  block = projections + 2 * width * config.ffn_dim
  return (
    config.num_layers * block * length,
    width * config.vocab_size * length,
    config.num_layers * attention_pairs(config, length),
  )


def computed_flops(config, length: int, platform: str) -> int:
  """Returns the FLOPs of a training step as computed, a window of `length`.

  Beside those of `train_flops`, scores are computed a second time backward, and
  with remat="full" or "offload" all that a block computes forward; with "dots"
  the first half of its feed-forward layer and, on TPU, values. The narrow
  product that adds up a softmax there, see `training.loss`, is not counted.

  Args:
    config: a `LongNetConfig`.
    length: positions of the window.
    platform: "tpu", "gpu" or "cpu".
  """
  projections, logits, _ = _forward(config, length)
  products = (3 + _again(config)) * projections + 3 * logits
  if config.remat == "dots":
    again = config.ffn_dim
    if platform == "tpu":
      again += config.kv_heads * config.head_dim
    products += config.num_layers * config.model_dim * again * length
  return 2 * products + score_flops(config, length)


def score_flops(config, length: int) -> int:
  """Returns those of `computed_flops` that attention's kernels do.

  Args:
    config: a `LongNetConfig`.
    length: positions of the window.
  """
  pairs = config.num_layers * attention_pairs(config, length)
  return (4 * (1 + _again(config)) + 10) * config.head_dim * pairs


def _again(config):
  """Returns whether backward computes a block a second time."""
  return config.remat in ("full", "offload")


def attention_pairs(config, length: int) -> int:
  """Returns the causal (query, key) pairs that all heads of a layer score.

  Args:
    config: a `LongNetConfig`, of any attention.
    length: positions in the sequence.
  """
  if config.attention == "sparse":
    return config.num_heads * pattern_lib.sparse_pairs(
      length, config.sparse_block, config.sparse_summary
    )
  return pattern_lib.total_pairs(pattern_lib.from_config(config, length))


def _streams(pattern, rate, num_kv_heads):
  """Returns the distinct (key/value head, phase) that a branch reads."""
  group = pattern.num_heads // num_kv_heads
  return {
    (head // group, pattern_lib.phase(pattern, rate, head))
    for head in range(pattern.num_heads)
  }


def _checked_kv_heads(pattern, num_kv_heads, head_dim, itemsize):
  """Returns the number of key/value heads, or refuses the sizes."""
  pattern_lib.as_int("head_dim", head_dim)
  pattern_lib.as_int("itemsize", itemsize)
  if num_kv_heads is None:
    return pattern.num_heads
  num_kv_heads = pattern_lib.as_int("num_kv_heads", num_kv_heads)
  if pattern.num_heads % num_kv_heads:
    raise checked.RefusedError(
      f"num_kv_heads is {num_kv_heads}: must divide num_heads "
      f"{pattern.num_heads}"
    )
  return num_kv_heads
