"""Fixed windows of a corpus, addressed by number."""

import hashlib

import grain
import numpy as np

from longnet_jax import checked
from longnet_jax.data import corpus as corpus_lib


class Windows:
  """Windows of `window` positions; implements `pipeline.Source`.

  `packed` cuts the whole corpus in sequence: a window holds the end of one
  document, whole ones and the start of another. `long` cuts every document
  by itself. `stream` cuts as `packed` does, but keeps the order, and tells no
  document from the next: its batches have no `segment_ids`. Each token of the
  corpus is the target of exactly one position of an epoch; the rest of a last
  window is padding of weight 0.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    *,
    window: int,
    layout: str,
    seed: int,
    separator_id: int,
  ):
    self.window = window
    self._tokens = corpus.tokens
    self._separator_id = separator_id
    last = len(corpus.tokens) - 1
    self._is_stream = layout == "stream"
    if layout in ("packed", "stream"):
      self._bounds = np.array([0, last])
    else:
      self._bounds = np.append(corpus.starts, last)
      _check_longest(int(np.diff(self._bounds).max()), window)
    counts = -(-np.diff(self._bounds) // window)
    self._first_window = np.append(0, np.cumsum(counts))
    self.num_windows = int(self._first_window[-1])
    order = grain.MapDataset.range(self.num_windows).seed(seed)
    if not self._is_stream:
      order = order.shuffle()
    self._order = order.repeat()
    identity = f"{corpus.fingerprint} {window} {layout} {seed}"
    self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

  def num_batches(self, batch_size: int) -> int:
    """Batches that hold every window once."""
    return -(-self.num_windows // batch_size)

  def batch(
    self,
    step: int,
    batch_size: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    shuffled: bool = True,
  ) -> dict[str, np.ndarray]:
    """This host's rows of batch `step`, as `pipeline.Source` says."""
    numbers = row_numbers(step, batch_size, host_index, host_count)
    inputs = np.full((len(numbers), self.window), self._separator_id, np.int32)
    targets = inputs.copy()
    weights = np.zeros((len(numbers), self.window), np.float32)
    for row, number in enumerate(numbers):
      if not shuffled and number >= self.num_windows:
        continue
      begin, end = self._span(self._order[number] if shuffled else number)
      inputs[row, : end - begin] = self._tokens[begin:end]
      targets[row, : end - begin] = self._tokens[begin + 1 : end + 1]
      weights[row, : end - begin] = 1
    batch = {"tokens": inputs, "targets": targets, "weights": weights}
    if self._is_stream:
      places = np.arange(self.window, dtype=np.int32)
      return {**batch, "positions": np.where(weights > 0, places, 0)}
    return {**batch, **_places(inputs == self._separator_id, weights > 0)}

  def _span(self, number: int) -> tuple[int, int]:
    """First position of a window in the corpus, and the one past its last."""
    part = np.searchsorted(self._first_window, number, side="right") - 1
    offset = (number - self._first_window[part]) * self.window
    begin = int(self._bounds[part] + offset)
    return begin, min(begin + self.window, int(self._bounds[part + 1]))


def row_numbers(
  step: int, batch_size: int, host_index: int, host_count: int
) -> range:
  """Numbers of a host's rows of batch `step` in the endless sequence."""
  if batch_size % host_count:
    raise checked.RefusedError(
      f"batch_size is {batch_size}; it must be a multiple of the "
      f"{host_count} hosts"
    )
  rows = batch_size // host_count
  first = step * batch_size + host_index * rows
  return range(first, first + rows)


def _places(starts: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
  """Segment numbers from 1 and positions from 0, both (b, T); 0 at padding."""
  starts = starts.copy()
  starts[:, 0] = True
  places = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
  last_start = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
  return {
    "segment_ids": np.where(real, np.cumsum(starts, axis=1), 0).astype(
      np.int32
    ),
    "positions": np.where(real, places - last_start, 0).astype(np.int32),
  }


def _check_longest(longest: int, window: int):
  if longest < window:
    raise checked.RefusedError(
      f"window is {window}, but the longest document of the split has "
      f"{longest} tokens; choose a window of at most {longest}, or layout "
      "'packed'"
    )
