"""Softmax attention by its definition, merging two of them, and dropout.

    s_ij = scale q_i . k_j          where row i may see key j, else -inf
    lse_i = log sum_j exp(s_ij),    out_i = sum_j exp(s_ij - lse_i) v_j

Every attention here returns `(out, lse)`. A row that sees no key has out = 0,
lse = -inf and no gradient.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt32


def row_bits(
  seed: UInt32[Array, ""], *coordinates: Int[ArrayLike, "..."]
) -> UInt32[Array, "..."]:
  """Hashes broadcastable coordinates (branch, batch, head, ...) of rows."""
  bits = seed
  for coordinate in coordinates:
    bits = _mix_bits(bits ^ jnp.asarray(coordinate).astype(jnp.uint32))
    bits = bits + jnp.uint32(0x9E3779B9)
  return bits


def _mix_bits(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """Spreads each input bit over all 32 (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def dropout_factor(
  query_bits: UInt32[Array, "*rest M"],
  key_bits: UInt32[Array, "*rest n"],
  rate: float,
) -> Float[Array, "*rest M n"]:
  """Returns 0 for a dropped pair, 1 / (1 - rate) for a kept one.

  The choice is a hash of the two rows, not a stream of random numbers: it is
  the same whatever block, order or device computes the pair.
  """
  bits = _mix_bits(query_bits[..., :, None] ^ key_bits[..., None, :])
  kept = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return kept.astype(jnp.float32) / (1.0 - rate)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the type that scores, sums and gradients of `dtype` are kept in."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def softmax_attention(
  query: Float[Array, "M H"],
  key: Float[Array, "n H"],
  value: Float[Array, "n H"],
  mask: Bool[Array, "M n"],
  factor: Float[Array, "M n"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
  """Attends with the whole (M, n) score matrix in memory; differentiable.

  Args:
    query: (M, H).
    key: (n, H).
    value: (n, H).
    mask: (M, n), true where a query sees a key.
    factor: (M, n), multiplies the probabilities (dropout), or None.
    scale: multiplies the scores.

  Returns:
    out (M, H) and lse (M,), both in float32 or wider.
  """
  dtype = accumulator(query.dtype)
  query, key, value = (x.astype(dtype) for x in (query, key, value))
  scores = scale * (query @ key.T)
  seen = mask.any(-1)
  # A row of -inf alone would make NaN of its gradient: give it finite scores
  # and take its output away afterwards.
  scores = jnp.where(mask | ~seen[:, None], scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - lse[:, None])
  if factor is not None:
    weights *= factor.astype(dtype)
  out = jnp.where(seen[:, None], weights @ value, 0)
  return out, jnp.where(seen, lse, -jnp.inf)


def merge(
  out: Float[Array, "*rows H"],
  lse: Float[Array, "*rows"],
  other_out: Float[Array, "*rows H"],
  other_lse: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
  """Joins two attentions of the same rows into one softmax over all their keys.

      lse = log(exp(lse_1) + exp(lse_2)),  out = sum_i exp(lse_i - lse) out_i

  This is the mixture of LongNet's branches (eqs. 9-10) as well as the step of
  online softmax; rows that see no key on either side stay 0 and -inf.
  """
  top = jnp.maximum(lse, other_lse)
  finite = jnp.where(jnp.isneginf(top), 0, top)
  weight, other = jnp.exp(lse - finite), jnp.exp(other_lse - finite)
  total = weight + other
  share = (weight / jnp.where(total > 0, total, 1))[..., None]
  other_share = (other / jnp.where(total > 0, total, 1))[..., None]
  total_lse = jnp.where(total > 0, finite + jnp.log(total), -jnp.inf)
  return share * out + other_share * other_out, total_lse
