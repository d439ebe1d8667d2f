import numpy as np
import pytest

from longnet_jax import analysis
from longnet_jax.analysis import masks
from tests.analysis import oracle


def _cells(pairs, block):
  """Sums an (N, N) array over blocks of rows and of columns."""
  starts = np.arange(0, len(pairs), block)
  rows = np.add.reduceat(pairs.astype(int), starts, axis=0)
  return np.add.reduceat(rows, starts, axis=1)


def test_pairs_of_cells_equal_brute_force():
  for number, pattern in enumerate(oracle.random_patterns(60)):
    every, block = oracle.masks(pattern), 1 + number % 6
    for branch, heads in enumerate(every):
      for head, mask in enumerate(heads):
        found = masks.block_pairs(pattern, branch, head, block)
        np.testing.assert_array_equal(found, _cells(mask, block), str(pattern))
    total = masks.multiplicity(pattern, block)
    np.testing.assert_array_equal(total, _cells(every.sum((0, 1)), block))
    dense = np.ones((pattern.length, pattern.length))
    dense = np.tril(dense) if pattern.is_causal else dense
    found = masks.cell_pairs(pattern, block)
    np.testing.assert_array_equal(found, _cells(dense, block))


def test_pairs_of_cells_add_up_at_a_billion_positions():
  pattern = analysis.Pattern(2**30, 3, (2048, 2**30), (1, 3))
  pairs = masks.multiplicity(pattern, 2**22)
  assert pairs.shape == (256, 256)
  assert pairs.sum() == analysis.cost(pattern).pairs


@pytest.mark.parametrize("is_causal", [False, True])
def test_layers_of_a_cell_are_those_of_its_pairs_where_all_agree(is_causal):
  pattern = analysis.Pattern(48, 2, (8, 12), (1, 1), is_causal=is_causal)
  hops = np.stack([analysis.hops_from(pattern, key) for key in range(48)], 1)
  found = masks.block_layers(pattern, 4)
  cells = hops.reshape(12, 4, 12, 4).swapaxes(1, 2).reshape(12, 12, 16)
  agreed = np.all(cells == cells[..., :1], axis=-1)
  if is_causal:
    agreed &= np.tri(12, k=-1, dtype=bool)
  assert set(cells[agreed, 0].tolist()) >= {-1, 1, 2}
  np.testing.assert_array_equal(found[agreed], cells[agreed, 0])
  assert np.all(np.diag(found) == 1)
