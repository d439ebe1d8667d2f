"""Rotary position encodings, RoPE and xPos, for explicit positions."""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32
import numpy as np

from longnet_jax.ops import kernels

_XPOS_SHIFT = 0.4
_XPOS_RANGE_LOG2 = 100


class Rotation(NamedTuple):
  """Tables that turn the pairs of a head, shape (B or 1, T, H / 2), float32.

  Of tables made with `both` it is (B or 1, T, H).

  Attributes:
    cos: cosine of the angle of each pair.
    sin: sine of the angle of each pair.
    scale: xPos factor of queries, whose inverse multiplies keys; None in RoPE.
  """

  cos: Float[Array, "B T P"]
  sin: Float[Array, "B T P"]
  scale: Float[Array, "B T P"] | None


def rope(
  positions: Int[Array, "B T"],
  *,
  head_dim: int,
  base: float = 10_000.0,
  both: bool = False,
) -> Rotation:
  """Returns the tables of RoPE: angle_i = position * base ** (-2 i / H).

  Accurate to 1e-6 of a radian at every position from -2^31 to 2^31 - 1. With
  `both` a number stands there for both of a pair, which on TPU saves each layer
  from putting it there. Source: Su et al., arXiv 2104.09864.
  """
  angles = _angles(positions, _pairs(head_dim, both), base)
  return Rotation(jnp.cos(angles), jnp.sin(angles), None)


def xpos(
  positions: Int[Array, "B T"],
  *,
  head_dim: int,
  base: float = 10_000.0,
  scale_base: float = 512.0,
  centre: int = 0,
  both: bool = False,
) -> Rotation:
  """Returns the tables of xPos: RoPE times a scale that decays with distance.

  scale_i = ((2 i + 0.4 H) / (1.4 H)) ** ((position - centre) / scale_base)

  multiplies queries and divides keys, so scores depend on the distance alone
  and any `centre` gives the same ones; it must stay within `xpos_radius` of
  every position, or the scale leaves float32. `both` as in `rope`. Source: Sun
  et al., arXiv 2212.10554.
  """
  pairs = _pairs(head_dim, both)
  angles = _angles(positions, pairs, base)
  log_scale = np.log((pairs + _XPOS_SHIFT) / (1 + _XPOS_SHIFT)) / scale_base
  offset = (positions - centre).astype(jnp.float32)[..., None]
  exponent = offset * jnp.asarray(log_scale, jnp.float32)[None, None]
  return Rotation(jnp.cos(angles), jnp.sin(angles), jnp.exp(exponent))


def xpos_radius(scale_base: float = 512.0) -> int:
  """Returns how far from its centre xPos may be used in float32.

  The steepest scale is 3.5 ** (distance / scale_base). It may reach 2^100,
  which leaves 2^27 of float32 for the entries themselves and for the sums over
  them in the backward pass.
  """
  steepest = math.log2((1 + _XPOS_SHIFT) / _XPOS_SHIFT)
  return int(_XPOS_RANGE_LOG2 * scale_base / steepest)


def rotate_query(
  query: Float[Array, "B T N H"], rotation: Rotation
) -> Float[Array, "B T N H"]:
  """Turns (and in xPos scales) queries, in float32; the dtype is kept."""
  return _rotate(query, rotation, rotation.scale)


def rotate_key(
  key: Float[Array, "B T K H"], rotation: Rotation
) -> Float[Array, "B T K H"]:
  """Turns (and in xPos scales inversely) keys, in float32; dtype is kept."""
  scale = None if rotation.scale is None else 1 / rotation.scale
  return _rotate(key, rotation, scale)


def _rotate(x, rotation, scale):
  """Turns the interleaved pairs (x_0, x_1), (x_2, x_3), ... of each head."""
  cos, sin = rotation.cos, rotation.sin
  if scale is not None:
    cos, sin = cos * scale, sin * scale
  cos, sin = cos[:, :, None], sin[:, :, None]
  if kernels.platform() == "tpu":
    if cos.shape[-1] < x.shape[-1]:
      cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
    return _turn(x, cos, sin)
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _turn(x, cos, sin):
  """Turns pairs by tables that have each number for both of a pair.

  Backward turns them back: JAX would transpose the product in float32.
  """
  wide = x.astype(jnp.float32)
  return (wide * cos + _quarter_turn(x) * sin).astype(x.dtype)


_turn.defvjp(
  lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
  lambda tables, dx: (_turn(dx, tables[0], -tables[1]), None, None),
)


def _quarter_turn(x):
  """Returns (-x_1, x_0, -x_3, x_2, ...) of each head, float32.

  As a product, which is exact: an axis of two would take the lanes of a TPU,
  and all that follows would be laid out for it.
  """
  width = x.shape[-1]
  matrix = np.zeros((width, width), np.float32)
  even = np.arange(0, width, 2)
  matrix[even + 1, even], matrix[even, even + 1] = -1, 1
  return jnp.einsum(
    "btnh,hg->btng",
    x,
    jnp.asarray(matrix, x.dtype),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _pairs(head_dim, both):
  """Returns 2 i / H of each entry of a table."""
  pairs = np.arange(0, head_dim, 2) / head_dim
  return np.repeat(pairs, 2) if both else pairs


def _angles(positions, pairs, base):
  """Returns position * frequency modulo one turn, in [-pi, pi), float32.

  A float32 angle is off by tens of radians at 2^30 positions. The phase is
  therefore carried in units of 2^-32 turns, where wrapping is the modulus, with
  32 more bits of the frequency so that its rounding does not add up.
  """
  high, low = _fixed_point_frequencies(pairs, base)
  position = positions.astype(jnp.uint32)[..., None]
  phase = position * high + _multiply_high(position, low)
  # As an unsigned number a negative position is 2^32 too large, which counts
  # in the low words alone.
  phase -= jnp.where(positions[..., None] < 0, low, jnp.uint32(0))
  signed = lax.bitcast_convert_type(phase, jnp.int32)
  return signed.astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)


def _fixed_point_frequencies(pairs, base):
  """Returns turns per position as 64-bit fractions, high and low words."""
  turns = base**-pairs / (2 * math.pi)
  high, rest = np.divmod(turns * 2.0**32, 1.0)
  words = high.astype(np.uint32), (rest * 2.0**32).astype(np.uint32)
  return tuple(jnp.asarray(word)[None, None] for word in words)


def _multiply_high(
  a: UInt32[Array, "..."], b: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
  """Returns floor(a b / 2^32) less at most 2: the lowest carry is dropped."""
  half = jnp.uint32(16)
  mask = jnp.uint32(0xFFFF)
  a_high, a_low = a >> half, a & mask
  b_high, b_low = b >> half, b & mask
  cross = ((a_high * b_low) >> half) + ((a_low * b_high) >> half)
  return a_high * b_high + cross
