"""Zero keys of padded sequences against each sequence alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import dilated_attention, kernels, mixture

_SEGMENTS, _RATES = (6, 10, 40), (1, 3, 4)
_BRANCHES = {
  "segment_lengths": _SEGMENTS,
  "dilation_rates": _RATES,
  "head_phase": "blocked",
}
_ATTEND = functools.partial(
  dilated_attention.dilated_attention, padding="zeros"
)
_HEADS = 5
# Within one segment, a full last segment, a ragged one, and all of it.
_LENGTHS = (1, 5, 12, 17, 23)
_LONGEST = max(_LENGTHS)


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  shape = (len(_LENGTHS), _LONGEST, _HEADS, 4)
  return [rng.normal(size=shape).astype(np.float32) for _ in range(3)]


def _keys_of(row, head, length):
  """Positions of the keys that a row meets, each as often as it does.

  Those at or past `length`, or in a segment's own padding, are zeros (-1).
  """
  found = []
  for w, r in zip(_SEGMENTS, _RATES, strict=True):
    segment = min(w, length)
    start = row // segment * segment
    phase = head // -(-_HEADS // r)
    if (row - start) % r != phase:
      continue
    for offset in range(phase, -(-segment // r) * r, r):
      real = offset < segment and start + offset < length
      found.append(start + offset if real else -1)
  return np.array(found, int)


def _alone(query, key, value, length):
  """One sequence (T, N, H) in float64, row by row."""
  out = np.zeros((length, *query.shape[1:]))
  for head in range(_HEADS):
    # Row -1 is the zero key.
    k, v = (
      np.append(x[:length, head], np.zeros((1, x.shape[-1])), axis=0)
      for x in (key, value)
    )
    for row in range(length):
      keys = _keys_of(row, head, length)
      if keys.size:
        weights = np.exp(k[keys] @ query[row, head] / np.sqrt(k.shape[-1]))
        out[row, head] = weights @ v[keys] / weights.sum()
  return out


def test_each_sequence_gets_what_it_gets_alone(inputs):
  attend = jax.jit(functools.partial(_ATTEND, **_BRANCHES))
  batch = attend(*inputs, key_value_seq_lengths=np.array(_LENGTHS))
  assert np.isfinite(batch).all()
  for i, length in enumerate(_LENGTHS):
    expected = _alone(*(x[i].astype(np.float64) for x in inputs), length)
    np.testing.assert_allclose(batch[i, :length], expected, atol=1e-5)


def test_gradients_are_those_alone(inputs):
  length = 17
  weights = np.random.default_rng(1).normal(size=(1, length, _HEADS, 4))
  weights = weights.astype(np.float32)

  @jax.jit
  @jax.grad
  def padded(inputs):
    lengths = jnp.array([length])
    out = _ATTEND(*inputs, **_BRANCHES, key_value_seq_lengths=lengths)
    return (out[:, :length] * weights).sum()

  @jax.jit
  @jax.grad
  def alone(inputs):
    out = _ATTEND(*inputs, **_BRANCHES, implementation="reference")
    return (out * weights).sum()

  found = padded([x[:1] for x in inputs])
  expected = alone([x[:1, :length] for x in inputs])
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a[:, :length], b, atol=1e-5)
    np.testing.assert_array_equal(a[:, length:], 0)


@pytest.mark.parametrize("length", [9, 10, 11])
def test_a_sequence_of_several_stretches_and_a_ragged_end(length, monkeypatch):
  """Segment by segment, as long sequences are: the last one is filled up."""
  monkeypatch.setitem(mixture.STRETCH, "stretches", 1)
  rng = np.random.default_rng(0)
  tensors = rng.normal(size=(3, 1, length, 2, 4)).astype(np.float32)
  options = {"segment_lengths": (4, 8), "dilation_rates": (1, 3)}
  wanted = _ATTEND(*tensors, **options, implementation="reference")
  with kernels.compiling_for("stretches"):
    found = _ATTEND(*tensors, **options)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
