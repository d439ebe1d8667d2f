import jax
import numpy as np
import pytest

from longnet_jax import analysis
from longnet_jax.models import config as model_config
from longnet_jax.training import flops


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
  assert flops.attention_pairs(config, length) == _count(config, length)


def test_matrix_products_dominate_a_short_window():
  config = _config()
  per_token = 3 * (24 * 24 * 4 + 2 * 24 * 40) + 24 * 32
  pairs = 3 * flops.attention_pairs(config, 5)
  expected = 3 * (2 * per_token * 5 + 4 * 8 * pairs)
  assert flops.train_flops(config, 5) == expected


def test_an_unknown_chip_has_no_peak():
  assert flops.peak_flops(jax.devices()[0]) is None


@pytest.mark.parametrize("phase", ["interleaved", "blocked"])
def test_pairs_are_those_of_the_analysis(phase):
  config = _config(head_phase=phase)
  for length in (1, 9, 37):
    pattern = analysis.from_config(config, length)
    pairs = analysis.cost(pattern, head_dim=config.head_dim).pairs
    assert flops.attention_pairs(config, length) == pairs
