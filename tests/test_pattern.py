import types

import numpy as np
import pytest

from longnet_jax import analysis
from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import masks
from tests.analysis import oracle


def test_masks_follow_the_definition():
  for pattern in oracle.random_patterns(40):
    expected = oracle.masks(pattern)
    for b, j in np.ndindex(*expected.shape[:2]):
      mask = masks.branch_mask(pattern, b, j)
      np.testing.assert_array_equal(mask, expected[b, j], str(pattern))
      rows = analysis.kept_rows(pattern, b, j)
      np.testing.assert_array_equal(rows, np.flatnonzero(mask.diagonal()))
    np.testing.assert_array_equal(
      masks.multiplicity(pattern), expected.sum((0, 1))
    )


def test_gaps_and_unread_positions_follow_the_definition():
  with_gaps = 0
  for pattern in oracle.random_patterns(60):
    read = oracle.masks(pattern).any(1).diagonal(axis1=1, axis2=2)
    position = np.arange(pattern.length)
    for (w, r), kept, gap in zip(
      pattern.branches, read, analysis.gaps(pattern), strict=True
    ):
      assert set(gap) == set((position % w % r)[~kept].tolist())
      with_gaps += len(gap) > 0
    assert analysis.num_unread(pattern) == np.sum(~read.any(0))
  assert with_gaps > 10


def test_unread_positions_of_a_long_sequence():
  pattern = analysis.Pattern(2**21 + 5, 2, (2**21,), (4,))
  assert analysis.num_unread(pattern) == 2**20 + 2


@pytest.mark.parametrize(
  ("head_phase", "rate", "expected"),
  [
    ("interleaved", 4, [0, 1, 2, 3, 0, 1]),
    ("interleaved", 7, [0, 1, 2, 3, 4, 5]),
    ("blocked", 4, [0, 0, 1, 1, 2, 2]),
    ("blocked", 7, [0, 1, 2, 3, 4, 5]),
  ],
)
def test_phases_of_six_heads(head_phase, rate, expected):
  found = pattern_lib.phases(6, rate, head_phase)
  np.testing.assert_array_equal(found, expected)
  pattern = analysis.Pattern(1, 6, (1,), (1,), head_phase=head_phase)
  assert [pattern_lib.phase(pattern, rate, j) for j in range(6)] == expected
  assert pattern_lib.num_phases(pattern, rate) == 1 + max(expected)


def test_a_pattern_from_a_configuration():
  config = types.SimpleNamespace(
    attention="dilated",
    num_heads=4,
    segment_lengths=(8, 16),
    dilation_rates=(1, 2),
    head_phase="blocked",
  )
  pattern = analysis.from_config(config, 100, is_causal=False)
  assert pattern == analysis.Pattern(
    100, 4, (8, 16), (1, 2), is_causal=False, head_phase="blocked"
  )
  config.attention = "dense"
  assert analysis.from_config(config, 100).branches == ((100, 1),)
  config.attention = "sparse"
  with pytest.raises(ValueError, match="attention is 'sparse'"):
    analysis.from_config(config, 100)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((8, 2, (4, 8), (1,)), "dilation_rates has 1 entries, segment_lengths 2"),
    ((8, 2, (), ()), "segment_lengths is empty"),
    ((0, 2, (4,), (1,)), "length is 0"),
    ((8, 0, (4,), (1,)), "num_heads is 0"),
    ((8, 2, (4,), (0,)), "an entry of dilation_rates is 0"),
    ((8, 2, (4.5,), (1,)), "an entry of segment_lengths is 4.5"),
    ((8, 2, 4, (1,)), "segment_lengths is 4: give a sequence"),
    ((8.5, 2, (4,), (1,)), "length is 8.5: must be an int"),
    ((True, 2, (4,), (1,)), "length is True: must be an int"),
  ],
)
def test_bad_settings_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    analysis.Pattern(*arguments)


def test_numbers_of_numpy_do_not_overflow():
  widths, rates = np.array([2**11, 2**30], np.int32), np.array([1, 16])
  pattern = analysis.Pattern(np.int32(2**30), np.int32(12), widths, rates)
  assert all(type(w) is int for w in pattern.segment_lengths)
  assert analysis.cost(pattern).forward_flops > 2**62


def test_rows_of_no_head_or_branch_are_refused():
  pattern = analysis.Pattern(8, 2, (4,), (1,))
  with pytest.raises(ValueError, match="branch is 1: must be in 0 .. 0"):
    analysis.kept_rows(pattern, 1, 0)
  with pytest.raises(ValueError, match="head is -1"):
    analysis.kept_rows(pattern, 0, -1)


def test_an_unknown_phase_is_refused():
  with pytest.raises(ValueError, match="head_phase is 'other'"):
    analysis.Pattern(8, 2, (4,), (1,), head_phase="other")
