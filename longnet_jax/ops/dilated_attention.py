"""Dilated attention, the operation of LongNet: the public function.

Each branch (w, r) is softmax attention among the rows that a head keeps of one
segment (`dilation.py`); the branches are mixed in proportion to their softmax
denominators (eqs. 9-10 of arXiv 2307.02486):

    out = sum_i exp(lse_i) out_i / sum_i exp(lse_i)

which is one softmax over the multiset union of the keys of all branches.
"""

from collections.abc import Callable, Sequence

import jax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer

from longnet_jax.ops import mixture, reference, sharded
from longnet_jax.ops import settings as settings_lib

IMPLEMENTATIONS = ("reference", "xla")


def dilated_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  scale: float | Float[Array, ""] | None = None,
  key_value_seq_lengths: Integer[ArrayLike, " B"] | None = None,
  segment_ids: Integer[ArrayLike, "B T"] | None = None,
  head_phase: str = "interleaved",
  padding: str = "mask",
  mixing_gradient: bool = True,
  dropout_rate: float = 0.0,
  dropout_key: Array | None = None,
  axis_name: str | sharded.Layout | None = None,
  implementation: str | None = None,
  return_residual: bool = False,
) -> Float[Array, "B T N H"] | tuple[Array, Float[Array, "B T N"]]:
  """Attends as LongNet does; a drop-in for `jax.nn.dot_product_attention`.

  With lse_i the logsumexp of branch i (w_i, r_i) at a row and head,
  out = sum_i exp(lse_i) out_i / sum_i exp(lse_i). Costs
  4 T N H sum_i(w_i / r_i^2) FLOPs forward, half of it when causal. Memory
  beyond inputs and outputs is that of one window, the least common multiple of
  the segment lengths or T if that is less, whatever the number of branches.

  Args:
    query: (B, T, N, H): batch, length, heads, head width; any float type.
    key: (B, T, K, H); K divides N, and each key head serves N / K query heads.
    value: (B, T, K, H).
    segment_lengths: (w_1, ..., w_n), in positions; longer than T means T.
    dilation_rates: (r_1, ..., r_n), each at most its segment length. Neither
      need T be a multiple of w nor w of r.
    is_causal: whether a row sees only rows up to itself.
    scale: multiplies the scores; 1 / sqrt(H) by default. A traced one
      multiplies the query, in its type, and has a gradient.
    key_value_seq_lengths: (B,), keys at or past the length are not attended;
      they may be anything, NaN as well.
    segment_ids: (B, T), rows attend to rows of the same id only (packed
      documents); any ints but -2^31 and -2^31 + 1, which mark what is hidden.
    head_phase: "interleaved" (head j keeps rows j mod r, the paper) or
      "blocked" (j // ceil(N / r), torchscale and the released weights).
    padding: "mask" (ragged ends hide) or "zeros" (torchscale's: they are zero
      keys that take softmax mass where not causal).
    mixing_gradient: whether gradients flow through the mixing weights, as
      they should; False detaches them as torchscale does.
    dropout_rate: share of attention probabilities to drop, static; needs
      dropout_key.
    dropout_key: a JAX random key.
    axis_name: the mesh axis over which T is sharded, inside `jax.shard_map`;
      all arrays but key_value_seq_lengths are then the device's part. Or a
      `sharded.Layout`, where examples or heads are sharded as well.
    implementation: "xla" (blockwise, the default), or "reference" (dense, for
      tests, O(T^2) memory).
    return_residual: whether to return the logsumexp as well.

  Returns:
    (B, T, N, H) in query's type, and with return_residual also the mixture's
    logsumexp (B, T, N) in float32. A row that no branch keeps, or whose keys
    are all hidden, is 0 with logsumexp -inf and has no gradient.

  Raises:
    ValueError: an argument is out of its range; the message names a legal one.

  Source: arXiv 2307.02486, section 2.
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  settings_lib.check_shapes(query, key, value)
  query, scale = settings_lib.fold_scale(query, scale)
  settings = settings_lib.make_settings(
    query.shape[-1],
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    is_causal=is_causal,
    scale=scale,
    head_phase=head_phase,
    padding=padding,
    mixing_gradient=mixing_gradient,
    dropout_rate=dropout_rate,
  )
  lengths, segment_ids = settings_lib.check_masks(
    query, settings, key_value_seq_lengths, segment_ids, dropout_key
  )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation is {implementation!r}; use None or one of "
      f"{IMPLEMENTATIONS}"
    )
  if axis_name is not None and implementation == "reference":
    raise ValueError(
      "implementation='reference' cannot be combined with axis_name; use None"
    )
  seed = None
  if settings.dropout_rate:
    seed = jax.random.bits(dropout_key, dtype=jnp.uint32)
  inputs = query, key, value, lengths, segment_ids, seed
  if axis_name is not None:
    layout = axis_name
    if not isinstance(layout, sharded.Layout):
      layout = sharded.Layout(axis_name)
    out, lse = sharded.attend(settings, layout, inputs)
  elif implementation == "reference":
    out, lse = reference.attend(settings, *inputs)
  else:
    out, lse = mixture.attend(settings, *inputs)
  out = out.astype(query.dtype)
  return (out, lse) if return_residual else out


def mixing_weights(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  attend: Callable | None = None,
  **options,
) -> Float[Array, " branches"]:
  """Returns each branch's mean share exp(lse_i - lse) of the mixture.

  The mean is over the rows and heads that some branch keeps; it sums to 1.

  Args:
    query: (B, T, N, H).
    key: (B, T, K, H).
    segment_lengths: (w_1, ..., w_n).
    dilation_rates: (r_1, ..., r_n).
    attend: computes one branch in place of `dilated_attention`, as over a mesh.
    **options: further arguments of `dilated_attention`.
  """
  attend = attend or dilated_attention
  lses = jnp.stack(
    [
      attend(
        query,
        key,
        key,
        segment_lengths=(w,),
        dilation_rates=(r,),
        return_residual=True,
        **options,
      )[1]
      for w, r in zip(segment_lengths, dilation_rates, strict=True)
    ]
  )
  kept = jnp.isfinite(lses).any(0)
  shares = jax.nn.softmax(jnp.where(kept, lses, 0.0), axis=0)
  total = jnp.maximum(kept.sum(dtype=jnp.float32), 1.0)
  return jnp.where(kept, shares, 0.0).sum((1, 2, 3)) / total
