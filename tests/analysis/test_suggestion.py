import numpy as np
import pytest

from longnet_jax import analysis

PAPER = analysis.Pattern(
  32768, 12, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
)


def test_the_paper_setting_comes_back_from_its_cost():
  budget = analysis.cost(PAPER).forward_flops
  suggestion = analysis.suggest(32768, 12, budget)
  assert suggestion.pattern == PAPER
  assert suggestion.cost == analysis.cost(PAPER)


@pytest.mark.parametrize("length", [100, 5000, 2**17])
@pytest.mark.parametrize("num_heads", [1, 6, 16])
@pytest.mark.parametrize("ratio", [2, 4])
def test_a_suggestion_keeps_to_its_budget_without_gaps(
  length, num_heads, ratio
):
  dense = analysis.Pattern(length, num_heads, (length,), (1,))
  top = analysis.cost(dense).forward_flops
  for budget in np.geomspace(top * 0.3, top, 4):
    try:
      pattern, cost = analysis.suggest(length, num_heads, budget, ratio=ratio)
    except ValueError:
      assert num_heads == 1  # which has no rate but 1: all there is is dense
      continue
    assert cost == analysis.cost(pattern)
    assert cost.forward_flops <= budget
    assert not any(map(len, analysis.gaps(pattern)))
    assert pattern.segment_lengths[-1] == length
    assert all(num_heads % rate == 0 for rate in pattern.dilation_rates)


@pytest.mark.parametrize(
  ("length", "num_heads", "ratio"), [(2**20, 12, 2), (5000, 7, 2), (300, 16, 4)]
)
def test_the_cheapest_is_gapless_and_cheaper_than_every_full_series(
  length, num_heads, ratio
):
  with pytest.raises(ValueError, match="cheapest setting") as refused:
    analysis.suggest(length, num_heads, 1, ratio=ratio)
  cheapest = float(str(refused.value).partition(" costs ")[2].split(":")[0])
  found = analysis.suggest(length, num_heads, cheapest * 1.0001, ratio=ratio)
  assert found.cost.forward_flops == pytest.approx(cheapest, rel=1e-4)
  assert not any(map(len, analysis.gaps(found.pattern)))
  assert found.pattern.segment_lengths[-1] == length
  divisors = [r for r in range(1, num_heads + 1) if num_heads % r == 0]
  for first in (4, 5, 6, 7, 64, 256):
    widths = [first]
    while widths[-1] < length:
      widths.append(min(widths[-1] * ratio, length))
    rates = [
      max(r for r in divisors if r <= ratio**i) for i in range(len(widths))
    ]
    series = analysis.Pattern(length, num_heads, widths, rates)
    assert analysis.cost(series).forward_flops > cheapest


def test_the_whole_of_a_million_positions_is_had_for_less():
  pattern, cost = analysis.suggest(2**20, 12, 1.66e13)
  assert pattern.branches[-1] == (2**20, 12)
  assert pattern.dilation_rates == (1, 2, 4, 6, 12)
  assert pattern.segment_lengths[0] > 1024
  assert 1.5e13 < cost.forward_flops <= 1.66e13


def test_a_generous_budget_buys_dense_attention():
  for length in (1, 2, 1000):
    suggestion = analysis.suggest(length, 4, 1e15)
    assert suggestion.pattern.branches == ((length, 1),)


def test_cost_a_token_is_constant_with_gaps():
  per_token = 214.8e9 / 32768
  shares = []
  for length in (2**20, 2**25, 2**30):
    pattern, cost = analysis.suggest(
      length, 12, per_token * length, allow_gaps=True
    )
    shares.append(cost.forward_flops / length / per_token)
    assert any(map(len, analysis.gaps(pattern)))
    np.testing.assert_array_less(0, np.diff(pattern.segment_lengths))
  assert 0.7 < min(shares) <= max(shares) <= 1


@pytest.mark.usefixtures("unchecked")
def test_a_small_budget_is_refused_with_the_cheapest_cost():
  with pytest.raises(ValueError, match="allow_gaps=True"):
    analysis.suggest(2**30, 12, 1e15)
  with pytest.raises(ValueError, match="cheapest setting for 64 positions"):
    analysis.suggest(64, 2, 1, allow_gaps=True)
  for budget in (0, float("nan"), "1e9"):
    with pytest.raises(ValueError, match="budget is .*: must be a number"):
      analysis.suggest(64, 2, budget)
  with pytest.raises(ValueError, match="num_heads is 0"):
    analysis.suggest(64, 0, 1e9)
  with pytest.raises(ValueError, match="length is 64.5"):
    analysis.suggest(64.5, 2, 1e9)
  with pytest.raises(ValueError, match="ratio is 1"):
    analysis.suggest(64, 2, 1e9, ratio=1)
