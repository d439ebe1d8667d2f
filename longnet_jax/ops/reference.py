"""Dilated attention by dense masks: slow, obvious, differentiated by JAX."""

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax import pattern as pattern_lib
from longnet_jax.ops import attention


def attend(settings, query, key, value, lengths, segment_ids, seed):
  """Returns the mixture's (out, lse) in O(B N T^2) memory.

  Args:
    settings: static arguments.
    query: (B, T, N, H).
    key: (B, T, K, H).
    value: (B, T, K, H).
    lengths: (B,) or None.
    segment_ids: (B, T) or None.
    seed: uint32 of the dropout, or None.
  """
  batch, length, num_heads, _ = query.shape
  group = num_heads // key.shape[2]
  key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
  if lengths is None:
    lengths = jnp.full((batch,), length)
  if segment_ids is None:
    segment_ids = jnp.zeros((batch, length), jnp.int32)
  if not batch or not length:
    return jnp.zeros_like(query), jnp.zeros(query.shape[:3], jnp.float32)
  outs, lses = zip(
    *(
      _branch(settings, i, query, key, value, lengths, segment_ids, seed)
      for i in range(len(settings.branches))
    ),
    strict=True,
  )
  if settings.mixing_gradient:
    out, lse = outs[0], lses[0]
    for other_out, other_lse in zip(outs[1:], lses[1:], strict=True):
      out, lse = attention.merge(out, lse, other_out, other_lse)
    return out, lse.astype(jnp.float32)
  lses = jnp.stack(lses)
  lse = jax.nn.logsumexp(lses, axis=0)
  shares = jnp.exp(lses - jnp.where(jnp.isneginf(lse), 0, lse)[None])
  shares = jax.lax.stop_gradient(shares)[..., None]
  return (shares * jnp.stack(outs)).sum(0), lse.astype(jnp.float32)


def _branch(settings, index, query, key, value, lengths, segment_ids, seed):
  """Returns (out (B, T, N, H), lse (B, T, N)) of one branch."""
  w, r = settings.branches[index]
  batch, length, num_heads, _ = query.shape
  w = min(w, length)
  num_segments = -(-length // w)
  reach = pattern_lib.max_kept(w, r) * r  # a segment with its padding
  position = np.arange(length)
  segment, offset = position // w, position % w
  key_segment = np.repeat(np.arange(num_segments), reach)
  key_offset = np.tile(np.arange(reach), num_segments)
  key_position = key_segment * w + key_offset
  real = (key_offset < w) & (key_position < length)
  source = np.where(real, key_position, 0)
  phase = pattern_lib.phases(num_heads, r, settings.head_phase)[:, None, None]
  pattern = (
    (segment[:, None] == key_segment)
    & (offset[:, None] % r == phase)
    & (key_offset % r == phase)
  )
  if settings.is_causal:
    pattern &= offset[:, None] >= key_offset
  if settings.padding == "mask":
    pattern &= real

  def one(b, head, q, k, v, end, ids, pattern):
    there = real & (source < end)
    k, v = (jnp.where(there[:, None], x[source], 0) for x in (k, v))
    mask = pattern & (source < end)[None] & (ids[:, None] == ids[source][None])
    factor = None
    if seed is not None:
      factor = attention.dropout_factor(
        attention.Rows(
          hashes=attention.row_bits(seed, index, b, head, position, 0)
        ),
        attention.Rows(
          hashes=attention.row_bits(seed, index, b, head, key_position, 1)
        ),
        settings.dropout_rate,
      )
    return attention.softmax_attention(
      q, k, v, mask, factor, scale=settings.scale
    )

  heads = jax.vmap(one, (None, 0, 1, 1, 1, None, None, 0), (1, 1))
  return jax.vmap(heads, (0, None, 0, 0, 0, 0, 0, None))(
    jnp.arange(batch),
    jnp.arange(num_heads),
    query,
    key,
    value,
    lengths,
    segment_ids,
    jnp.asarray(pattern),
  )
