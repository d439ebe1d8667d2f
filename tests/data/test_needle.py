import numpy as np
import pytest

from longnet_jax.data import config as config_lib
from longnet_jax.data import needle

_CONFIG = config_lib.DataConfig(
  dataset="needle",
  window=96,
  needle_distances=(5, 40, 92),
  needle_digits=4,
  needle_windows=10,
)


def _batch(split="train", step=0, batch_size=32, **hosts):
  source = needle.Needle(_CONFIG, split)
  return source.batch(step, batch_size, **hosts)


def test_the_answer_was_planted_at_a_chosen_distance():
  batch = _batch()
  found = set()
  for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
    text = bytes([*tokens, targets[-1]])
    first, last = text.index(b"="), text.rindex(b"=")
    assert last == 96 - 4
    assert text[first:][:5] == text[last:][:5]
    assert text[last + 1 :].isdigit()
    filler = text[:first] + text[first + 5 : last]
    assert filler == b"" or filler.islower()
    found.add(last - first)
  assert found == {5, 40, 92}


def test_only_the_answer_counts():
  batch = _batch()
  assert np.all(batch["weights"][:, :-4] == 0)
  assert np.all(batch["weights"][:, -4:] == 1)
  np.testing.assert_array_equal(
    batch["tokens"][:, 1:], batch["targets"][:, :-1]
  )
  np.testing.assert_array_equal(batch["positions"][0], np.arange(96))
  assert np.all(batch["segment_ids"] == 1)
  assert {a.dtype.name for a in batch.values()} == {"int32", "float32"}


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_is_the_same_on_all_hosts(count):
  whole = _batch(step=3, batch_size=8)
  parts = [
    _batch(step=3, batch_size=8, host_index=i, host_count=count)
    for i in range(count)
  ]
  for key, array in whole.items():
    np.testing.assert_array_equal(
      array, np.concatenate([part[key] for part in parts])
    )


def test_windows_differ_by_step_row_and_split():
  texts = np.concatenate(
    [
      _batch(split, step, 4)["tokens"]
      for split in config_lib.SPLITS
      for step in range(2)
    ]
  )
  assert len({row.tobytes() for row in texts}) == 24


def test_held_out_windows_end():
  source = needle.Needle(_CONFIG, "validation")
  assert (source.num_windows, source.num_batches(4)) == (10, 3)
  last = source.batch(2, 4, shuffled=False)
  assert last["weights"].sum(1).tolist() == [4, 4, 0, 0]
  assert last["segment_ids"][:, 0].tolist() == [1, 1, 0, 0]
