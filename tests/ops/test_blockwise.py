"""Blocks see what a window of training would, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import checked
from longnet_jax.ops import blockwise
from longnet_jax.ops import dilated_attention as op

_DENSE = functools.partial(
  op.dilated_attention, segment_lengths=(64,), dilation_rates=(1,)
)
_OPTIONS = dict(is_causal=True, segment_ids=None)


def _tensors(length):
  shape = (2, length, 2, 4)
  return [jax.random.normal(jax.random.key(i), shape) for i in range(3)]


def _masked(query, key, value, visible):
  """Softmax attention over a mask, in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  scores = np.einsum("bqnh,bknh->bnqk", query, key) / 2
  weights = np.exp(scores) * visible
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bnqk,bknh->bqnh", weights, value)


@pytest.mark.parametrize("documents", [False, True])
def test_a_row_sees_its_block_and_the_one_before(documents):
  tensors = _tensors(29)
  row = np.arange(29)
  ids = row // 11 if documents else row * 0
  visible = row[:, None] >= row
  visible &= row[:, None] // 4 - row // 4 <= 1
  visible &= ids[:, None] == ids
  segment_ids = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (2, 29))
  found = blockwise.over_blocks(_DENSE, 8)(
    *tensors, is_causal=True, segment_ids=segment_ids if documents else None
  )
  expected = _masked(*tensors, visible)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_each_window_has_the_pattern_of_training():
  attend = functools.partial(
    op.dilated_attention, segment_lengths=(4, 8), dilation_rates=(1, 2)
  )
  tensors = _tensors(16)
  found = blockwise.over_blocks(attend, 8)(*tensors, **_OPTIONS)
  for start in (0, 4, 8):
    window = [x[:, start : start + 8] for x in tensors]
    expected = attend(*window, is_causal=True)
    rows = slice(0 if start == 0 else 4, None)
    np.testing.assert_allclose(
      found[:, start : start + 8][:, rows], expected[:, rows], atol=1e-6
    )


def test_what_fits_the_window_is_left_as_it_is():
  tensors = _tensors(8)
  found = blockwise.over_blocks(_DENSE, 8)(*tensors, **_OPTIONS)
  np.testing.assert_array_equal(found, _DENSE(*tensors, is_causal=True))


def test_what_cannot_be_cut_is_refused():
  with pytest.raises(checked.RefusedError, match="window is 1; it must be at"):
    blockwise.over_blocks(_DENSE, 1)
  with pytest.raises(checked.RefusedError, match="causal attention alone"):
    blockwise.over_blocks(_DENSE, 8)(
      *_tensors(9), is_causal=False, segment_ids=None
    )
