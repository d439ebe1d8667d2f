import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longnet_jax.ops import kernels
from longnet_jax.training import loss


@pytest.fixture(scope="module")
def inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  features = jax.random.normal(keys[0], (2, 11, 6))
  matrix = jax.random.normal(keys[1], (6, 9))
  targets = jax.random.randint(keys[2], (2, 11), 0, 9)
  weights = (jax.random.uniform(keys[3], (2, 11)) > 0.3).astype(jnp.float32)
  return features, matrix, targets, weights


def _whole(features, matrix, targets, weights):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    features @ matrix, targets
  )
  return jnp.sum(losses * weights)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
def test_chunks_change_neither_values_nor_gradients(inputs, chunk):
  argnums = (0, 1, 3)
  expected, expected_grads = jax.value_and_grad(
    lambda *x: 0.5 * _whole(*x), argnums=argnums
  )(*inputs)

  def chunked(*x):
    total, weight = loss.cross_entropy(*x, chunk=chunk)
    return 0.5 * total, weight

  (total, weight), grads = jax.value_and_grad(
    chunked, argnums=argnums, has_aux=True
  )(*inputs)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert weight == inputs[3].sum()
  for got, want in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_token_losses_keep_their_places(inputs):
  features, matrix, targets, _ = inputs
  expected = optax.softmax_cross_entropy_with_integer_labels(
    features @ matrix, targets
  )
  got = loss.token_losses(features, matrix, targets, chunk=3)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_all_logits_are_never_in_memory():
  length, vocabulary = 4096, 512
  abstract = (
    jax.ShapeDtypeStruct((1, length, 8), jnp.float32),
    jax.ShapeDtypeStruct((8, vocabulary), jnp.float32),
    jax.ShapeDtypeStruct((1, length), jnp.int32),
    jax.ShapeDtypeStruct((1, length), jnp.float32),
  )
  step = jax.grad(
    lambda *x: loss.cross_entropy(*x, chunk=64)[0], argnums=(0, 1)
  )
  memory = jax.jit(step).lower(*abstract).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * length * vocabulary / 4


def test_half_precision_features_are_summed_in_float32(inputs):
  features, matrix, targets, weights = inputs
  total, weight = loss.cross_entropy(
    features.astype(jnp.bfloat16), matrix, targets, weights, chunk=4
  )
  assert total.dtype == weight.dtype == jnp.float32
  expected = _whole(features, matrix, targets, weights)
  np.testing.assert_allclose(total, expected, rtol=2e-2)


def _on_tpu_and_not(features, matrix, targets, weights):
  """Sum and gradients of bfloat16 features, float32."""

  def total(features, matrix):
    return loss.cross_entropy(features, matrix, targets, weights, chunk=4)[0]

  run = jax.value_and_grad(total, argnums=(0, 1))
  features = features.astype(jnp.bfloat16)
  others = run(features, matrix)
  with kernels.compiling_for("tpu"):
    found = run(features, matrix)
  for a, b in zip(*map(jax.tree.leaves, (found, others)), strict=True):
    assert a.dtype == b.dtype
    yield np.asarray(a, np.float32), np.asarray(b, np.float32)


@pytest.mark.parametrize("scale", [1, 4])
def test_on_tpu_a_softmax_is_measured_from_its_target(inputs, scale):
  features, *others = inputs
  # With the larger logits some targets have a part of 1, some next to none.
  (total, wanted), *gradients = _on_tpu_and_not(scale * features, *others)
  np.testing.assert_allclose(total, wanted, rtol=1e-4)
  for a, b in gradients:
    # The exponentials and their products are rounded to bfloat16.
    np.testing.assert_allclose(a, b, atol=2**-6 * np.abs(b).max())


@pytest.mark.parametrize("loss_of_one", [137, 143, 148, 400])
def test_a_target_far_below_another_logit_is_right_on_tpu(inputs, loss_of_one):
  features, matrix, targets, weights = inputs
  logits = jnp.einsum("btd,dv->btv", features, matrix)
  targets = targets.at[0, 0].set(logits[0, 0].argmin())
  weights = weights.at[0, 0].set(1)
  features = features.at[0, 0].multiply(loss_of_one / jnp.ptp(logits[0, 0]))
  near = 2**-6 if loss_of_one < 140 else 0
  for found, wanted in _on_tpu_and_not(features, matrix, targets, weights):
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(found, wanted, atol=near * np.abs(wanted).max())


def test_a_token_that_is_no_number_spoils_no_other_on_tpu(inputs):
  features, matrix, targets, weights = inputs
  features = features.at[1, 5].set(jnp.nan)
  weights = weights.at[1, 5].set(1)
  (total, _), (slopes, wanted), _ = _on_tpu_and_not(
    features, matrix, targets, weights
  )
  assert np.isnan(total) and np.isnan(slopes[1, 5]).all()
  np.testing.assert_array_equal(slopes, wanted)


def test_second_derivatives_on_tpu_are_those_of_others(inputs):
  features, matrix, targets, weights = inputs
  features = features.astype(jnp.bfloat16)

  def slope(features):
    total = lambda x: loss.cross_entropy(x, matrix, targets, weights, chunk=4)
    return jax.grad(lambda x: total(x)[0])(features)

  others = jax.jvp(slope, (features,), (features,))[1]
  with kernels.compiling_for("tpu"):
    found = jax.jvp(slope, (features,), (features,))[1]
  found, wanted = (np.asarray(x, np.float32) for x in (found, others))
  np.testing.assert_allclose(found, wanted, atol=2**-6 * np.abs(wanted).max())
