"""Decoding equals the forward pass, at a cost that does not grow."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import decoding
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer

_CONFIG = config_lib.LongNetConfig(
  vocab_size=11,
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  ffn_dim=16,
  segment_lengths=(4, 10),
  dilation_rates=(1, 3),
  sparse_block=6,
  sparse_summary=2,
  max_positions=64,
  dtype="float32",
)
_CONFIGS = {
  "xpos": {},
  "rope, no dense branch, more rates than heads": {
    "position": "rope",
    "segment_lengths": (6, 11),
    "dilation_rates": (2, 5),
    "norm_position": "post",
    "tie_embeddings": True,
  },
  "dense": {"attention": "dense"},
  "sparse": {"attention": "sparse", "position": "none"},
}
_TOKENS = np.random.default_rng(0).integers(0, 11, (3, 41)).astype(np.int32)
_LENGTHS = np.array([1, 13, 17])  # of the prompts


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


@functools.cache
def _params(config):
  init = jax.jit(transformer.LongNetLM(config).init)
  return init(jax.random.key(0), _TOKENS[:1])["params"]


@functools.cache
def _forward(config):
  """The logits of all positions of _TOKENS."""
  apply = jax.jit(transformer.LongNetLM(config).apply)
  return np.asarray(apply({"params": _params(config)}, _TOKENS))


@pytest.mark.parametrize("name", _CONFIGS)
def test_every_step_equals_the_forward_pass(name):
  config = _change(**_CONFIGS[name])
  params, expected = _params(config), _forward(config)
  examples = np.arange(3)
  logits, cache = decoding.prefill(
    config, params, _TOKENS[:, :17], _LENGTHS, chunk=4
  )
  # Three ends of the longest segment are passed, and more.
  for step in range(_TOKENS.shape[1] - _LENGTHS.max()):
    last = _LENGTHS + step
    np.testing.assert_allclose(
      logits, expected[examples, last - 1], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(cache.position, last)
    logits, cache = decoding.decode_step(
      config, params, cache, _TOKENS[examples, last]
    )


@pytest.mark.parametrize(("length", "chunk"), [(29, 512), (41, 8)])
def test_prefill_ends_anywhere(length, chunk):
  logits, cache = decoding.prefill(
    _CONFIG, _params(_CONFIG), _TOKENS[:, :length], chunk=chunk
  )
  expected = _forward(_CONFIG)[:, length - 1]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert cache.position.tolist() == [length] * 3


def test_half_precision_stays_near():
  config = _change(dtype="bfloat16")
  logits, cache = decoding.prefill(
    config, _params(_CONFIG), _TOKENS[:, :17], chunk=8
  )
  assert logits.dtype == jnp.float32
  assert cache.keys[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(logits, _forward(_CONFIG)[:, 16], atol=0.1)


def test_past_the_room_logits_are_nan():
  config, params = _change(attention="dense"), _params(_CONFIG)
  logits, cache = decoding.prefill(
    config, params, _TOKENS[:, :3], max_length=4, chunk=4
  )
  logits, cache = decoding.decode_step(config, params, cache, _TOKENS[:, 3])
  np.testing.assert_allclose(
    logits, _forward(config)[:, 3], rtol=1e-4, atol=1e-5
  )
  logits, cache = decoding.decode_step(config, params, cache, _TOKENS[:, 4])
  assert np.isnan(logits).all()


def test_the_cache_is_updated_in_place():
  config = _change(attention="dense")
  params = _params(_CONFIG)
  _, cache = decoding.prefill(config, params, _TOKENS[:1, :3], max_length=8192)
  token = jnp.zeros(1, jnp.int32)
  step = decoding.decode_step.lower(config, params, cache, token).compile()
  memory = step.memory_analysis()
  assert memory.alias_size_in_bytes >= cache.nbytes
  # A copy of the layer that is read, of keys and of values, and little else.
  assert memory.temp_size_in_bytes < 0.75 * cache.nbytes


def test_prompts_that_cannot_be_are_refused():
  for lengths, message in (([1], "lengths have shape"), ([0, 1, 2], "1 to 5")):
    with pytest.raises(ValueError, match=message):
      decoding.prefill(_CONFIG, {}, _TOKENS[:, :5], np.array(lengths))
  with pytest.raises(ValueError, match="tokens have shape"):
    decoding.prefill(_CONFIG, {}, _TOKENS[0])
  with pytest.raises(ValueError, match="prompt of 41 tokens is longer than"):
    decoding.prefill(_CONFIG, {}, _TOKENS, max_length=40)


@pytest.mark.slow
def test_a_million_positions_cost_what_ten_thousand_do():
  """And the dense baseline's bytes and time grow."""

  def measure(core, length):
    config = _change(attention=core, position="rope", segment_lengths=(64, 640))
    params = _params(_change(position="rope"))
    tokens = np.random.default_rng(0).integers(0, 11, (1, length))
    bound = None if core == "dilated" else length + 200
    if core == "dense":
      tokens = tokens[:, :512]  # what it holds does not change its time
    logits, cache = decoding.prefill(
      config, params, tokens.astype(np.int32), max_length=bound, chunk=1024
    )
    if core == "dense":
      cache = cache.replace(position=cache.position + length - 512)
    token = jnp.zeros(1, jnp.int32)
    times = []
    for _ in range(100):
      start = time.perf_counter()
      logits, cache = decoding.decode_step(config, params, cache, token)
      jax.block_until_ready(logits)
      times.append(time.perf_counter() - start)
    assert np.isfinite(logits).all()
    return cache.nbytes, np.median(times)

  short, long = measure("dilated", 10_000), measure("dilated", 1_000_000)
  assert short[0] == long[0]
  assert long[1] < 2 * short[1]
  short, long = measure("dense", 10_000), measure("dense", 1_000_000)
  assert long[0] > 90 * short[0]
  assert long[1] > 4 * short[1]
