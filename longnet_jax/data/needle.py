"""Recall of a value planted at a chosen distance: a test of reach."""

import hashlib

import numpy as np

from longnet_jax.data import config as config_lib
from longnet_jax.data import windows

_MARK = ord("=")
_DIGITS = np.frombuffer(b"0123456789", np.uint8)
_FILLER = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


class Needle:
  """Windows of random letters with "=1234" inside; implements `Source`.

  A window ends with "=" and then asks for the digits: only these targets have
  weight 1. A digit stands `distance` tokens before its recall. Guessing scores
  ln 10 nats; nothing but attention over that distance scores less.
  """

  def __init__(self, config: config_lib.DataConfig, split: str):
    self.window = config.window
    self.num_windows = config.needle_windows
    self._digits = config.needle_digits
    self._distances = config.needle_distances
    self._seed = (config.seed, config_lib.SPLITS.index(split))
    identity = repr((self.window, self._digits, self._distances, self._seed))
    self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

  def num_batches(self, batch_size: int) -> int:
    """Batches that hold every window of a held-out split once."""
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
    """As `pipeline.Source`; shuffled windows never repeat."""
    numbers = windows.row_numbers(step, batch_size, host_index, host_count)
    texts = np.stack([self._text(number) for number in numbers])
    shape = (len(numbers), self.window)
    weights = np.zeros(shape, np.float32)
    weights[:, -self._digits :] = 1
    segment_ids = np.ones(shape, np.int32)
    if not shuffled:
      beyond = np.array(numbers) >= self.num_windows
      weights[beyond] = 0
      segment_ids[beyond] = 0
    positions = np.arange(self.window, dtype=np.int32)
    return {
      "tokens": texts[:, :-1],
      "targets": texts[:, 1:],
      "weights": weights,
      "segment_ids": segment_ids,
      "positions": positions * segment_ids,
    }

  def _text(self, number: int) -> np.ndarray:
    """Window `number` and its last target, (T + 1,) int32."""
    random = np.random.default_rng((*self._seed, number))
    text = random.choice(_FILLER, self.window + 1)
    needle = np.append(_MARK, random.choice(_DIGITS, self._digits))
    recall = self.window - self._digits
    planted = recall - random.choice(self._distances)
    for place in (planted, recall):
      text[place : place + len(needle)] = needle
    return text.astype(np.int32)
