"""The arguments of dilated attention, and the refusal of bad ones."""

from collections.abc import Sequence
import contextlib
import math
import operator
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32
import numpy as np

from longnet_jax import pattern
from longnet_jax.ops import attention, kernels

PADDINGS = ("mask", "zeros")
# What `jax.nn.dot_product_attention` takes and dilated attention cannot honour.
DENSE_MASKS = ("bias", "mask", "query_seq_lengths", "local_window_size")


class Settings(NamedTuple):
  """Checked static arguments of `dilated_attention`, hashable for jit.

  precision: that of the caller's `jax.default_matmul_precision`, which the
    backward pass, traced later, would not know of.
  kernel: one of `kernels.FILES`, or None to pick; "reference" goes without.
  platform: that JAX runs on or compiles for; sizes and types depend on it.
  """

  branches: tuple[tuple[int, int], ...]
  is_causal: bool
  scale: float
  head_phase: str
  padding: str
  mixing_gradient: bool
  dropout_rate: float
  precision: Any
  kernel: str | None
  platform: str


class Inputs(NamedTuple):
  """Checked arrays of one call, or a device's part of them.

  documents: rows attend to rows whose ids are all equal: 64-bit ids are two.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B T K H"]
  value: Float[Array, "B T K H"]
  lengths: Int[Array, " B"] | None
  documents: tuple[Int[Array, "B T"], ...]
  seed: UInt32[Array, ""] | None

  def mask(self, settings: Settings) -> kernels.Mask:
    """Returns what the masks of all branches have, of rows not selected yet."""
    ids = tuple((x, x) for x in self.documents)
    rate = settings.dropout_rate
    return kernels.Mask(settings.is_causal, ids=ids, dropout_rate=rate)


def make_settings(
  head_width: int,
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  scale: ArrayLike | None = None,
  head_phase: str = "interleaved",
  padding: str = "mask",
  mixing_gradient: bool = True,
  dropout_rate: float = 0.0,
  implementation: str | None = None,
) -> Settings:
  """Returns the settings, or raises ValueError naming a legal value.

  The arguments are those of `dilated_attention`.
  """
  for name, value in (
    ("is_causal", is_causal),
    ("mixing_gradient", mixing_gradient),
  ):
    if not isinstance(value, (bool, np.bool_)):
      raise ValueError(f"{name} is {value!r}; use True or False, not traced")
  for name, value, legal in (
    ("head_phase", head_phase, pattern.HEAD_PHASES),
    ("padding", padding, PADDINGS),
  ):
    if value not in legal:
      raise ValueError(f"{name} is {value!r}; use one of {legal}")
  dropout_rate = _number("dropout_rate", dropout_rate)
  if not 0.0 <= dropout_rate < 1.0:
    raise ValueError(f"dropout_rate is {dropout_rate}; use one in [0, 1)")
  if scale is None:
    scale = 1.0 / math.sqrt(head_width)
  return Settings(
    branches=check_branches(segment_lengths, dilation_rates),
    is_causal=bool(is_causal),
    scale=_number("scale", scale),
    head_phase=head_phase,
    padding=padding,
    mixing_gradient=bool(mixing_gradient),
    dropout_rate=dropout_rate,
    precision=jax.config.jax_default_matmul_precision,
    kernel=implementation,
    platform=kernels.platform(),
  )


def _number(name: str, value: Any) -> float:
  """Returns a Python float, or raises ValueError if there is none."""
  try:
    number = float(value)
  except (TypeError, ValueError):  # a tracer's error is a TypeError
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"{name} is {value!r}; use a finite number, not traced")
  return number


def fold_scale(query, scale):
  """Returns query and the scale, folded into the query where it is traced.

  The scale of the settings is static; a traced one multiplies the query, in
  float32 or wider, and leaves 1.
  """
  if not isinstance(scale, jax.core.Tracer):
    return query, scale
  if scale.shape:
    raise ValueError(f"scale has shape {scale.shape}; give a scalar")
  dtype = attention.accumulator(query.dtype)
  scaled = query.astype(dtype) * scale.astype(dtype)
  return scaled.astype(query.dtype), 1.0


def check_branches(
  segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> tuple[tuple[int, int], ...]:
  """Returns ((w_1, r_1), ...), or raises ValueError saying what is wrong."""
  lengths = _positive_ints("segment_lengths", segment_lengths)
  rates = _positive_ints("dilation_rates", dilation_rates)
  if len(lengths) != len(rates):
    raise ValueError(
      f"dilation_rates has {len(rates)} entries, segment_lengths "
      f"{len(lengths)}; give one rate for each segment length"
    )
  for w, r in zip(lengths, rates, strict=True):
    if r > w:
      raise ValueError(
        f"dilation rate {r} is larger than its segment length {w}; "
        f"use a rate from 1 to {w}"
      )
  return tuple(zip(lengths, rates, strict=True))


def _positive_ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
  if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
    raise ValueError(
      f"{name} is {values!r}; give a sequence of ints such as (2048, 4096)"
    )
  values = tuple(values)
  if not values:
    raise ValueError(f"{name} is empty; give at least one int")
  checked = []
  for value in values:
    try:
      if isinstance(value, bool):
        raise TypeError
      checked.append(operator.index(value))
    except TypeError:
      raise ValueError(
        f"{name} holds {value!r}; every entry must be an int"
      ) from None
    if checked[-1] < 1:
      raise ValueError(f"{name} holds {value}; every entry must be at least 1")
  return tuple(checked)


def refuse_masks(**masks):
  """Raises ValueError for what only dense attention can honour."""
  for name, value in masks.items():
    if value is not None:
      raise ValueError(
        f"dilated attention cannot honour {name}, which is defined for every "
        f"pair of positions; leave {name}=None, and use is_causal, "
        "key_value_seq_lengths or segment_ids"
      )


def as_batch(tensors, lengths, segment_ids):
  """Returns the arrays of an example (T, N, H) as those of a batch of one.

  Args:
    tensors: query, key, value.
    lengths: an int, (1,) ints or None.
    segment_ids: (T,) or (1, T) ints or None.

  Returns:
    tensors, lengths, segment_ids, and whether that was one example.
  """
  if any(x.ndim != 3 for x in tensors):
    return tensors, lengths, segment_ids, False
  if lengths is not None and not np.ndim(lengths):
    lengths = lengths[None] if isinstance(lengths, jax.Array) else [lengths]
  if segment_ids is not None and np.ndim(segment_ids) == 1:
    is_array = isinstance(segment_ids, jax.Array)
    segment_ids = segment_ids[None] if is_array else [segment_ids]
  return [x[None] for x in tensors], lengths, segment_ids, True


def make_inputs(tensors, settings, lengths, segment_ids, dropout_key) -> Inputs:
  """Returns the arrays of a call, or raises ValueError saying what is wrong.

  Args:
    tensors: query, key, value, as `check_tensors` likes them.
    settings: the `Settings`.
    lengths: (B,) ints or None.
    segment_ids: (B, T) ints or None.
    dropout_key: a JAX random key or None.
  """
  batch, length = tensors[0].shape[:2]
  if segment_ids is not None and settings.padding == "zeros":
    raise ValueError(
      "padding='zeros' cannot be combined with segment_ids: zero keys that "
      "take softmax mass have no document; use padding='mask'"
    )
  if settings.dropout_rate and dropout_key is None:
    raise ValueError(
      f"dropout_rate is {settings.dropout_rate} but dropout_key is None; "
      "give a key such as jax.random.key(0)"
    )
  if lengths is not None:
    lengths = _ints("key_value_seq_lengths", lengths, (batch,))
    last = min(int(jnp.iinfo(lengths.dtype).max), 2**31 - 1)
    lengths = jnp.asarray(lengths.clip(0, last).astype(np.int32))
  documents = ()
  if segment_ids is not None:
    documents = _words(_ints("segment_ids", segment_ids, (batch, length)))
  seed = None
  if settings.dropout_rate:
    seed = jax.random.bits(dropout_key, dtype=jnp.uint32)
  inputs = Inputs(*tensors, lengths, documents, seed)
  mask = inputs.mask(settings)
  kernels.check(settings.kernel, settings.platform, *tensors[:2], mask)
  return inputs


def check_implementation(implementation, axis_name):
  """Raises ValueError unless there is such an implementation."""
  known = ("reference", *kernels.FILES)
  if implementation not in (None, *known):
    raise ValueError(
      f"implementation is {implementation!r}; use None or one of {known}"
    )
  if axis_name is not None and implementation == "reference":
    raise ValueError(
      "implementation='reference' cannot be combined with axis_name; use None"
    )


@contextlib.contextmanager
def forward_mode_explained(where: str = ""):
  """Says what to do where JAX refuses to differentiate in forward mode."""
  try:
    yield
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise TypeError(
      f"{error} Use implementation='reference' {where or 'here'} for "
      "forward-mode derivatives, or reverse mode (jax.grad, jax.vjp)."
    ) from error


def _ints(name, x, shape):
  """Returns an array of ints: NumPy's, which keeps 64 bits, or JAX's."""
  if not isinstance(x, jax.Array):
    x = np.asarray(x)
    if not x.size:
      x = x.astype(np.int32)
  if tuple(x.shape) != shape or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
      f"{name} is {x.dtype}{tuple(x.shape)}; it must be ints of shape {shape}"
    )
  return x


def _words(ids):
  """Returns ints of any type as int32 arrays that are equal where they are."""
  is_array = isinstance(ids, jax.Array)
  bounds = np.iinfo(np.int32)
  if ids.dtype.itemsize < 4 or not (
    is_array or (ids < bounds.min).any() or (ids > bounds.max).any()
  ):
    return (jnp.asarray(ids.astype(np.int32)),)
  if is_array:
    words = lax.bitcast_convert_type(ids, jnp.int32)
    if words.ndim == ids.ndim:
      words = words[..., None]
  else:
    words = np.ascontiguousarray(ids)[..., None].view(np.int32)
  return tuple(jnp.asarray(words[..., i]) for i in range(words.shape[-1]))


def check_tensors(query, key, value):
  """Raises ValueError unless the three fit one another."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.ndim != 4:
      raise ValueError(
        f"{name} has shape {x.shape}; it must be (B, T, heads, H)"
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has type {x.dtype}; it must be a float type")
    if x.dtype != query.dtype:
      raise ValueError(
        f"{name} has type {x.dtype}, query {query.dtype}; cast one of them"
      )
  if key.shape != value.shape:
    raise ValueError(
      f"key has shape {key.shape}, value {value.shape}; they must be equal"
    )
  batch, length, num_heads, width = query.shape
  if key.shape[:2] != (batch, length):
    raise ValueError(
      f"key has batch and length {key.shape[:2]}, query {(batch, length)}: "
      "dilated attention is self-attention, they must be equal"
    )
  if key.shape[3] != width or not width:
    raise ValueError(
      f"key has head width {key.shape[3]}, query {width}; they must be "
      "equal and at least 1"
    )
  kv_heads = key.shape[2]
  if not num_heads or not kv_heads or num_heads % kv_heads:
    raise ValueError(
      f"{num_heads} query heads cannot share {kv_heads} key heads; use a "
      "number of key heads that divides the query heads"
    )
