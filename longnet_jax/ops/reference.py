"""Dilated attention by dense masks: slow, obvious, differentiated by JAX."""

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax import pattern as pattern_lib
from longnet_jax.ops import attention


def attend(settings, inputs):
  """Returns the mixture's (out, lse) in O(B N T^2) memory.

  Args:
    settings: the `arguments.Settings`.
    inputs: the `arguments.Inputs`.
  """
  query = inputs.query
  batch, length, num_heads, _ = query.shape
  if 0 in query.shape:
    return query, jnp.full(query.shape[:3], -jnp.inf)
  if inputs.lengths is not None and settings.padding == "zeros":
    raise ValueError(
      "implementation='reference' cannot be combined with padding='zeros' and "
      "key_value_seq_lengths; use None"
    )
  group = num_heads // inputs.key.shape[2]
  key, value = (jnp.repeat(x, group, axis=2) for x in inputs[1:3])
  lengths = inputs.lengths
  if lengths is None:
    lengths = jnp.full((batch,), length)
  inputs = inputs._replace(key=key, value=value, lengths=lengths)
  outs, lses = zip(
    *(_branch(settings, i, inputs) for i in range(len(settings.branches))),
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


def _branch(settings, index, inputs):
  """Returns (out (B, T, N, H), lse (B, T, N)) of one branch."""
  w, r = settings.branches[index]
  batch, length, num_heads, _ = inputs.query.shape
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
    mask = pattern & (source < end)[None]
    for x in ids:
      mask &= x[:, None] == x[source][None]
    factor = None
    if inputs.seed is not None:
      bits = (
        attention.row_bits(inputs.seed, index, b, head, where, side)
        for side, where in enumerate((position, key_position))
      )
      factor = attention.dropout_factor(*bits, settings.dropout_rate)
    return attention.softmax_attention(
      q, k, v, mask, factor, scale=settings.scale
    )

  heads = jax.vmap(one, (None, 0, 1, 1, 1, None, None, 0), (1, 1))
  return jax.vmap(heads, (0, None, 0, 0, 0, 0, 0, None))(
    jnp.arange(batch),
    jnp.arange(num_heads),
    inputs.query,
    inputs.key,
    inputs.value,
    inputs.lengths,
    inputs.documents,
    jnp.asarray(pattern),
  )
