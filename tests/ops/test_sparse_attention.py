"""Sparse attention against an O(T^2) oracle in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import sparse_attention


def _mask(length, block, summary, is_causal):
  rows, columns = np.arange(length)[:, None], np.arange(length)[None]
  is_local = rows // block == columns // block
  is_summary = columns % block >= block - summary
  mask = is_local | is_summary
  return mask & (columns <= rows) if is_causal else mask


def _oracle(query, key, value, gradient, mask):
  """Returns the output and the gradients for one head, (T, H) each."""
  scale = query.shape[-1] ** -0.5
  scores = np.where(mask, scale * query @ key.T, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = weights @ value
  inner = (gradient * out).sum(-1, keepdims=True)
  score_gradient = weights * (gradient @ value.T - inner) * scale
  return (
    out,
    score_gradient @ key,
    score_gradient.T @ query,
    weights.T @ gradient,
  )


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


_CASES = [
  # length, block, summary, is_causal, query heads, key heads, documents
  (24, 8, 2, True, 2, 2, False),
  (21, 8, 3, True, 4, 2, True),
  (21, 8, 3, False, 4, 1, False),
  (21, 5, 1, False, 2, 2, True),
  (7, 16, 4, True, 1, 1, False),
  (9, 3, 0, True, 1, 1, False),
  (9, 3, 3, True, 1, 1, False),
  (1, 4, 1, False, 1, 1, False),
]


@pytest.mark.parametrize(
  "length, block, summary, is_causal, heads, kv_heads, documents", _CASES
)
def test_matches_the_oracle_in_values_and_gradients(
  length, block, summary, is_causal, heads, kv_heads, documents
):
  batch, width = 2, 4
  query = _random(0, batch, length, heads, width)
  key = _random(1, batch, length, kv_heads, width)
  value = _random(2, batch, length, kv_heads, width)
  gradient = _random(3, *query.shape)
  segments = np.cumsum(_random(4, batch, length) > 1, axis=1)
  op = functools.partial(
    sparse_attention.sparse_attention,
    block=block,
    summary=summary,
    is_causal=is_causal,
    segment_ids=jnp.asarray(segments) if documents else None,
  )
  arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value, gradient)]
  out, pullback = jax.vjp(jax.jit(op), *arrays[:3])
  results = [out, *pullback(arrays[3])]

  expected = [np.zeros(x.shape) for x in results]
  for b, head in np.ndindex(batch, heads):
    kv_head = head * kv_heads // heads
    mask = _mask(length, block, summary, is_causal)
    if documents:
      mask = mask & (segments[b][:, None] == segments[b][None])
    parts = _oracle(
      query[b, :, head],
      key[b, :, kv_head],
      value[b, :, kv_head],
      gradient[b, :, head],
      mask,
    )
    for index, part in enumerate(parts):
      expected[index][b, :, head if index < 2 else kv_head] += part
  for result, truth in zip(results, expected, strict=True):
    np.testing.assert_allclose(result, truth, atol=5e-6)


def test_rows_are_cut_into_chunks_without_a_trace(monkeypatch):
  query, key, value = (
    jnp.asarray(_random(i, 1, 22, 2, 4), jnp.float32) for i in range(3)
  )
  op = functools.partial(
    sparse_attention.sparse_attention, block=10, summary=2, is_causal=True
  )
  whole = op(query, key, value)
  monkeypatch.setattr(sparse_attention, "_ROWS", 4)
  np.testing.assert_allclose(op(query, key, value), whole, atol=5e-6)


def test_no_array_is_quadratic_in_the_length():
  length, block, summary = 4096, 64, 1
  shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

  def loss(query, key, value):
    return sparse_attention.sparse_attention(
      query, key, value, block=block, summary=summary, is_causal=True
    ).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
  temporary = compiled.compile().memory_analysis().temp_size_in_bytes
  assert temporary < length * (block + length // block) * 4


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
  length, rate = 64, 0.25
  query = jnp.zeros((4, length, 2, 4))
  value = jnp.ones((4, length, 2, 4))
  out = sparse_attention.sparse_attention(
    query,
    query,
    value,
    block=16,
    summary=4,
    dropout_rate=rate,
    dropout_key=jax.random.key(0),
  )
  # Each row sees 16 + 3 * 4 equal weights, each kept with 1 - rate.
  seen = 28
  assert abs(float(out.mean()) - 1) < 0.02
  expected = np.sqrt(rate / (1 - rate) / seen)
  assert abs(float(out[..., 0].std()) - expected) < 0.1 * expected


def test_bfloat16_in_is_bfloat16_out_with_a_float32_softmax():
  query, key, value = (
    jnp.asarray(_random(i, 1, 16, 1, 4), jnp.bfloat16) for i in range(3)
  )
  op = functools.partial(
    sparse_attention.sparse_attention, block=4, summary=1, is_causal=True
  )
  out = op(query, key, value)
  exact = op(*(x.astype(jnp.float32) for x in (query, key, value)))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"block": 4, "summary": 5}, "summary must be 0 to block=4, got 5"),
    ({"block": 4, "summary": 1, "dropout_rate": 0.1}, "needs a dropout_key"),
  ],
)
def test_refuses_what_it_cannot_do(options, message):
  x = jnp.zeros((1, 8, 2, 4))
  with pytest.raises(ValueError, match=message):
    sparse_attention.sparse_attention(x, x, x, **options)
