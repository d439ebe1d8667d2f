"""Rotary tables against float64, and the properties that decoding needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import kernels, rotary

_HEAD_DIM = 64


def _exact_angles(positions, base):
  frequencies = base ** (-np.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
  return np.asarray(positions, np.float64)[..., None] * frequencies


@pytest.mark.parametrize("base", [10_000.0, 1e9])
@pytest.mark.parametrize(
  "start", [-(2**31), -32, 0, 2**16 - 8, 2**24 + 1, 2**30, 2**31 - 64]
)
def test_rope_is_accurate_at_every_position(start, base):
  positions = start + np.arange(64)
  tables = rotary.rope(
    jnp.asarray(positions[None], jnp.int32), head_dim=_HEAD_DIM, base=base
  )
  angles = _exact_angles(positions[None], base)
  np.testing.assert_allclose(tables.cos, np.cos(angles), atol=2e-6)
  np.testing.assert_allclose(tables.sin, np.sin(angles), atol=2e-6)
  assert tables.cos.dtype == jnp.float32


def test_rope_is_accurate_at_random_positions():
  positions = np.random.default_rng(0).integers(0, 2**30, (1, 4096))
  tables = rotary.rope(jnp.asarray(positions, jnp.int32), head_dim=_HEAD_DIM)
  angles = _exact_angles(positions, 10_000.0)
  np.testing.assert_allclose(tables.cos, np.cos(angles), atol=2e-6)


def _heads(shape):
  rng = np.random.default_rng(1)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)]


def _scores(tables, query, key):
  query = rotary.rotate_query(query, tables)
  key = rotary.rotate_key(key, tables)
  return np.asarray(jnp.einsum("btnh,bsnh->bnts", query, key))


def test_rope_scores_depend_on_the_distance_alone():
  query, key = _heads((1, 8, 1, _HEAD_DIM))
  positions = jnp.arange(8)[None]
  near = _scores(rotary.rope(positions, head_dim=_HEAD_DIM), query, key)
  far = rotary.rope(positions + 2**30, head_dim=_HEAD_DIM)
  np.testing.assert_allclose(_scores(far, query, key), near, atol=2e-5)


@pytest.mark.parametrize("shift, centre", [(0, 4096), (20_000, 16_384)])
def test_xpos_scores_depend_on_the_distance_alone(shift, centre):
  query, key = _heads((1, 8, 1, _HEAD_DIM))
  positions = jnp.arange(8)[None] * 100
  near = _scores(rotary.xpos(positions, head_dim=_HEAD_DIM), query, key)
  tables = rotary.xpos(positions + shift, head_dim=_HEAD_DIM, centre=centre)
  far = _scores(tables, query, key)
  np.testing.assert_allclose(far, near, rtol=1e-4, atol=1e-4)


def test_xpos_is_the_published_formula():
  query, key = _heads((1, 6, 1, _HEAD_DIM))
  positions = np.array([[0, 1, 5, 300, 301, 999]])
  tables = rotary.xpos(jnp.asarray(positions), head_dim=_HEAD_DIM)
  pairs = np.arange(0, _HEAD_DIM, 2)
  base = (pairs + 0.4 * _HEAD_DIM) / (1.4 * _HEAD_DIM)
  angles = _exact_angles(positions[0], 10_000.0)
  turns = np.exp(1j * angles)
  scale = base ** (positions[0][:, None] / 512)

  def as_complex(x):
    x = np.asarray(x, np.float64)[0, :, 0]
    return x[:, 0::2] + 1j * x[:, 1::2]

  turned_query = as_complex(query) * turns * scale
  turned_key = as_complex(key) * turns / scale
  expected = np.real(turned_query @ np.conj(turned_key).T)
  actual = _scores(tables, query, key)[0, 0]
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_xpos_is_finite_within_its_radius_and_not_far_beyond():
  radius = rotary.xpos_radius()
  positions = jnp.array([[0, 2 * radius, 3 * radius]])
  tables = rotary.xpos(positions, head_dim=_HEAD_DIM, centre=radius)
  inside = np.asarray(tables.scale[0, :2])
  assert 2.0**99 < inside.max() <= 2.0**100 * 1.001
  assert 2.0**-100 * 0.999 <= inside.min() < 2.0**-99
  assert np.isfinite(1 / inside).all()
  assert tables.scale[0, 2].min() == 0


def test_rotation_keeps_the_dtype_and_computes_in_float32():
  query, _ = _heads((1, 4, 2, _HEAD_DIM))
  tables = rotary.rope(jnp.arange(4)[None] + 2**20, head_dim=_HEAD_DIM)
  half = query.astype(jnp.bfloat16)
  turned = rotary.rotate_query(half, tables)
  exact = rotary.rotate_query(half.astype(jnp.float32), tables)
  assert turned.dtype == jnp.bfloat16
  np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_tpu_pairs_are_turned_by_a_product(dtype):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, _HEAD_DIM), dtype)
  positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
  for make in (rotary.rope, rotary.xpos):
    tables = make(positions, head_dim=_HEAD_DIM)
    both = make(positions, head_dim=_HEAD_DIM, both=True)
    assert both.sin.shape == (2, 5, _HEAD_DIM)
    turn = lambda table: jax.vjp(lambda x: rotary.rotate_key(x, table), x)
    wanted, pull = turn(tables)
    (wanted_gradient,) = pull(x)
    with kernels.compiling_for("tpu"):
      found, pull = turn(tables)
      np.testing.assert_array_equal(rotary.rotate_key(x, both), found)
      (gradient,) = pull(x)
    for a, b in ((found, wanted), (gradient, wanted_gradient)):
      assert a.dtype == b.dtype
      a, b = (y.astype(jnp.float32) for y in (a, b))
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_positions_may_be_traced_and_differ_within_a_batch():
  positions = jnp.array([[0, 1, 2], [7, 0, 1]])
  tables = jax.jit(lambda p: rotary.rope(p, head_dim=4))(positions)
  np.testing.assert_allclose(tables.sin[0, 1], tables.sin[1, 2])
  np.testing.assert_allclose(tables.sin[1, 0, 0], np.sin(7), rtol=1e-6)
