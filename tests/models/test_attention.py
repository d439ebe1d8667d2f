"""The one place where a configuration becomes an attention core."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import attention
from longnet_jax.models import config as config_lib
from longnet_jax.ops import rotary

_make = functools.partial(
  config_lib.LongNetConfig,
  vocab_size=5,
  num_layers=1,
  model_dim=16,
  num_heads=4,
  ffn_dim=16,
  segment_lengths=(4, 8),
  dilation_rates=(1, 2),
  dtype="float32",
  sparse_block=4,
  sparse_summary=1,
)
_LENGTH = 12


def _heads(count=3):
  rng = np.random.default_rng(0)
  shape = (1, _LENGTH, 4, 4)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32)] + [
    jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count - 1)
  ]


def _attend(config, *heads, segment_ids=None):
  attention_fn = attention.make_attention_fn(config)
  return attention_fn(
    *heads,
    is_causal=True,
    segment_ids=segment_ids,
    dropout_rate=0.0,
    dropout_key=None,
    scale=None,
  )


def _counts(config):
  """How often each row (causal) sees each column in head j: (N, T, T)."""
  p = np.arange(_LENGTH)
  rows, columns = p[:, None], p[None]
  if config.attention == "dense":
    counts = np.ones((4, _LENGTH, _LENGTH))
  elif config.attention == "sparse":
    counts = (rows // 4 == columns // 4) | (columns % 4 == 3)
    counts = np.broadcast_to(counts, (4, _LENGTH, _LENGTH))
  else:
    counts = np.zeros((4, _LENGTH, _LENGTH))
    branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
    for segment, rate in branches:
      for head in range(4):
        blocked = config.head_phase == "blocked"
        phase = head // (-(-4 // rate)) if blocked else head % rate
        kept = p % segment % rate == phase
        same = rows // segment == columns // segment
        counts[head] += same & kept[:, None] & kept[None]
  return counts * (columns <= rows)


@pytest.mark.parametrize(
  "changes",
  [
    {"attention": "dense"},
    {"attention": "sparse"},
    {"attention": "dilated"},
    {"attention": "dilated", "head_phase": "blocked"},
  ],
)
def test_core_is_softmax_over_its_pattern(changes):
  config = _make(**changes)
  heads = _heads()
  query, key, value = (np.asarray(x[0], np.float64) for x in heads)
  weights = np.exp(np.einsum("tnh,snh->nts", query, key) / 2)
  weights = weights * _counts(config)
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("nts,snh->tnh", weights, value)
  np.testing.assert_allclose(_attend(config, *heads)[0], expected, atol=1e-5)


def test_padding_and_mixing_gradient_reach_the_core():
  heads = _heads()

  def gradient(config):
    return jax.grad(lambda *x: (_attend(config, *x) ** 2).sum())(*heads)

  exact = gradient(_make())
  detached = gradient(_make(mixing_gradient=False))
  assert np.abs(exact - detached).max() > 1e-3

  def encode(config):
    return attention.make_attention_fn(config)(*heads, is_causal=False)

  # 12 rows are one and a half segments of 8: zero keys fill the second.
  hidden, zeros = encode(_make()), encode(_make(padding="zeros"))
  assert np.abs(hidden - zeros)[:, :8].max() < 1e-6
  assert np.abs(hidden - zeros)[:, 8:].max() > 1e-3


def test_rotation_scores_do_not_depend_on_max_positions():
  query, key = _heads(2)
  positions = jnp.arange(_LENGTH)[None]

  def scores(config):
    rotation = attention.make_rotation(config, positions)
    return jnp.einsum(
      "btnh,bsnh->bnts",
      rotary.rotate_query(query, rotation),
      rotary.rotate_key(key, rotation),
    )

  short = scores(_make(max_positions=16))
  np.testing.assert_allclose(
    scores(_make(max_positions=32_768)), short, rtol=1e-4, atol=1e-5
  )
  rope = scores(_make(position="rope"))
  assert np.abs(rope - short).max() > 1e-3
  assert attention.make_rotation(_make(position="none"), positions) is None


def test_only_branches_have_mixing_weights():
  assert attention.make_mixing_weights_fn(_make(attention="dense")) is None
  query, key = _heads(2)
  weights_fn = attention.make_mixing_weights_fn(_make())
  weights = weights_fn(query, key, is_causal=True, segment_ids=None)
  assert weights.shape == (query.shape[2], 2)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
