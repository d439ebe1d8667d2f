"""What a cache holds: as many bytes as the analysis says, whatever is read."""

import dataclasses

import pytest

from longnet_jax.analysis import costs, pattern
from longnet_jax.models import cache as cache_lib
from longnet_jax.models import config as config_lib

_CONFIG = config_lib.LongNetConfig(
  vocab_size=11,
  num_layers=2,
  model_dim=24,
  num_heads=6,
  ffn_dim=8,
  segment_lengths=(4, 8, 16),
  dilation_rates=(1, 2, 4),
  sparse_block=8,
  sparse_summary=2,
  max_positions=64,
  dtype="float32",
)


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_bytes_are_those_of_the_analysis_at_any_length(kv_heads):
  config = _change(num_kv_heads=kv_heads)
  for length in (10, 1000):
    expected = costs.decode_cache_bytes(
      pattern.Pattern(
        length=length,
        segment_lengths=config.segment_lengths,
        dilation_rates=config.dilation_rates,
        num_heads=config.num_heads,
      ),
      head_dim=config.head_dim,
      num_kv_heads=kv_heads,
      itemsize=4,
    )
    cache = cache_lib.make_cache(config, 3, max_length=length)
    assert cache.nbytes == 3 * config.num_layers * expected
  unbounded = cache_lib.make_cache(config, 3)
  assert unbounded.nbytes == cache.nbytes
  assert unbounded.max_length == config.position_limit


def test_dense_and_sparse_caches_grow():
  def nbytes(core, length):
    config = _change(attention=core)
    return cache_lib.make_cache(config, 1, max_length=length).nbytes

  assert nbytes("dense", 512) == 8 * nbytes("dense", 64)
  # A local block and a quarter of all columns.
  rows = nbytes("dense", 512) // 512
  assert nbytes("sparse", 512) == rows * (8 + 512 // 4)


def test_positions_without_a_number_are_refused():
  with pytest.raises(ValueError, match="max_length is 0; position='xpos'"):
    cache_lib.make_cache(_CONFIG, 1, max_length=0)
  with pytest.raises(ValueError, match="numbers 1 to"):
    cache_lib.make_cache(_CONFIG, 1, max_length=10**9)
