"""What every block is built of: linear maps, LayerNorm, feed-forward, drops."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longnet_jax.models import config as config_lib
from longnet_jax.ops import chunks


def linear(
  outputs: tuple[int, ...],
  *,
  axes: int = 1,
  gain: float = 1.0,
  name: str | None = None,
) -> nn.DenseGeneral:
  """Returns y = x W + b, which puts `outputs` for the last `axes` axes of x.

  Heads keep their own axis of the kernel. It is float32, starts as Xavier
  normal times `gain` and is cast to the dtype of x.
  """
  return nn.DenseGeneral(
    outputs,
    axis=tuple(range(-axes, 0)),
    kernel_init=nn.initializers.variance_scaling(gain**2, "fan_avg", "normal"),
    promote_dtype=_cast_parameters,
    name=name,
  )


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32.

  flax.linen.LayerNorm multiplies by the scale in another order, which changes
  the last bit.

  Attributes:
    shape: trailing axes of x that are normalized together.
    epsilon: added to the variance.
  """

  shape: tuple[int, ...]
  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the normalized x, of its shape and dtype."""
    scale = self.param(
      "scale", nn.initializers.ones_init(), self.shape, jnp.float32
    )
    bias = self.param(
      "bias", nn.initializers.zeros_init(), self.shape, jnp.float32
    )
    axes = tuple(range(-len(self.shape), 0))
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + self.epsilon)
    return (y * _align(scale, y) + _align(bias, y)).astype(x.dtype)


class FeedForward(nn.Module):
  """fc2(LN(gelu(fc1(x)))), the LayerNorm only with sub_layernorm."""

  config: config_lib.LongNetConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the update of the residual stream."""
    if not 0 < self.config.ffn_chunk < x.shape[1]:
      return self._rows(x)
    cut, join = chunks.make_cut(x.shape[1], self.config.ffn_chunk)
    # Backward computes a chunk again, and nothing else of it is kept.
    scan = nn.scan(
      nn.remat(lambda self, _, x: (None, self._rows(x)), prevent_cse=False),
      variable_broadcast="params",
      split_rngs={"params": False},
    )
    return join(scan(self, None, cut(x))[1])

  def _rows(self, x):
    config = self.config
    gain = initial_gain(config)
    width, hidden = (config.model_dim,), (config.ffn_dim,)
    x = linear(hidden, gain=gain, name="fc1")(x)
    # The exact GELU, in float32: its tanh approximation differs by 1e-3.
    x = nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
    if config.sub_layernorm:
      x = LayerNorm(hidden, config.layernorm_epsilon, name="norm")(x)
    return linear(width, gain=gain, name="fc2")(x)


class DropPath(nn.Module):
  """Drops a whole example's update with probability `rate`, which may vary."""

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], rate: Float[Array, ""]) -> Array:
    """Returns x, or zeros, scaled so that the expectation is x."""
    keep = jax.random.bernoulli(
      self.make_rng("dropout"), 1 - rate, (x.shape[0], 1, 1)
    )
    return x * (keep.astype(jnp.float32) / (1 - rate)).astype(x.dtype)


def initial_gain(config: config_lib.LongNetConfig) -> float:
  """Returns the gain of the initial v, out, fc1 and fc2.

  sqrt(log 2L) with sub-LayerNorms (Wang et al., arXiv 2210.06423), (8L)^(-1/4)
  with DeepNorm (Wang et al., arXiv 2203.00555), otherwise 1.
  """
  if config.sub_layernorm:
    return math.sqrt(math.log(2 * config.num_layers))
  if config.deepnorm:
    return (8 * config.num_layers) ** -0.25
  return 1.0


def residual_scale(config: config_lib.LongNetConfig) -> float:
  """Returns alpha of x alpha + f(x): (2L)^(1/4) with DeepNorm, otherwise 1."""
  return (2 * config.num_layers) ** 0.25 if config.deepnorm else 1.0


def _cast_parameters(x, kernel, bias, *, dtype):
  """Gives the parameters the dtype of x, whichever the module names."""
  del dtype
  return x, kernel.astype(x.dtype), bias.astype(x.dtype)


def _align(parameter, x):
  """Gives a parameter of the trailing axes of x the rank of x."""
  return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)
