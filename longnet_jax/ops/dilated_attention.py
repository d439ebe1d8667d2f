"""Dilated attention, the operation of LongNet: the public function.

Each branch (w, r) is softmax attention among the rows that a head keeps of one
segment (`selection.py`); the branches are mixed in proportion to their softmax
denominators (eqs. 9-10 of arXiv 2307.02486):

    out = sum_i exp(lse_i) out_i / sum_i exp(lse_i)

which is one softmax over the multiset union of the keys of all branches.
"""

from collections.abc import Callable, Sequence
import functools

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from longnet_jax.ops import arguments, mixture, reference, sharded


def dilated_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  scale: float | Array | None = None,
  query_seq_lengths: ArrayLike | None = None,
  key_value_seq_lengths: ArrayLike | Sequence | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  segment_ids: ArrayLike | Sequence | None = None,
  head_phase: str = "interleaved",
  padding: str = "mask",
  mixing_gradient: bool = True,
  dropout_rate: float = 0.0,
  dropout_key: Array | None = None,
  axis_name: str | sharded.Layout | None = None,
  implementation: str | None = None,
  return_residual: bool = False,
) -> Float[Array, "*B T N H"] | tuple[Array, Float[Array, "*B T N"]]:
  """Attends as LongNet does; a drop-in for `jax.nn.dot_product_attention`.

  With lse_i the logsumexp of branch i (w_i, r_i) at a row and head,
  out = sum_i exp(lse_i) out_i / sum_i exp(lse_i). Costs
  4 T N H sum_i(w_i / r_i^2) FLOPs forward, half of it when causal. Memory
  beyond inputs and outputs is that of one window, the least common multiple of
  the segment lengths or T if that is less, whatever the number of branches.

  Args:
    query: (B, T, N, H), or (T, N, H): batch, length, heads, head width; any
      float type.
    key: (B, T, K, H); K divides N, and each key head serves N / K query heads.
    value: (B, T, K, H).
    bias: None, as all that `jax.nn.dot_product_attention` takes and dilated
      attention cannot honour: mask, query_seq_lengths, local_window_size.
    mask: None.
    segment_lengths: (w_1, ..., w_n), in positions; longer than T means T.
    dilation_rates: (r_1, ..., r_n), each at most its segment length. Neither
      need T be a multiple of w nor w of r.
    is_causal: whether a row sees only rows up to itself.
    scale: multiplies the scores; 1 / sqrt(H) by default. A traced one
      multiplies the query, in its type, and has a gradient.
    query_seq_lengths: None.
    key_value_seq_lengths: (B,), keys at or past the length are not attended;
      they may be anything, NaN as well.
    local_window_size: None.
    segment_ids: (B, T), rows attend to rows of the same id only (packed
      documents); any ints, of 64 bits too.
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
    implementation: None picks what is fastest and able to; "xla" (blockwise)
      can do everything in reverse mode; "cudnn" is for bfloat16 on NVIDIA GPUs,
      "pallas_tpu" for TPUs; "reference" is dense, for tests and forward mode,
      in O(T^2) memory.
    return_residual: whether to return the logsumexp as well.

  Returns:
    (B, T, N, H) in query's type, and with return_residual also the mixture's
    logsumexp (B, T, N) in float32. A row that no branch keeps, or whose keys
    are all hidden, is 0 with logsumexp -inf and has no gradient.

  Raises:
    ValueError: an argument is out of its range; the message names a legal one.

  Source: arXiv 2307.02486, section 2.
  """
  arguments.refuse_masks(
    bias=bias,
    mask=mask,
    query_seq_lengths=query_seq_lengths,
    local_window_size=local_window_size,
  )
  tensors = [jnp.asarray(x) for x in (query, key, value)]
  tensors, key_value_seq_lengths, segment_ids, single = arguments.as_batch(
    tensors, key_value_seq_lengths, segment_ids
  )
  arguments.check_tensors(*tensors)
  tensors[0], scale = arguments.fold_scale(tensors[0], scale)
  arguments.check_implementation(implementation, axis_name)
  settings = arguments.make_settings(
    tensors[0].shape[-1],
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    is_causal=is_causal,
    scale=scale,
    head_phase=head_phase,
    padding=padding,
    mixing_gradient=mixing_gradient,
    dropout_rate=dropout_rate,
    implementation=implementation,
  )
  inputs = arguments.make_inputs(
    tensors, settings, key_value_seq_lengths, segment_ids, dropout_key
  )
  if implementation == "reference":
    run = functools.partial(reference.attend, settings)
    out, lse = _placed(run, tensors[0], True)(inputs)
    out = out.astype(tensors[0].dtype)
  else:
    layout = axis_name
    if isinstance(axis_name, str):
      layout = sharded.Layout(axis_name)
    if not isinstance(layout, (sharded.Layout, type(None))):
      raise ValueError(
        f"axis_name is {axis_name!r}; use the name of one mesh axis, a str"
      )
    run = functools.partial(
      mixture.attend, settings, layout, return_residual=return_residual
    )
    with arguments.forward_mode_explained():
      out, lse = _placed(run, tensors[0], return_residual)(inputs)
  if single:
    out, lse = jax.tree.map(lambda x: x[0], (out, lse))
  return (out, lse) if return_residual else out


def _placed(run, query, has_lse):
  """Returns `run`, whose out and lse lie in a caller's mesh where query does.

  Where axes are explicit, JAX's default, each operation must say where its
  result lies: that is said once, and all between left to the compiler, as in a
  mesh of automatic axes.

  Args:
    run: a function of any arrays to (out, lse).
    query: (B, T, N, H); out is such an array, lse (B, T, N).
    has_lse: whether lse is an array, not None.
  """
  where = jax.typeof(query).sharding
  axes = zip(where.mesh.axis_names, where.mesh.axis_types, strict=True)
  kinds = jax.sharding.AxisType
  explicit = tuple(name for name, kind in axes if kind == kinds.Explicit)
  if not explicit:
    return run
  rows = jax.sharding.PartitionSpec(*where.spec[:3])
  of_lse = jax.sharding.NamedSharding(where.mesh, rows) if has_lse else None
  return jax.sharding.auto_axes(
    run, axes=explicit, out_sharding=(where, of_lse)
  )


def mixing_weights(
  query: Float[Array, "*B T N H"],
  key: Float[Array, "*B T K H"],
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  attend: Callable | None = None,
  **options,
) -> Float[Array, "N branches"]:
  """Returns each branch's mean share exp(lse_i - lse) of a head's mixture.

  The mean is over the rows that some branch keeps; those of a head sum to 1.

  Args:
    query: (B, T, N, H) or (T, N, H).
    key: (B, T, K, H) or (T, K, H).
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
  rows = tuple(range(kept.ndim - 1))
  total = jnp.maximum(kept.sum(rows, dtype=jnp.float32), 1.0)
  means = jax.vmap(lambda x: jnp.where(kept, x, 0.0).sum(rows) / total)(shares)
  return means.T
