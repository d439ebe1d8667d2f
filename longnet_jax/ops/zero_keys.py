"""Torchscale's zero keys for a batch of sequences of different lengths.

With padding="zeros" the keys that fill up the last segment of a branch are
zeros that take softmax mass, so a result depends on where a sequence ends. A
zero key has score 0 and value 0: m of them turn (out, lse) of a row into

    lse' = log(exp(lse) + m),    out' = exp(lse - lse') out,

which gives each sequence of a padded batch exactly what it gets alone.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from longnet_jax import pattern
from longnet_jax.ops import dilated_attention


def zero_key_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  lengths: Int[Array, " B"],
  segment_lengths: tuple[int, ...],
  dilation_rates: tuple[int, ...],
  head_phase: str,
  scale: float | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
  """Returns bidirectional attention with padding="zeros", row by row of B.

  Example b gets what its first `lengths[b]` rows get alone; its later rows are
  meaningless and finite. Differentiable, also through the mixing weights.
  """
  out, lse = dilated_attention.dilated_attention(
    query,
    key,
    value,
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    key_value_seq_lengths=lengths,
    scale=scale,
    head_phase=head_phase,
    dropout_rate=dropout_rate,
    dropout_key=dropout_key,
    return_residual=True,
  )
  counts = count_zero_keys(
    lengths,
    query.shape[1],
    query.shape[2],
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    head_phase=head_phase,
  )
  # A row that sees no key has out = 0 already; -inf - -inf would be NaN.
  lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  total = jnp.logaddexp(lse, jnp.log(counts.astype(jnp.float32)))
  share = jnp.exp(lse - total)[..., None]
  return (out.astype(jnp.float32) * share).astype(query.dtype)


def count_zero_keys(
  lengths: Int[Array, " B"],
  length: int,
  num_heads: int,
  *,
  segment_lengths: tuple[int, ...],
  dilation_rates: tuple[int, ...],
  head_phase: str,
) -> Int[Array, "B T N"]:
  """Returns how many zero keys each row meets in all branches that keep it.

  A branch (w, r) fills each segment of w' = min(w, lengths[b]) rows, the last
  one too, up to ceil(w' / r) keys of every phase.
  """
  positions = jnp.arange(length)[None, :, None]
  ends = lengths[:, None, None]
  total = jnp.zeros((lengths.shape[0], length, num_heads), jnp.int32)
  for w, r in zip(segment_lengths, dilation_rates, strict=True):
    phases = pattern.phases(num_heads, r, head_phase)
    phase = jnp.asarray(phases, jnp.int32)[None, None]
    offset = positions % w
    segment = jnp.clip(ends - (positions - offset), 0, w)
    real = jnp.maximum(segment - phase + r - 1, 0) // r
    slots = -(-jnp.minimum(w, ends) // r)
    kept = offset % r == phase
    total += jnp.where(kept, jnp.maximum(slots - real, 0), 0)
  return total
