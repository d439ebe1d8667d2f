"""Dilated attention as the `attention_fn` of Flax's multi-head attention."""

from collections.abc import Callable, Sequence

import jax
from jax import numpy as jnp

from longnet_jax.ops import dilated_attention as op
from longnet_jax.ops import settings as settings_lib


def attention_fn(
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  **options,
) -> Callable[..., jax.Array]:
  """Returns a function that Flax's attention modules take as attention_fn.

  Fits `flax.linen.MultiHeadDotProductAttention`, `flax.linen.SelfAttention`
  and `flax.nnx.MultiHeadAttention`, as self-attention without a mask: give
  `is_causal=True` here rather than a causal mask to the module. Attention
  dropout is drawn for each pair of positions, whatever `broadcast_dropout`.

  Args:
    segment_lengths: (w_1, ..., w_n), in positions.
    dilation_rates: (r_1, ..., r_n).
    is_causal: whether a row sees only rows up to itself.
    **options: further keyword arguments of `longnet_jax.dilated_attention`.

  Raises:
    ValueError: here for bad segments and rates; when called, for a mask, for
      cross attention and for sown attention weights, which dilated attention
      cannot honour.
  """
  settings_lib.check_branches(segment_lengths, dilation_rates)
  always_causal = is_causal

  def attend(
    query,
    key,
    value,
    mask=None,
    dropout_rng=None,
    dropout_rate=0.0,
    broadcast_dropout=True,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
  ):
    del broadcast_dropout
    _refuse(query, key, mask, module)
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    dropped = not deterministic and dropout_rate > 0.0
    with jax.default_matmul_precision(_name(precision)):
      out = op.dilated_attention(
        *flat,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        is_causal=is_causal or always_causal,
        dropout_rate=dropout_rate if dropped else 0.0,
        dropout_key=dropout_rng if dropped else None,
        **options,
      )
    return jnp.reshape(out, (*batch, *out.shape[1:]))

  return attend


def _refuse(query, key, mask, module):
  if mask is not None:
    raise ValueError(
      "dilated attention cannot honour a mask, which has an entry for every "
      "pair of positions; use attention_fn(is_causal=True) for a causal one, "
      "key_value_seq_lengths or segment_ids of longnet_jax.dilated_attention "
      "for padding and packing"
    )
  if query.shape[-3] != key.shape[-3]:
    raise ValueError(
      f"query has length {query.shape[-3]}, key {key.shape[-3]}: dilated "
      "attention is self-attention, they must be equal (cross attention and "
      "Flax's decode=True are not; decode with longnet_jax.decode_step)"
    )
  if module is not None:
    raise ValueError(
      "sow_weights=True is not possible: the attention weights of dilated "
      "attention are never whole in memory; use sow_weights=False"
    )


def _name(precision):
  """Returns what jax.default_matmul_precision takes; None keeps what is set."""
  if precision is None:
    return jax.config.jax_default_matmul_precision
  if isinstance(precision, jax.lax.Precision):
    return precision.name.lower()
  return precision
