"""The static arguments of dilated attention, and the refusal of bad ones."""

from collections.abc import Sequence
import math
import operator
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax import pattern
from longnet_jax.ops import attention

PADDINGS = ("mask", "zeros")


class Settings(NamedTuple):
  """Checked static arguments of `dilated_attention`, hashable for jit.

  `precision` is that of the caller's `jax.default_matmul_precision`, which the
  backward pass, traced later, would not know of.
  """

  branches: tuple[tuple[int, int], ...]
  is_causal: bool
  scale: float
  head_phase: str
  padding: str
  mixing_gradient: bool
  dropout_rate: float
  precision: str | None


def make_settings(
  head_width: int,
  *,
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool,
  scale: float | None,
  head_phase: str,
  padding: str,
  mixing_gradient: bool,
  dropout_rate: float,
) -> Settings:
  """Returns the settings, or raises ValueError naming a legal value."""
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
  )


def _number(name: str, value: float) -> float:
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


def check_shapes(query, key, value):
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


def check_masks(query, settings, lengths, segment_ids, dropout_key):
  """Returns lengths as int32 and segment_ids as int32 or a wider type.

  Narrower ints could not hold the ids of what is hidden. Raises ValueError
  unless masks and dropout fit the query and settings.
  """
  batch, length = query.shape[:2]
  lengths, segment_ids = (
    None if x is None else jnp.asarray(x) for x in (lengths, segment_ids)
  )
  for name, x, shape in (
    ("key_value_seq_lengths", lengths, (batch,)),
    ("segment_ids", segment_ids, (batch, length)),
  ):
    if x is None:
      continue
    if tuple(x.shape) != shape or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"{name} is {x.dtype}{tuple(x.shape)}; it must be ints of shape {shape}"
      )
    if settings.padding == "zeros":
      raise ValueError(
        f"padding='zeros' cannot be combined with {name}: zero keys that "
        "take softmax mass have no document or length; use padding='mask'"
      )
  if settings.dropout_rate and dropout_key is None:
    raise ValueError(
      f"dropout_rate is {settings.dropout_rate} but dropout_key is None; "
      "give a key such as jax.random.key(0)"
    )
  if lengths is not None:
    last = min(int(jnp.iinfo(lengths.dtype).max), 2**31 - 1)
    lengths = jnp.clip(lengths, 0, last).astype(jnp.int32)
  if segment_ids is not None and segment_ids.dtype.itemsize < 8:
    segment_ids = segment_ids.astype(jnp.int32)
  return lengths, segment_ids
