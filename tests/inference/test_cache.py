"""What a cache holds: as many bytes as the analysis says, whatever is read."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import pattern
from longnet_jax.analysis import costs
from longnet_jax.inference import cache as cache_lib
from tests.inference import small

_CONFIG = small.THREE_BRANCHES


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


def test_rings_and_the_rows_that_differ_among_them():
  """The figures that the module's text weighs, at 1/32 of the lengths."""
  paper = (64, 128, 256, 512, 1024), (1, 2, 4, 6, 12)
  fours = (64, 256, 1024, 4096), (1, 4, 16, 64)
  for (lengths, rates), most in ((paper, 1.5), (fours, 1.25)):
    rings = sum(-(-w // r) for w, r in zip(lengths, rates, strict=True))
    held = {
      n
      for w, r in zip(lengths, rates, strict=True)
      for n in range(lengths[-1] - w, lengths[-1], r)
    }
    assert 1 < rings / len(held) < most
  config = _change(
    model_dim=96,
    num_heads=12,
    num_kv_heads=2,
    segment_lengths=paper[0],
    dilation_rates=paper[1],
  )
  for kv_heads, smaller in ((2, False), (4, True)):
    changed = dataclasses.replace(config, num_kv_heads=kv_heads)
    rows = cache_lib.make_cache(changed, 1).nbytes
    whole = 2 * 4 * 8 * config.num_layers * kv_heads * paper[0][-1]
    assert (rows < whole) == smaller


@pytest.mark.parametrize("core", ["dilated", "dense", "sparse"])
def test_held_positions_are_what_was_written_last(core):
  config = _change(
    attention=core, segment_lengths=(5, 12), dilation_rates=(1, 3)
  )
  for branch in cache_lib.branches(config, 40):
    slots = cache_lib.slots(branch, 40)
    written = np.full((len(branch.phases), slots), -1)
    for position in range(40):
      read = jnp.full(1, position, jnp.int32)
      found = cache_lib.held_positions(branch, slots, read)
      np.testing.assert_array_equal(found[0], written)
      within = position % branch.length
      if branch.summary:
        column = within - branch.length + branch.summary
        if column >= 0:
          block = position // branch.length
          written[:, block * branch.summary + column] = position
        continue
      for stream, phase in enumerate(branch.phases):
        if within % branch.rate == phase:
          written[stream, within // branch.rate] = position


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
