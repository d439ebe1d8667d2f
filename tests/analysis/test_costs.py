import dataclasses
import math

import numpy as np
import pytest

from longnet_jax import analysis
from longnet_jax.analysis import costs
from longnet_jax.models import config as model_config
from tests.analysis import oracle

_MODEL = model_config.LongNetConfig(
  vocab_size=11,
  num_layers=3,
  model_dim=16,
  num_heads=2,
  ffn_dim=40,
  segment_lengths=(32, 128),
  dilation_rates=(1, 2),
)
PAPER = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def test_counts_equal_brute_force():
  for pattern in oracle.random_patterns(60):
    masks = oracle.masks(pattern)
    kept = masks.diagonal(axis1=2, axis2=3)  # (branches, heads, N)
    for group in (g for g in (1, 2, 3) if pattern.num_heads % g == 0):
      shared = kept.reshape(len(kept), -1, group, pattern.length).any(2)
      d, size = 5, 2
      cost = analysis.cost(
        pattern,
        head_dim=d,
        num_kv_heads=pattern.num_heads // group,
        itemsize=size,
      )
      queries, keys = kept.sum(), shared.sum()
      assert cost.pairs == masks.sum(), pattern
      assert cost.forward_flops == masks.sum() * 2 * (d + d)
      assert cost.backward_flops == masks.sum() * 2 * (5 * d)
      # q, out, logsumexp; k, v.
      expected = queries * (2 * d * size + 4) + keys * 2 * d * size
      assert cost.forward_bytes == expected
      # q, dO, dq, logsumexp, rowsum; k, v, dk, dv.
      expected = queries * (3 * d * size + 8) + keys * 4 * d * size
      assert cost.backward_bytes == expected


def test_the_paper_formula_where_everything_divides():
  pattern = analysis.Pattern(
    2**30, 16, (2**11, 2**14, 2**30), (1, 4, 16), is_causal=False
  )
  cost = analysis.cost(pattern, head_dim=128)
  share = 2**11 + 2**14 // 4**2 + 2**30 // 16**2
  assert cost.forward_flops == 4 * 2**30 * 128 * 16 * share
  assert all(isinstance(number, int) for number in vars(cost).values())


def test_dense_costs_every_pair_and_saves_as_much():
  pattern = analysis.Pattern(32768, 12, *PAPER)
  ours, dense = analysis.cost(pattern), analysis.cost(analysis.dense(pattern))
  assert dense.pairs == 12 * 32768 * 32769 // 2
  assert dense.saved_bytes == ours.saved_bytes
  assert dense.saved_bytes == 32768 * 12 * (4 * 64 * 2 + 4)
  assert dense.forward_flops / ours.forward_flops == pytest.approx(7.7, 0.01)


def test_the_cache_is_one_ring_a_branch_and_head():
  pattern = analysis.Pattern(2**20, 12, *PAPER)
  rows = sum(math.ceil(w / r) for w, r in pattern.branches)
  expected = rows * 12 * 64 * 2 * 4
  assert analysis.decode_cache_bytes(pattern, itemsize=4) == expected
  assert analysis.cost(pattern, itemsize=4).cache_bytes == expected
  dense = analysis.decode_cache_bytes(analysis.dense(pattern), num_kv_heads=3)
  assert dense == 2**20 * 3 * 64 * 2 * 2


def test_heads_that_share_keys_and_a_phase_share_a_ring():
  pattern = analysis.Pattern(64, 4, (8, 64), (1, 2))
  rings = {1: 1 * 8 + 2 * 32, 2: 2 * 8 + 4 * 32, 4: 4 * 8 + 4 * 32}
  for kv_heads, rows in rings.items():
    size = analysis.decode_cache_bytes(
      pattern, head_dim=1, num_kv_heads=kv_heads, itemsize=1
    )
    assert size == 2 * rows


def test_the_ring_holds_what_a_query_may_read():
  for pattern in oracle.random_patterns(40):
    most = [
      mask.sum(-1).max() for branch in oracle.masks(pattern) for mask in branch
    ]
    size = analysis.decode_cache_bytes(pattern, head_dim=1, itemsize=1)
    assert size >= 2 * np.sum(most)


def test_bad_sizes_are_refused():
  pattern = analysis.Pattern(8, 4, (8,), (1,))
  with pytest.raises(ValueError, match="num_kv_heads is 3"):
    analysis.cost(pattern, num_kv_heads=3)
  with pytest.raises(ValueError, match="head_dim is 0"):
    analysis.decode_cache_bytes(pattern, head_dim=0)


def _config(**changes):
  sizes = dict(
    vocab_size=32,
    num_layers=3,
    model_dim=24,
    num_heads=3,
    ffn_dim=40,
    segment_lengths=(8, 10),
    dilation_rates=(1, 4),
    sparse_block=8,
    sparse_summary=2,
  )
  return model_config.LongNetConfig(**{**sizes, **changes})


def _count(config, length):
  """Pairs by brute force over a mask for each head and branch."""
  positions = np.arange(length)
  query, key = positions[:, None], positions[None]
  total = 0
  for head in range(config.num_heads):
    if config.attention == "dense":
      total += np.sum(key <= query)
      continue
    if config.attention == "sparse":
      block = config.sparse_block
      same = query // block == key // block
      shown = key % block >= block - config.sparse_summary
      earlier = key // block < query // block
      total += np.sum((key <= query) & (same | (shown & earlier)))
      continue
    for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True):
      group = -(-config.num_heads // r)
      phase = {"interleaved": head % r, "blocked": head // group}
      kept = positions % w % r == phase[config.head_phase]
      same = query // w == key // w
      total += np.sum(same & (key <= query) & kept[:, None] & kept[None])
  return total


@pytest.mark.parametrize("length", [1, 7, 8, 37])
@pytest.mark.parametrize("attention", ["dilated", "dense", "sparse"])
@pytest.mark.parametrize("phase", ["interleaved", "blocked"])
def test_pairs_are_exact(length, attention, phase):
  config = _config(attention=attention, head_phase=phase)
  assert costs.attention_pairs(config, length) == _count(config, length)


def test_matrix_products_dominate_a_short_window():
  config = _config()
  per_token = 3 * (24 * 24 * 4 + 2 * 24 * 40) + 24 * 32
  pairs = 3 * costs.attention_pairs(config, 5)
  expected = 3 * (2 * per_token * 5 + 4 * 8 * pairs)
  assert costs.train_flops(config, 5) == expected


def test_what_is_computed_again_follows_remat():
  def computed(remat, platform="gpu"):
    config = dataclasses.replace(_MODEL, remat=remat)
    return costs.computed_flops(config, 256, platform)

  pairs = costs.attention_pairs(_MODEL, 256)
  width, layers = _MODEL.model_dim, _MODEL.num_layers
  block = 4 * width**2 + 2 * width * _MODEL.ffn_dim
  # Backward takes the scores again in any case: 4 + 10 a pair, not 12.
  none = costs.train_flops(_MODEL, 256) + 2 * layers * _MODEL.head_dim * pairs
  assert computed("none") == none
  assert computed("dots") - none == 2 * 256 * layers * width * _MODEL.ffn_dim
  values = 2 * 256 * layers * width * _MODEL.kv_heads * _MODEL.head_dim
  assert computed("dots", "tpu") - computed("dots") == values
  whole = 2 * 256 * block + 4 * _MODEL.head_dim * pairs
  assert computed("full") - none == layers * whole
  assert computed("offload") == computed("full")
