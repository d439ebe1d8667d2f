import itertools

import numpy as np
import pytest

from longnet_jax.data import corpus as corpus_lib
from longnet_jax.data import windows

_SEPARATOR = 99
_LENGTHS = (5, 1, 12, 3, 7, 20)


def _corpus(lengths=_LENGTHS) -> corpus_lib.Corpus:
  """Documents whose tokens 0, 1, 2, ... are all different."""
  counter = itertools.count()
  tokens, starts = [], []
  for length in lengths:
    starts.append(len(tokens))
    tokens += [_SEPARATOR, *(next(counter) for _ in range(length))]
  return corpus_lib.Corpus(
    np.array([*tokens, _SEPARATOR], np.uint16), np.array(starts), "test"
  )


def _windows(window=8, layout="packed", seed=0, lengths=_LENGTHS):
  return windows.Windows(
    _corpus(lengths),
    window=window,
    layout=layout,
    seed=seed,
    separator_id=_SEPARATOR,
  )


def _epoch(source, batch_size=3):
  batches = [
    source.batch(step, batch_size, shuffled=False)
    for step in range(source.num_batches(batch_size))
  ]
  return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def _oracle_places(tokens, weights):
  """Segment ids and positions of one window, token by token."""
  segment, position, segments, positions = 1, -1, [], []
  for i, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
    is_new = token == _SEPARATOR and i > 0
    segment, position = (segment + 1, 0) if is_new else (segment, position + 1)
    segments.append(segment if weight else 0)
    positions.append(position if weight else 0)
  return segments, positions


@pytest.mark.parametrize("layout", ["packed", "long", "stream"])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 19])
def test_every_token_is_the_target_of_its_predecessor_once(window, layout):
  tokens = _corpus().tokens
  epoch = _epoch(_windows(window, layout))
  real = epoch["weights"] == 1
  np.testing.assert_array_equal(epoch["tokens"][real], tokens[:-1])
  np.testing.assert_array_equal(epoch["targets"][real], tokens[1:])
  assert np.all(epoch["weights"][~real] == 0)
  assert np.all(epoch["tokens"][~real] == _SEPARATOR)


@pytest.mark.parametrize("layout", ["packed", "long"])
def test_segments_and_positions_restart_with_each_document(layout):
  epoch = _epoch(_windows(9, layout))
  for row in range(len(epoch["tokens"])):
    segments, positions = _oracle_places(
      epoch["tokens"][row], epoch["weights"][row]
    )
    assert epoch["segment_ids"][row].tolist() == segments
    assert epoch["positions"][row].tolist() == positions


def test_long_windows_hold_one_document():
  source = _windows(6, "long")
  assert source.num_windows == sum(-(-(n + 1) // 6) for n in _LENGTHS)
  assert _epoch(source)["segment_ids"].max() == 1


def test_a_stream_is_the_corpus_in_order_again_and_again():
  source, tokens = _windows(8, "stream"), _corpus().tokens
  epoch = [source.batch(i, 1) for i in range(2 * source.num_windows)]
  real = [batch["targets"][batch["weights"] > 0] for batch in epoch]
  np.testing.assert_array_equal(np.concatenate(real), [*tokens[1:]] * 2)
  assert set(epoch[0]) == {"tokens", "targets", "weights", "positions"}
  assert epoch[1]["positions"][0].tolist() == list(range(8))


def test_types_and_shapes():
  batch = _windows().batch(0, 4)
  assert {key: (a.dtype.name, a.shape) for key, a in batch.items()} == {
    "tokens": ("int32", (4, 8)),
    "targets": ("int32", (4, 8)),
    "weights": ("float32", (4, 8)),
    "segment_ids": ("int32", (4, 8)),
    "positions": ("int32", (4, 8)),
  }


@pytest.mark.parametrize("layout", ["packed", "long", "stream"])
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_batch_is_the_same_on_1_2_and_4_hosts(layout, shuffled):
  source = _windows(5, layout)
  for step in (0, 1, 7, 1000):
    whole = source.batch(step, 8, shuffled=shuffled)
    for count in (2, 4):
      parts = [
        source.batch(step, 8, host_index=i, host_count=count, shuffled=shuffled)
        for i in range(count)
      ]
      assert all(len(part["tokens"]) == 8 // count for part in parts)
      for key, array in whole.items():
        joined = np.concatenate([part[key] for part in parts])
        np.testing.assert_array_equal(array, joined)


def test_a_batch_depends_on_the_step_alone():
  first, again = _windows(), _windows()
  expected = [first.batch(step, 4)["tokens"] for step in range(10)]
  for step in (9, 3, 5):
    np.testing.assert_array_equal(
      again.batch(step, 4)["tokens"], expected[step]
    )


def test_shuffled_epochs_hold_every_window_in_a_new_order():
  source = _windows(4)
  count = source.num_windows
  order = _epoch(source, batch_size=1)["targets"].tolist()
  rows = [source.batch(i, 1)["targets"][0].tolist() for i in range(3 * count)]
  epochs = [rows[i * count : (i + 1) * count] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(order)
  assert len({str(epoch) for epoch in [*epochs, order]}) == 4
  other = _windows(4, seed=1)
  assert rows[:count] != [
    other.batch(i, 1)["targets"][0].tolist() for i in range(count)
  ]


def test_rows_past_the_last_window_have_no_weight():
  source = _windows(8)
  batch = source.batch(0, source.num_windows + 3, shuffled=False)
  assert np.all(batch["weights"][-3:] == 0)
  assert np.all(batch["segment_ids"][-3:] == 0)
  assert np.all(batch["weights"][: source.num_windows].sum(1) > 0)


def test_one_document_of_one_token_is_a_padded_window():
  batch = _windows(8, lengths=(1,)).batch(5, 2)
  expected = {
    "tokens": [_SEPARATOR, 0],
    "targets": [0, _SEPARATOR],
    "weights": [1, 1],
    "segment_ids": [1, 1],
    "positions": [0, 1],
  }
  for key, start in expected.items():
    for row in batch[key]:
      assert row[:2].tolist() == start
  assert np.all(batch["weights"][:, 2:] == 0)


def test_a_window_longer_than_any_document_is_refused_when_long():
  assert _windows(21, "long").num_windows == len(_LENGTHS)
  with pytest.raises(ValueError, match="window is 22.*has 21 tokens.*packed"):
    _windows(22, "long")


def test_a_batch_that_hosts_cannot_share_is_refused():
  with pytest.raises(ValueError, match="batch_size is 6.*multiple of the 4"):
    _windows().batch(0, 6, host_count=4)


def test_fingerprints_differ_with_the_windows():
  layouts = {"layout": "long"}, {"layout": "stream"}
  settings = [{}, {"window": 9}, *layouts, {"seed": 1}]
  assert len({_windows(**s).fingerprint for s in settings}) == 5
  assert _windows().fingerprint == _windows().fingerprint
