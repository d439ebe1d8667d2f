"""What every block is built of: linear maps, LayerNorm, feed-forward, drops."""

import functools
import math
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from longnet_jax.models import config as config_lib
from longnet_jax.models import gelu
from longnet_jax.ops import chunks, kernels, tpu

# Names what a LayerNorm found, for policies that keep it.
NORMALIZED = "longnet_normalized"


class Normalized(NamedTuple):
  """scale * rows + bias, where a `Linear` takes over the scale and the bias.

  W (scale * rows + bias) + b = (W scale) rows + (W bias + b): neither takes a
  pass over the rows, nor does its gradient, which is a sum over them.
  """

  rows: Array
  scale: ArrayLike
  bias: ArrayLike


class Linear(nn.Module):
  """y = x W + b, which puts `outputs` for the last `axes` axes of x.

  Heads keep their own axis of the kernel. It is float32, starts as Xavier
  normal times `gain` and is cast to the dtype of x.
  """

  outputs: tuple[int, ...]
  axes: int = 1
  gain: float = 1.0

  def __call__(self, x: Array | Normalized) -> Array:
    """Returns y, of the dtype of x."""
    rows, *affine = x if isinstance(x, Normalized) else (x,)
    return multiply(rows, *self.weights(rows.shape[-self.axes :], *affine))

  @nn.compact
  def weights(
    self,
    inputs: tuple[int, ...],
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
  ) -> tuple[ArrayLike, ArrayLike]:
    """Returns W and b for `multiply`, of scale * x + shift where these are."""
    kernel = self.param("kernel", self._draw, inputs + self.outputs)
    zeros = nn.initializers.zeros_init()
    bias = self.param("bias", zeros, self.outputs, jnp.float32)
    if scale is not None:
      # Not in place: parameters may be those of a caller's NumPy arrays.
      moved = jnp.tensordot(shift, kernel, self.axes, precision="highest")
      bias = bias + moved
      kernel = kernel * scale.reshape(inputs + (1,) * len(self.outputs))
    return kernel, bias

  def _draw(self, key, shape):
    sides = math.prod(shape[: self.axes]), math.prod(shape[self.axes :])
    xavier = nn.initializers.variance_scaling(self.gain**2, "fan_avg", "normal")
    return xavier(key, sides, jnp.float32).reshape(shape)


def multiply(rows: Array, kernel: ArrayLike, bias: ArrayLike) -> Array:
  """Returns rows W + b, of the dtype of the rows."""
  axes = kernel.ndim - bias.ndim
  if kernels.platform() == "tpu" and rows.dtype == jnp.bfloat16:
    return _add_bias(_product(rows, kernel, axes), bias)
  y = jnp.tensordot(rows, kernel.astype(rows.dtype), axes)
  return y + _align(bias.astype(rows.dtype), y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(rows, kernel, axes):
  """Returns rows W, bfloat16 but for the gradient of W.

  Where devices add up what their rows say of W, they do so in float32.
  """
  # Or XLA casts each number of W for each tile of rows.
  kernel = tpu.written_once(kernel.astype(rows.dtype))
  return jnp.tensordot(rows, kernel, axes)


@_product.defjvp
def _product_jvp(axes, primals, tangents):
  rows, kernel = primals
  drows, dkernel = tangents
  y = _product(rows, kernel, axes)
  dy = _product(drows, kernel, axes)
  # A TPU multiplies these as the bfloat16 that they are, into float32.
  rows, dkernel = rows.astype(jnp.float32), dkernel.astype(jnp.float32)
  dy += jnp.tensordot(rows, dkernel, axes).astype(y.dtype)
  return y, dy


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _standardized_product(x, kernel, epsilon):
  """Returns y = rows W of what `_standardize` makes of x, as `_product` does.

  The gradient of a LayerNorm has two sums over each of its rows. Written in
  terms of y, with dy what comes back to y, they are

    sum(W dy) = sum(W) dy,  rows (W dy) = y dy:

  shorter ones, and found before the product W dy, which then ends with all that
  is to be done to a row.
  """
  rows, _ = _standardize(x, (-1,), epsilon)
  return _product(rows, kernel, 1)


@_standardized_product.defjvp
def _standardized_product_jvp(epsilon, primals, tangents):
  """Returns y and dy, of which dW has the part rows dW, and dx

  ((dx - mean(dx)) W - mean(rows dx) y) / deviation.
  """
  (x, kernel), (dx, dkernel) = primals, tangents
  rows, inverse = _standardize(x, (-1,), epsilon)
  y = _kept(_product(rows, kernel, 1))
  wide, dx = rows.astype(jnp.float32), dx.astype(jnp.float32)
  along = inverse * (wide * dx).mean(-1, keepdims=True)
  mean = inverse * dx.mean(-1, keepdims=True)
  # Of the numbers that the product multiplies by.
  column_sums = kernel.astype(x.dtype).astype(jnp.float32).sum(0)
  dy = _product((inverse * dx).astype(x.dtype), kernel, 1).astype(jnp.float32)
  dy -= mean * _align(column_sums, y) + along * y.astype(jnp.float32)
  dy += jnp.tensordot(wide, dkernel.astype(jnp.float32), 1)
  return y, dy.astype(y.dtype)


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

  def setup(self):
    """Declares scale and bias."""
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    self.scale = self.param("scale", ones, self.shape, jnp.float32)
    self.bias = self.param("bias", zeros, self.shape, jnp.float32)

  def __call__(self, x: Array) -> Array:
    """Returns the normalized x, of its shape and dtype."""
    return _normalize(x, self.scale, self.bias, self.epsilon)

  def before_linear(self, x: Array, keep: bool = True) -> Array | Normalized:
    """Returns the normalized x for a `Linear`, which is faster in bfloat16.

    With `keep` remat="dots" keeps the result in the place of x; without it x is
    kept, and the result made again.
    """
    return _before_linear(x, self.scale, self.bias, self.epsilon, keep)


def _folds(dtype):
  """Whether linear maps take over scale and bias, which float32 would show."""
  return dtype == jnp.bfloat16


def _before_linear(x, scale, bias, epsilon, keep):
  if not _folds(x.dtype):
    return _normalize(x, scale, bias, epsilon)
  axes = tuple(range(-scale.ndim, 0))
  if keep:
    rows = _standardize_stream(x, axes, epsilon)
  else:
    rows, _ = _standardize(x, axes, epsilon)
  return Normalized(rows, scale, bias)


def _normalize(x, scale, bias, epsilon):
  axes = tuple(range(-scale.ndim, 0))
  exact = x.astype(jnp.float32)
  centred = exact - exact.mean(axes, keepdims=True)
  variance = jnp.square(centred).mean(axes, keepdims=True)
  y = centred * jax.lax.rsqrt(variance + epsilon)
  return (y * _align(scale, y) + _align(bias, y)).astype(x.dtype)


def _standardize(x, axes, epsilon):
  """Returns (x - mean) / sqrt(variance + epsilon), bfloat16, and 1 / sqrt(..).

  The sums are of one pass, variance = E x^2 - (E x)^2. What that loses in
  float32 where the mean is large, bfloat16 has lost before: the numbers of such
  a row are multiples of 2^-8 of it.
  """
  exact = x.astype(jnp.float32)
  mean = _kept(exact.mean(axes, keepdims=True))
  square = _kept(jnp.square(exact).mean(axes, keepdims=True))
  variance = jnp.maximum(square - jnp.square(mean), 0)
  inverse = jax.lax.rsqrt(variance + epsilon)
  return ((exact - mean) * inverse).astype(x.dtype), inverse


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _standardize_stream(x, axes, epsilon):
  """Returns `_standardize` of the residual stream.

  Its gradient is written in terms of the result, which the gradient of a linear
  map needs anyway: x and the sum that it came from need not be there again.
  """
  return _standardize(x, axes, epsilon)[0]


@_standardize_stream.defjvp
def _standardize_stream_jvp(axes, epsilon, primals, tangents):
  """Returns y and dy = (dx - mean(dx) - y mean(y dx)) / deviation."""
  y, inverse = _standardize(*primals, axes, epsilon)
  y = _kept(y)
  wide, dx = y.astype(jnp.float32), tangents[0].astype(jnp.float32)
  along = wide * (wide * dx).mean(axes, keepdims=True)
  dy = (dx - dx.mean(axes, keepdims=True) - along) * inverse
  return y, dy.astype(y.dtype)


def _kept(x):
  """Names what backward would need a pass over the rows to make again."""
  return ad_checkpoint.checkpoint_name(x, NORMALIZED)


class FeedForward(nn.Module):
  """fc2(LN(gelu(fc1(x)))), the LayerNorm only with sub_layernorm."""

  config: config_lib.LongNetConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"] | Normalized
  ) -> Float[Array, "B T D"]:
    """Returns the update of the residual stream."""
    rows, *affine = x if isinstance(x, Normalized) else (x,)
    length, chunk = rows.shape[1], self.config.ffn_chunk
    in_chunks = 0 < chunk < length
    # Whether the update is there when its gradient is made.
    is_kept = self.config.remat in ("none", "dots") and not in_chunks
    update = self._make_update(rows.dtype, affine, is_kept)
    if not in_chunks:
      return update(rows)
    cut, join = chunks.make_cut(length, chunk)
    # Backward computes a chunk again, and nothing else of it is kept.
    again = jax.checkpoint(update, prevent_cse=False)
    return join(jax.lax.map(again, cut(rows)))

  def _make_update(self, dtype, affine, is_kept):
    """Returns rows -> their update, with weights that are made once."""
    config, epsilon = self.config, self.config.layernorm_epsilon
    gain = initial_gain(config)
    width, hidden = (config.model_dim,), (config.ffn_dim,)
    inner = ()
    if config.sub_layernorm:
      norm = LayerNorm(hidden, epsilon, name="norm")
      inner = norm.scale, norm.bias
    folded = inner if _folds(dtype) else ()
    fc1 = Linear(hidden, gain=gain, name="fc1").weights(width, *affine)
    fc2 = Linear(width, gain=gain, name="fc2").weights(hidden, *folded)

    def update(rows):
      x = gelu.gelu(multiply(rows, *fc1))
      if folded and is_kept and kernels.platform() == "tpu":
        return _add_bias(_standardized_product(x, fc2[0], epsilon), fc2[1])
      if inner:
        x = _before_linear(x, *inner, epsilon, keep=False)
      return multiply(x.rows if folded else x, *fc2)

    return update


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


def _add_bias(y, bias):
  """Returns y + b, added in the type of b, whose gradient is summed in it."""
  return (y.astype(bias.dtype) + _align(bias, y)).astype(y.dtype)


def _align(parameter, x):
  """Gives a parameter of the trailing axes of x the rank of x."""
  return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)
