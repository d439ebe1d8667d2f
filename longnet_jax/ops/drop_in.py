"""Dilated attention as the `attention_fn` of Flax's multi-head attention."""

from collections.abc import Sequence
import dataclasses
import inspect
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax import checked
from longnet_jax.ops import arguments
from longnet_jax.ops import dilated_attention as op

# What the module that calls decides, or the call itself.
_NOT_OPTIONS = {
  "dropout_rate": "give dropout_rate to the module",
  "dropout_key": "give the module a dropout rng",
  "return_residual": "call longnet_jax.dilated_attention",
  "segment_ids": "give them to the module's call, as mask",
  "key_value_seq_lengths": "give the module's call segment ids, as mask",
  "bias": "dilated attention has none",
  "mask": "give segment ids to the module's call, as mask",
  "query_seq_lengths": "dilated attention has none",
  "local_window_size": "dilated attention has none",
}


def attention_fn(
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  **options,
) -> "AttentionFn":
  """Returns a function that Flax's attention modules take as attention_fn.

  Fits `flax.linen.MultiHeadDotProductAttention`, `flax.linen.SelfAttention`
  and `flax.nnx.MultiHeadAttention`, as self-attention: give `is_causal=True`
  here rather than a causal mask to the module. For one call, the module's mask
  may be segment ids, ints (..., T): rows attend to rows of the same id only.
  Attention dropout is drawn for each pair of positions, whatever
  `broadcast_dropout`. Equal arguments make equal, hashable functions.

  Args:
    segment_lengths: (w_1, ..., w_n), in positions.
    dilation_rates: (r_1, ..., r_n).
    is_causal: whether a row sees only rows up to itself.
    **options: scale, head_phase, padding, mixing_gradient, axis_name and
      implementation of `longnet_jax.dilated_attention`.

  Raises:
    ValueError: here for bad arguments; when called, for a mask of pairs, for
      cross attention and for sown attention weights, which dilated attention
      cannot honour.
  """
  known = inspect.signature(op.dilated_attention).parameters
  legal = [x for x in known if known[x].kind == known[x].KEYWORD_ONLY]
  legal = [x for x in legal if x not in _NOT_OPTIONS]
  for name, value in options.items():
    if name in _NOT_OPTIONS and value is not None:
      raise ValueError(
        f"attention_fn does not take {name}={checked.shown(value)}; "
        f"{_NOT_OPTIONS[name]}"
      )
    if name not in known:
      raise ValueError(f"{name!r} is no option of attention_fn; use {legal}")
  options = {x: y for x, y in options.items() if x not in _NOT_OPTIONS}
  axis_name = options.pop("axis_name", None)
  implementation = options.pop("implementation", None)
  arguments.check_implementation(implementation, axis_name)
  # The scale's default needs the head width, which any will do for here.
  settings = arguments.make_settings(
    1,
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    is_causal=is_causal,
    **options,
  )
  lengths, rates = zip(*settings.branches, strict=True)
  options = {
    "scale": None if options.get("scale") is None else settings.scale,
    "head_phase": settings.head_phase,
    "padding": settings.padding,
    "mixing_gradient": settings.mixing_gradient,
    "axis_name": axis_name,
    "implementation": implementation,
  }
  return AttentionFn(lengths, rates, settings.is_causal, tuple(options.items()))


@dataclasses.dataclass(frozen=True)
class AttentionFn:
  """What `attention_fn` returns; see there.

  Attributes:
    segment_lengths: (w_1, ..., w_n).
    dilation_rates: (r_1, ..., r_n).
    is_causal: whether a row sees only rows up to itself.
    options: (name, value) of further arguments.
  """

  segment_lengths: tuple[int, ...]
  dilation_rates: tuple[int, ...]
  is_causal: bool
  options: tuple[tuple[str, Any], ...]

  def __call__(
    self,
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
  ) -> jax.Array:
    """Attends; query (..., T, N, H), key and value (..., T, K, H)."""
    del broadcast_dropout
    mask = None if mask is None else jnp.asarray(mask)
    _refuse(query, key, mask, module)
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    if mask is not None:
      mask = jnp.broadcast_to(mask, query.shape[:-2])
      mask = mask.reshape(-1, query.shape[-3])
    dropped = not deterministic and dropout_rate > 0.0
    with jax.default_matmul_precision(_name(precision)):
      out = op.dilated_attention(
        *flat,
        segment_lengths=self.segment_lengths,
        dilation_rates=self.dilation_rates,
        is_causal=is_causal or self.is_causal,
        segment_ids=mask,
        dropout_rate=dropout_rate if dropped else 0.0,
        dropout_key=dropout_rng if dropped else None,
        **dict(self.options),
      )
    return jnp.reshape(out, (*batch, *out.shape[1:]))


def _refuse(query, key, mask, module):
  if query.shape[-3] != key.shape[-3]:
    raise ValueError(
      f"query has length {query.shape[-3]}, key {key.shape[-3]}: dilated "
      "attention is self-attention, they must be equal (cross attention and "
      "Flax's decode=True are not; decode with longnet_jax.decode_step)"
    )
  if mask is not None and not (
    jnp.issubdtype(mask.dtype, np.integer)
    and mask.shape[-1:] == query.shape[-3:-2]
    and mask.ndim <= query.ndim - 2
  ):
    raise ValueError(
      "dilated attention cannot honour a mask, which has an entry for every "
      "pair of positions; use attention_fn(is_causal=True) for a causal one, "
      "segment ids, ints (..., T), in its place for packing and padding, and "
      "longnet_jax.decode_step instead of Flax's decode=True"
    )
  if module is not None:
    raise ValueError(
      "sow_weights=True is not possible: the attention weights of dilated "
      "attention are never whole in memory; use sow_weights=False"
    )


def _name(precision):
  """Returns what jax.default_matmul_precision takes; None keeps what is set.

  Of a pair, one for each operand, the more precise one.
  """
  if precision is None:
    return jax.config.jax_default_matmul_precision
  if isinstance(precision, tuple):
    pair = map(jax.lax.Precision, precision)
    return _name(max(pair, key=lambda x: x.value))
  if isinstance(precision, (jax.lax.Precision, jax.lax.DotAlgorithmPreset)):
    name = precision.name
    return name.lower() if isinstance(precision, jax.lax.Precision) else name
  return precision
