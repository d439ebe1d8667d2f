"""The parts of a block against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import config as config_lib
from longnet_jax.models import layers

_make = functools.partial(
  config_lib.LongNetConfig,
  vocab_size=5,
  num_layers=3,
  model_dim=128,
  num_heads=4,
  ffn_dim=256,
  segment_lengths=(8,),
  dilation_rates=(1,),
  dtype="float32",
)


def _random(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_linear_contracts_the_last_axes():
  x = jnp.asarray(_random(2, 3, 4, 5))
  linear = layers.linear((6, 7), axes=2)
  params = linear.init(jax.random.key(0), x)["params"]
  params["bias"] = jnp.asarray(_random(6, 7))
  y = linear.apply({"params": params}, x)
  kernel, bias = map(np.asarray, (params["kernel"], params["bias"]))
  expected = np.einsum("btnh,nhfg->btfg", np.asarray(x), kernel) + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (4, 8)])
def test_layernorm_normalizes_its_axes_together(shape):
  x = 3 + 2 * _random(2, 5, 4, 8)
  norm = layers.LayerNorm(shape, 1e-5)
  scale, bias = _random(*shape), _random(*shape)[::-1]
  y = norm.apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
  axes = tuple(range(-len(shape), 0))
  exact = x.astype(np.float64)
  exact -= exact.mean(axes, keepdims=True)
  exact /= np.sqrt((exact**2).mean(axes, keepdims=True) + 1e-5)
  np.testing.assert_allclose(y, exact * scale + bias, atol=1e-5)


def test_layernorm_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(300 + _random(1, 4, 256), jnp.bfloat16)
  norm = layers.LayerNorm((256,), 1e-5)
  params = norm.init(jax.random.key(0), x)
  y = norm.apply(params, x)
  exact = norm.apply(params, x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_feed_forward_uses_the_exact_gelu_and_the_inner_norm():
  config = _make(model_dim=8, ffn_dim=16)
  x = _random(1, 3, 8)
  ffn = layers.FeedForward(config)
  params = ffn.init(jax.random.key(0), jnp.asarray(x))["params"]
  y = ffn.apply({"params": params}, jnp.asarray(x))
  hidden = x @ np.asarray(params["fc1"]["kernel"])
  erf = np.vectorize(math.erf)
  hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
  hidden -= hidden.mean(-1, keepdims=True)
  hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
  expected = hidden @ np.asarray(params["fc2"]["kernel"])
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
  "changes, gain, alpha",
  [
    ({}, math.sqrt(math.log(6)), 1.0),
    ({"sub_layernorm": False}, 1.0, 1.0),
    (
      {"sub_layernorm": False, "deepnorm": True},
      24**-0.25,
      6**0.25,
    ),
  ],
)
def test_initial_gain_and_residual_scale(changes, gain, alpha):
  config = _make(**changes)
  x = jnp.zeros((1, 1, 128))
  params = layers.FeedForward(config).init(jax.random.key(0), x)["params"]
  xavier = math.sqrt(2 / (128 + 256))
  for name in ("fc1", "fc2"):
    deviation = float(params[name]["kernel"].std())
    assert deviation == pytest.approx(gain * xavier, rel=0.03)
  assert layers.residual_scale(config) == pytest.approx(alpha)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
  x = jnp.ones((4000, 2, 3))
  y = layers.DropPath().apply(
    {}, x, jnp.float32(0.25), rngs={"dropout": jax.random.key(0)}
  )
  y = np.asarray(y).reshape(4000, -1)
  assert (y == y[:, :1]).all()
  assert (y == 0).mean() == pytest.approx(0.25, abs=0.03)
  assert y.mean() == pytest.approx(1, abs=0.04)
