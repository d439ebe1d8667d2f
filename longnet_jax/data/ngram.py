"""Bits per byte of a byte-trigram model: what a trained model must beat."""

from collections.abc import Iterator

import numpy as np

_SYMBOLS = 257  # bytes and the separator
_SEPARATOR = 256
_CHUNK = 2**24


def bits_per_byte(train: np.ndarray, validation: np.ndarray) -> float:
  """Bits of all targets of `validation` over its number of bytes.

  Both are corpora of bytes with separators (256): the targets, the end of each
  document among them, are those of a language model on the same data.
  Witten-Bell smoothing, from the uniform distribution up to trigrams:

    p(c | h) = (n(h c) + d(h) p(c | h')) / (n(h) + d(h))

  n counts, d(h) is the number of different symbols seen behind h, and h' is h
  without its first symbol (Witten and Bell 1991; Chen and Goodman 1998).
  """
  counts = np.zeros(_SYMBOLS**3, np.int64)
  for numbers in _trigrams(train):
    counts += np.bincount(numbers, minlength=len(counts))
  counts = counts.reshape((_SYMBOLS,) * 3)
  uniform = np.full(_SYMBOLS, 1 / _SYMBOLS)
  unigram = _interpolate(counts.sum((0, 1)), uniform)
  bigram = _interpolate(counts.sum(0), unigram[None])
  trigram = _interpolate(counts, bigram[None]).reshape(-1)
  bits = -sum(
    np.log2(trigram[numbers]).sum() for numbers in _trigrams(validation)
  )
  return float(bits) / np.count_nonzero(validation != _SEPARATOR)


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
  """Witten-Bell estimate over the last axis; `lower` where none is seen."""
  distinct = np.maximum(np.count_nonzero(counts, axis=-1), 1)[..., None]
  total = counts.sum(-1)[..., None]
  return (counts + distinct * lower) / (total + distinct)


def _trigrams(tokens: np.ndarray) -> Iterator[np.ndarray]:
  """Chunks of numbers a * 257^2 + b * 257 + c, one for each target c.

  The symbol before the start of a document counts as a separator, so that a
  document tells nothing about the next.
  """
  for start in range(0, len(tokens) - 1, _CHUNK):
    # One symbol of context before the chunk, one target behind it.
    part = np.asarray(tokens[max(start - 1, 0) : start + _CHUNK + 1], np.int64)
    if start == 0:
      part = np.append(_SEPARATOR, part)
    before, now, target = part[:-2], part[1:-1], part[2:]
    before = np.where(now == _SEPARATOR, _SEPARATOR, before)
    yield (before * _SYMBOLS + now) * _SYMBOLS + target
