import dataclasses
import math

import numpy as np
import pytest

from longnet_jax import analysis
from tests.analysis import oracle


def geometric(length, num_heads, first, growth, **settings):
  branches = round(math.log(length / first, growth)) + 1
  widths = [first * growth**i for i in range(branches)]
  rates = [growth**i for i in range(branches)]
  return analysis.Pattern(length, num_heads, widths, rates, **settings)


def test_hops_and_coverage_equal_matrix_powers():
  several = 0
  for pattern in oracle.random_patterns(60):
    layers = oracle.layers(pattern)
    for key in range(pattern.length):
      np.testing.assert_array_equal(
        analysis.hops_from(pattern, key), layers[:, key], str(pattern)
      )
    last = max(layers.max(), 1)
    counts = [np.sum((layers >= 0) & (layers <= n)) for n in range(1, last + 1)]
    assert analysis.reached_pairs(pattern) == tuple(counts), pattern
    shares = analysis.coverage(pattern, last + 1)
    np.testing.assert_array_equal(
      shares[:-1], np.divide(counts, pattern.num_pairs)
    )
    assert shares[-1] == shares[-2]
    several += last > 2
  assert several > 5


def test_coverage_of_some_keys():
  for pattern in oracle.random_patterns(20):
    layers, keys = oracle.layers(pattern), [pattern.length // 2, 0, 0]
    chosen = np.unique(keys)
    pairs = layers[:, chosen]
    total = pairs.size - (chosen.sum() if pattern.is_causal else 0)
    expected = [np.sum((pairs >= 0) & (pairs <= n)) / total for n in (1, 2)]
    assert analysis.coverage(pattern, 2, sources=keys) == tuple(expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_keys_than_bits_and_repeated_blocks(is_causal):
  pattern = analysis.Pattern(
    203, 3, (10, 30, 6), (1, 5, 2), is_causal=is_causal
  )
  every = analysis.reached_pairs(pattern, 4, sources=range(pattern.length))
  assert analysis.reached_pairs(pattern, 4) == every
  hops = np.stack([analysis.hops_from(pattern, key) for key in range(203)])
  assert every[1] == np.sum((hops >= 0) & (hops <= 2))


def test_an_estimate_is_exact_where_a_block_is_short_and_close_elsewhere():
  ragged = analysis.Pattern(203, 3, (10, 30, 6), (1, 5, 2))
  assert analysis.estimated_coverage(ragged, 4) == pytest.approx(
    analysis.coverage(ragged, 4)
  )
  long = geometric(2**15, 8, 2**11, 4)
  exact, close = (
    analysis.coverage(long, 3),
    analysis.estimated_coverage(long, 3),
  )
  assert close != exact
  assert close == pytest.approx(exact, abs=0.01)


def test_an_estimate_walks_blocks_of_a_million_positions_but_not_of_eight():
  million = analysis.Pattern(2**20, 8, (2**14, 2**20), (1, 8))
  shares = analysis.estimated_coverage(million, 2)
  assert 0.12 < shares[0] < 0.15
  assert 0.99 < shares[1] <= 1
  eight = analysis.Pattern(2**23, 8, (2**14, 2**23), (1, 8))
  assert analysis.estimated_coverage(eight) is None


@pytest.mark.parametrize("growth", [2, 3, 4])
@pytest.mark.parametrize("num_heads", [1, 2, 16])
def test_the_logarithmic_bound_holds(growth, num_heads):
  for power in range(1, 6):
    first = growth**2
    pattern = geometric(
      first * growth**power, num_heads, first, growth, is_causal=False
    )
    counts = analysis.reached_pairs(pattern)
    assert counts[-1] == pattern.num_pairs
    assert len(counts) <= 2 * analysis.logarithmic_bound(pattern) + 1


def test_hops_grow_with_the_logarithm_of_the_length():
  for power in range(1, 9):
    pattern = geometric(4 * 2**power, 2, 4, 2, is_causal=False)
    assert analysis.logarithmic_bound(pattern) == pytest.approx(power)
    assert len(analysis.reached_pairs(pattern)) == power + 1


def test_hops_at_a_million_positions():
  n = 2**20
  pattern = geometric(n, 12, 2**12, 4, is_causal=False)
  bound = 2 * analysis.logarithmic_bound(pattern) + 1
  assert 1 < analysis.hops(pattern, 1, n - 2) <= bound
  assert analysis.hops(pattern, 7, 7) == 0
  assert analysis.hops(pattern, 0, n - 256) == 1


def test_causal_neighbours_across_a_boundary_may_never_meet():
  pattern = geometric(16, 4, 4, 2)
  assert analysis.hops(pattern, 3, 4) is None
  assert analysis.hops(pattern, 4, 3) is None
  assert analysis.coverage(pattern)[-1] < 1
  both = dataclasses.replace(pattern, is_causal=False)
  assert analysis.hops(both, 3, 4) == 2


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused():
  pattern = analysis.Pattern(8, 2, (8,), (1,))
  with pytest.raises(ValueError, match="position is 8"):
    analysis.hops(pattern, 0, 8)
  with pytest.raises(ValueError, match="position is -1"):
    analysis.hops_from(pattern, -1)
  with pytest.raises(ValueError, match="position is 9"):
    analysis.coverage(pattern, 1, sources=[1, 9])
  with pytest.raises(ValueError, match="sources is empty"):
    analysis.coverage(pattern, 1, sources=[])
  with pytest.raises(ValueError, match="num_layers is 0"):
    analysis.coverage(pattern, 0)
  with pytest.raises(ValueError, match="num_layers is 1.5"):
    analysis.coverage(pattern, 1.5)
  with pytest.raises(ValueError, match="position is .*1.5.*: must be an int"):
    analysis.coverage(pattern, 1, sources=[1.5])
  with pytest.raises(ValueError, match="do not grow"):
    analysis.logarithmic_bound(pattern)
