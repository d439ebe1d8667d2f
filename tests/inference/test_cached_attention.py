"""A cache fed row by row, or in chunks, attends as the whole sequence does."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.inference import cache as cache_lib
from longnet_jax.inference import cached_attention
from longnet_jax.models import attention
from tests.inference import small

_CONFIG = small.THREE_BRANCHES
_CONFIGS = {
  "paper": {},
  "ragged": {"segment_lengths": (5, 10), "dilation_rates": (1, 3)},
  "sparser than heads": {"segment_lengths": (6, 18), "dilation_rates": (2, 9)},
  "no dense branch": {
    "segment_lengths": (7, 14),
    "dilation_rates": (3, 2),
    "num_kv_heads": 2,
  },
  "blocked": {"head_phase": "blocked", "num_kv_heads": 3, "padding": "zeros"},
  "one key head": {
    "segment_lengths": (1, 2, 16),
    "dilation_rates": (1, 2, 5),
    "num_kv_heads": 1,
  },
  "one long segment": {"segment_lengths": (4, 100), "dilation_rates": (1, 5)},
  "dense": {"attention": "dense", "num_kv_heads": 2},
  "sparse": {"attention": "sparse", "num_kv_heads": 2},
  "sparse without summary": {"attention": "sparse", "sparse_summary": 0},
}
_LENGTH = 61


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


@functools.cache
def _inputs(config, batch=2):
  rng = np.random.default_rng(0)
  heads = config.num_heads, config.kv_heads, config.kv_heads
  return tuple(
    rng.normal(size=(batch, _LENGTH, n, config.head_dim)).astype(np.float32)
    for n in heads
  )


def _feed(config, inputs, chunk, layer=1):
  """Returns what the cache gives for the inputs, fed in chunks, and itself."""
  batch, length = inputs[0].shape[:2]
  cache = cache_lib.make_cache(config, batch, max_length=length)
  padding = [(0, 0), (0, -length % chunk), (0, 0), (0, 0)]
  chunked = [
    jnp.moveaxis(
      jnp.pad(x, padding).reshape(batch, -1, chunk, *x.shape[2:]), 1, 0
    )
    for x in inputs
  ]

  def step(cache, chunk_inputs):
    counts = jnp.clip(length - cache.position, 0, chunk)
    out, cache = cached_attention.attend(
      config, cache, jnp.int32(layer), *chunk_inputs, counts
    )
    return cache.replace(position=cache.position + counts), out

  cache, out = jax.jit(functools.partial(lax.scan, step))(cache, chunked)
  out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
  return out[:, :length], cache


def _whole(config, inputs):
  fn = attention.make_attention_fn(config)
  return fn(
    *map(jnp.asarray, inputs),
    is_causal=True,
    segment_ids=None,
    dropout_rate=0.0,
    dropout_key=None,
    scale=None,
  )


@pytest.mark.parametrize("name", _CONFIGS)
def test_rows_attend_as_in_the_whole_sequence(name):
  config = _change(**_CONFIGS[name])
  inputs = _inputs(config)
  expected = _whole(config, inputs)
  for chunk in (1, 8):
    found, _ = _feed(config, inputs, chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_long_stores_are_read_in_tiles(monkeypatch):
  monkeypatch.setattr(cached_attention, "_TILE", 7)
  monkeypatch.setattr(cached_attention, "_CPU_ROW_TILE", 5)
  config = _change(**_CONFIGS["dense"])
  inputs = _inputs(config)
  expected = _whole(config, inputs)
  for chunk in (1, 8):
    found, _ = _feed(config, inputs, chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_do_not_meet():
  inputs = _inputs(_CONFIG)
  _, cache = _feed(_CONFIG, inputs, 8, layer=0)
  assert all(not np.any(x[:, 1]) for x in (*cache.keys, *cache.values))
  assert all(np.any(x[:, 0]) for x in (*cache.keys, *cache.values))
