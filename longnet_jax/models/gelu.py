"""The exact GELU, x Phi(x), whose tanh approximation is off by 1e-3."""

import math

from flax import linen as nn
import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

# 1 - erf(z) = polynomial(t) exp(-z^2), t = 1 / (1 + _P z), to 1.5e-7 where
# z >= 0: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
_P = 0.3275911
_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027)
_LAST = 1.061405429


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns x Phi(x), computed in float32 for the dtype of x.

  In bfloat16 the normal distribution is a polynomial times exp(-x^2 / 2), which
  is off by less than the rounding and gives the slope as well.
  """
  if x.dtype == jnp.bfloat16:
    return _rounded(x)
  return nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@jax.custom_jvp
def _rounded(x):
  return _with_slope(x)[0]


@_rounded.defjvp
def _differentiate(primals, tangents):
  y, slope = _with_slope(*primals)
  return y, slope * tangents[0]


def _with_slope(x):
  """Returns x Phi(x) and its slope, Phi(x) + x phi(x)."""
  wide = x.astype(jnp.float32)
  bell = jnp.exp(-0.5 * jnp.square(wide))
  t = 1 / (1 + (_P * math.sqrt(0.5)) * jnp.abs(wide))
  polynomial = _LAST
  for coefficient in reversed(_COEFFICIENTS):
    polynomial = polynomial * t + coefficient
  tail = 0.5 * polynomial * t * bell
  below = jnp.where(wide < 0, tail, 1 - tail)
  slope = below + wide * bell * (1 / math.sqrt(2 * math.pi))
  return (wide * below).astype(x.dtype), slope.astype(x.dtype)
