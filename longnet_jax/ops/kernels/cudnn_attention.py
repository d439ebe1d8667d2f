"""cuDNN's flash attention, for NVIDIA GPUs: bfloat16 alone.

What the public `jax.nn.dot_product_attention` keeps back is needed here: lse in
float32, and a backward pass that takes out and lse of a larger softmax. So this
file binds the primitives behind it, and is the only one to touch private JAX.

cuDNN has one length for all heads of a sequence. Where a length differs from
head to head, each head is a sequence of its own.
"""

from collections.abc import Callable
import functools
import inspect
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import kernels

TYPES = ("bfloat16",)
# By whether the device is of compute capability 9.0 or later.
WIDEST = {True: 256, False: 128}
# What a gradient of lse adds to the width of a head.
_EXTRA = 8
# The oldest version that serves every capability from 8.0 on: 9.11.
_VERSION = 91100
# Parameters of the primitives: of both, of each, and since jax 0.12.
_PARAMETERS = (
  *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets"),
  *("kv_offsets", "page_table_k", "page_table_v", "scale", "seed"),
  *("dropout_rate", "variadic_args", "mask_type", "layout"),
  "sliding_window_length",
)
_OWN = {
  "fwd": ("is_training",),
  "bwd": ("activation", "fwd_output", "grad_output"),
}
_NEWER = {"score_mod", "score_mod_args"}
# An lse so large that a row takes no part, and is finite in base 2, too.
_LARGE = 1e30


class Primitives(NamedTuple):
  """Two functions of G sequences, float32 lse (G, N, M), lengths (G,) or None.

  forward: (query (G, M, N, H), key, value (G, n, K, H), lengths, *, scale,
    is_causal) -> out, lse.
  backward: (query, key, value, lengths, out, lse, dout, *, scale, is_causal)
    -> dquery, dkey, dvalue.
  """

  forward: Callable
  backward: Callable


def make_kernel(platform: str) -> kernels.Kernel:
  """Returns the kernel; it supports nothing on another platform than gpu."""
  supports = functools.partial(_supports, platform=platform)
  return kernels.Kernel(_forward, _backward, supports, at_once=2**30)


def _supports(query, key, mask, dlse=None, *, platform):
  """Returns None, or why not."""
  del key
  if platform != "gpu":
    return f"runs on NVIDIA GPUs, not on {platform}"
  found = primitives()
  if isinstance(found, str):
    return found
  capability, why = _device()
  if why:
    return why
  if query.dtype not in TYPES:
    return f"attends in bfloat16, not {query.dtype}"
  if mask.ids:
    return "tells no rows apart by segment_ids, or in shards that cut segments"
  if mask.dropout_rate:
    return f"drops nothing out, and dropout_rate is {mask.dropout_rate}"
  if not isinstance(query.shape[0], int):
    return f"needs to know the batch size, which is {query.shape[0]}"
  width, widest = query.shape[-1], WIDEST[capability >= (9, 0)]
  if width % 8 or width > widest:
    return f"takes head widths that are multiples of 8 to {widest}, not {width}"
  if dlse is not None and width + _EXTRA > widest:
    return f"has no gradient of the logsumexp for head width {width}"
  return None


@functools.cache
def _device():
  """Returns the compute capability, and None or why there is no cuDNN.

  Of a GPU that is compiled for and not here, that of an H100.
  """
  if jax.default_backend() != "gpu":
    return (9, 0), None
  device = jax.local_devices()[0]
  if "cuda" not in device.client.platform_version:
    return (0, 0), f"runs on NVIDIA GPUs, not on {device.device_kind}"
  capability = tuple(int(x) for x in device.compute_capability.split("."))
  versions = getattr(jax._src.lib, "cuda_versions", None)
  cudnn = versions.cudnn_get_version() if versions else 0
  why = None
  if capability < (8, 0):
    why = (
      f"needs compute capability 8.0, and {device.device_kind} has "
      f"{device.compute_capability}"
    )
  elif cudnn < _VERSION:
    why = f"needs cuDNN {_VERSION}, and found {cudnn or 'none'}"
  return capability, why


@functools.cache
def primitives() -> Primitives | str:
  """Returns cuDNN's two functions, or why there are none that are known."""
  found, options = [], {}
  try:
    from jax._src.cudnn import fused_attention_stablehlo as library

    for way in ("fwd", "bwd"):
      name = f"_dot_product_attention_{way}"
      found.append(getattr(library, f"{name}_p_wrapper"))
      impl = getattr(library, f"{name}_impl")
      parameters = set(inspect.signature(impl).parameters)
      if "score_mod" in parameters:
        options["score_mod"] = None
      unknown = (parameters - _NEWER) ^ {*_PARAMETERS, *_OWN[way]}
      if unknown:
        return (
          f"has other parameters in jax {jax.__version__}: {sorted(unknown)}"
        )
    masks, layout = library.MaskType, library.AttentionLayout.BTNH.value
  except (ImportError, AttributeError) as error:
    return f"is not where jax {jax.__version__} was known to keep it: {error}"

  def arguments(query, lengths, scale, is_causal):
    nothing = jnp.zeros(0, query.dtype)
    sizes = nothing, nothing
    if lengths is not None:
      sizes = jnp.full_like(lengths, query.shape[1]), lengths
    kind = ("NO_MASK", "CAUSAL", "PADDING", "PADDING_CAUSAL")[
      is_causal + 2 * (lengths is not None)
    ]
    return (nothing, *sizes, *[nothing] * 4), dict(
      scale=float(scale),
      seed=0,
      dropout_rate=0.0,
      variadic_args=(False, False),
      mask_type=masks[kind],
      layout=layout,
      sliding_window_length=None,
      **options,
    )

  def forward(query, key, value, lengths, *, scale, is_causal):
    more, static = arguments(query, lengths, scale, is_causal)
    return found[0].bind(query, key, value, *more, is_training=True, **static)

  def backward(query, key, value, lengths, out, lse, dout, *, scale, is_causal):
    more, static = arguments(query, lengths, scale, is_causal)
    terms = lse, out, dout
    return found[1].bind(query, key, value, *more, *terms, **static)

  return Primitives(_of_more_sequences(forward), _of_more_sequences(backward))


def _of_more_sequences(run):
  """Returns a function of sequences that `jax.vmap` gives more of them.

  Before jax 0.12 the primitives' own rule wants all of them to be mapped.
  """

  def call(*arrays, **static):
    bound = jax.custom_batching.custom_vmap(functools.partial(run, **static))

    @bound.def_vmap
    def _(size, mapped, *arrays):
      spread = lambda x, is_mapped: (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
      )
      more = jax.tree.map(spread, arrays, tuple(mapped))
      found = bound(
        *(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), more))
      )
      found = [x.reshape(size, -1, *x.shape[1:]) for x in found]
      return found, [True] * len(found)

    return bound(*arrays)

  return call


def _forward(query, key, value, mask, *, scale):
  """Returns out (B, S, M, N, H) and lse (B, S, M, N)."""
  lengths = _lengths(query, mask)
  fold = functools.partial(_fold, lengths=lengths, heads=query.shape[3])
  found = primitives().forward(
    *map(fold, (query, key, value)),
    _at_least_one(lengths),
    scale=scale,
    is_causal=mask.is_causal,
  )
  out, lse = found[0].astype(jnp.float32), found[1].swapaxes(1, 2)
  out, lse = (_unfold(x, query, lengths) for x in (out, lse))
  if lengths is None:
    return out, lse
  seen = lengths[:, :, None] > 0
  return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)


def _backward(query, key, value, mask, out, lse, dout, dlse, *, scale):
  """Returns dquery (B, S, M, N, H) and dkey, dvalue (B, S, n, K, H)."""
  lengths, width = _lengths(query, mask), query.shape[-1]
  lse = jnp.minimum(lse, _LARGE)
  if lengths is not None:
    lse = jnp.where(lengths[:, :, None] > 0, lse, _LARGE)
  out, dout = (x.astype(query.dtype) for x in (out, dout))
  tensors = query, key, value, out, dout
  if dlse is not None:
    tensors = _widened(*tensors, dlse)
  fold = functools.partial(_fold, lengths=lengths, heads=query.shape[3])
  *tensors, out, dout = map(fold, tensors)
  grads = primitives().backward(
    *tensors,
    _at_least_one(lengths),
    out,
    fold(lse).swapaxes(1, 2),
    dout,
    scale=scale,
    is_causal=mask.is_causal,
  )
  return tuple(
    _unfold(grad.astype(jnp.float32), like, lengths)[..., :width]
    for grad, like in zip(grads, (query, key, value), strict=True)
  )


def _lengths(query, mask):
  """Returns lengths (B, S, N), or (B, S, 1) where heads do not differ."""
  lengths = mask.lengths
  if lengths is None:
    return None
  if not lengths.ndim:
    lengths = lengths[None, None, None]
  shape = *query.shape[:2], lengths.shape[2]
  return jnp.broadcast_to(lengths, shape).astype(jnp.int32)


def _at_least_one(lengths):
  """Returns (G,): what cuDNN makes of no key at all is not relied upon."""
  return None if lengths is None else jnp.maximum(lengths, 1).reshape(-1)


def _by_head(lengths):
  return lengths is not None and lengths.shape[2] > 1


def _fold(x, lengths, heads):
  """Returns sequences (G, M, K, ...), or (G, M, 1, ...) of each query head."""
  if _by_head(lengths):
    x = jnp.moveaxis(x, 3, 2)
    x = jnp.repeat(x, heads // x.shape[2], axis=2)
    return x.reshape(-1, x.shape[3], 1, *x.shape[4:])
  return x.reshape(-1, *x.shape[2:])


def _unfold(x, like, lengths):
  """Returns (B, S, M, K, ...), heads added up to those of an array."""
  batch, segments, _, heads, _ = like.shape
  if _by_head(lengths):
    x = x.reshape(batch, segments, heads, -1, x.shape[1], *x.shape[3:])
    return jnp.moveaxis(x.sum(3), 2, 3)
  return x.reshape(batch, segments, *x.shape[1:])


def _widened(query, key, value, out, dout, dlse):
  """Returns wider heads for which D = rowsum(dO * out) is less by dlse.

  In more columns dO is 1 and out is -dlse, in as many parts as bfloat16 needs
  to hold a float32; query, key and value are 0 there and change nothing.
  """

  def widen(x, *columns):
    columns = [jnp.asarray(c, x.dtype)[..., None] for c in columns]
    zeros = [*x.shape[:-1], _EXTRA - len(columns)]
    return jnp.concatenate([x, *columns, jnp.zeros(zeros, x.dtype)], axis=-1)

  parts, rest = [], -dlse.astype(jnp.float32)
  for _ in range(3):
    # Unlike a cast to bfloat16 and back, nothing that compilers leave out.
    parts.append(lax.reduce_precision(rest, 8, 7))
    rest = rest - parts[-1]
  ones = jnp.ones_like(dlse)
  return (
    *map(widen, (query, key, value)),
    widen(out, *parts),
    widen(dout, *[ones] * len(parts)),
  )
