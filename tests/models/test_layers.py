"""The parts of a block against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import config as config_lib
from longnet_jax.models import gelu, layers
from longnet_jax.ops import kernels

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
  linear = layers.Linear((6, 7), axes=2)
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


def _normalized_product(x, scale, bias, kernel, added, dy):
  """LayerNorm and a linear map in float64, and all gradients."""
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  rows = centred / deviation
  y = (rows * scale + bias) @ kernel + added
  dnormalized = dy @ kernel.T
  drows = dnormalized * scale
  dx = drows - drows.mean(-1, keepdims=True)
  dx = (dx - rows * (drows * rows).mean(-1, keepdims=True)) / deviation
  return y, (
    dx,
    (dnormalized * rows).sum(0),
    dnormalized.sum(0),
    (rows * scale + bias).T @ dy,
    dy.sum(0),
  )


@pytest.mark.parametrize("mean", [0, 20])
@pytest.mark.parametrize(
  "dtype, platform",
  [("float32", "cpu"), ("bfloat16", "cpu"), ("bfloat16", "tpu")],
)
def test_a_linear_map_takes_over_scale_and_bias(dtype, platform, mean):
  random = np.random.default_rng(0)
  shapes = (64, 48), (48,), (48,), (48, 32), (32,), (64, 32)
  arrays = [random.normal(size=shape) for shape in shapes]
  arrays[0] = arrays[0] + mean
  x = jnp.asarray(arrays[0], dtype)
  dy = jnp.asarray(arrays[-1], dtype)
  arrays[0], arrays[-1] = (np.asarray(a, np.float64) for a in (x, dy))
  y, gradients = _normalized_product(*arrays)

  norm, linear = layers.LayerNorm((48,), 1e-5), layers.Linear((32,))

  def apply(x, scale, bias, kernel, added):
    params = {"params": {"scale": scale, "bias": bias}}
    normalized = norm.apply(params, x, method="before_linear")
    assert isinstance(normalized, layers.Normalized) == (dtype == "bfloat16")
    return linear.apply(
      {"params": {"kernel": kernel, "bias": added}}, normalized
    )

  parameters = [a.astype(np.float32) for a in arrays[1:-1]]
  before = [a.copy() for a in parameters]
  apply(x, *parameters)
  jax.tree.map(np.testing.assert_array_equal, parameters, before)
  with kernels.compiling_for(platform):
    found, pull = jax.vjp(apply, x, *map(jnp.asarray, parameters))
  assert found.dtype == x.dtype
  if platform == "tpu":  # where devices add up gradients
    dkernel, dbias = pull(dy)[-2:]
    for slope in (dkernel, dbias):
      rounded = slope.astype(jnp.bfloat16).astype(slope.dtype)
      assert (slope != rounded).any()
  near = 1e-5 if dtype == "float32" else 2**-6
  for a, b in zip((found, *pull(dy)), (y, *gradients), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=near * scale)


@pytest.mark.parametrize("keep", [True, False])
def test_a_normalized_stream_has_the_derivatives_of_its_formula(keep):
  x, direction = jnp.asarray(_random(2, 16, 48), jnp.bfloat16)
  norm = layers.LayerNorm((48,), 1e-5)
  params = norm.init(jax.random.key(0), x)

  def rows(x):
    return norm.apply(params, x, method="before_linear", keep=keep).rows

  y, along = jax.jvp(rows, (x,), (direction,))
  wide, g = (np.asarray(a, np.float64) for a in (x, direction))
  centred = wide - wide.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  exact = centred / deviation
  slope = g - g.mean(-1, keepdims=True)
  slope -= exact * (exact * g).mean(-1, keepdims=True)
  for found, wanted in ((y, exact), (along, slope / deviation)):
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, wanted, atol=2**-7 * np.abs(wanted).max())


def test_gelu_of_every_bfloat16_is_exact_but_for_rounding():
  x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  x = jnp.asarray(x[np.abs(x.astype(np.float32)) < 20])
  wide = np.asarray(x, np.float64)
  below = 0.5 * np.vectorize(math.erfc)(-wide / math.sqrt(2))
  slope = below + wide * np.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
  y, pull = jax.vjp(gelu.gelu, x)
  (dx,) = pull(jnp.ones_like(x))
  for found, exact in ((y, wide * below), (dx, slope)):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      # What float32 cannot tell from 1, times the largest x where it matters.
      np.asarray(found, np.float64),
      exact,
      rtol=2**-8,
      atol=1.5e-6,
    )


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
  "changes",
  [{}, {"remat": "full"}, {"ffn_chunk": 16}],
  ids=str,
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_feed_forward_layer_in_bfloat16_has_all_its_gradients(
  platform, changes
):
  config = _make(model_dim=32, ffn_dim=48, dtype="bfloat16", **changes)
  random = np.random.default_rng(0)
  x, dy = jnp.asarray(random.normal(size=(2, 1, 64, 32)), jnp.bfloat16)
  ffn = layers.FeedForward(config)
  params = ffn.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(
    lambda p: p + jnp.asarray(0.3 * random.normal(size=p.shape), p.dtype),
    params,
  )
  with kernels.compiling_for(platform):
    apply = lambda p, x: ffn.apply({"params": p}, x)
    program = str(jax.make_jaxpr(apply)(params, x))
    y, pull = jax.vjp(apply, params, x)
  # Where the update would have to be made again, its gradient does without.
  uses_update = platform == "tpu" and not changes
  assert ("_standardized_product" in program) == uses_update
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  rows, dout = (np.asarray(a[0], np.float64) for a in (x, dy))
  fc1, fc2, norm = wide["fc1"], wide["fc2"], wide["norm"]
  u = rows @ fc1["kernel"] + fc1["bias"]
  below = 0.5 * np.vectorize(math.erfc)(-u / math.sqrt(2))
  slope = below + u * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
  exact, (dhidden, dscale, dshift, dfc2, dbias) = _normalized_product(
    *(u * below, norm["scale"], norm["bias"], fc2["kernel"], fc2["bias"], dout)
  )
  du = dhidden * slope
  gradients = {
    "fc1": {"kernel": rows.T @ du, "bias": du.sum(0)},
    "fc2": {"kernel": dfc2, "bias": dbias},
    "norm": {"scale": dscale, "bias": dshift},
  }
  wanted = exact, (gradients, du @ fc1["kernel"].T)
  found = y[0], (lambda p, x: (p, x[0]))(*pull(dy))

  def compare(a, b):
    a = np.asarray(a, np.float64)
    np.testing.assert_allclose(a, b, atol=2**-6 * np.abs(b).max())

  jax.tree.map(compare, found, wanted)


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
