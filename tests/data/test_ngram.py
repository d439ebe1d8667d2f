import collections
import math

import numpy as np
import pytest

from longnet_jax.data import ngram

_SEPARATOR = 256


def _corpus(*documents: bytes) -> np.ndarray:
  tokens = [t for d in documents for t in (_SEPARATOR, *d)]
  return np.array([*tokens, _SEPARATOR], np.uint16)


def _contexts(corpus):
  """(two symbols before, target) for each target."""
  tokens = corpus.tolist()
  for i in range(len(tokens) - 1):
    now = tokens[i]
    before = _SEPARATOR if now == _SEPARATOR else tokens[i - 1]
    yield (before, now), tokens[i + 1]


def _slow_bits_per_byte(train, validation):
  """Witten-Bell by dictionaries, one symbol at a time."""
  follow = collections.defaultdict(collections.Counter)
  for context, target in _contexts(train):
    for n in range(3):
      follow[context[2 - n :]][target] += 1

  def probability(context, target):
    seen = follow[context]
    lower = probability(context[1:], target) if context else 1 / 257
    if not seen:
      return lower
    share = seen[target] + len(seen) * lower
    return share / (seen.total() + len(seen))

  bits = -sum(math.log2(probability(c, t)) for c, t in _contexts(validation))
  return bits / sum(t != _SEPARATOR for t in validation.tolist())


@pytest.mark.parametrize("chunk", [2**24, 30, 1])
def test_equals_the_slow_model(monkeypatch, chunk):
  random = np.random.default_rng(0)
  documents = [
    bytes(random.choice([0, 97, 98, 255], n, p=[0.1, 0.5, 0.3, 0.1]))
    for n in (40, 1, 25, 30)
  ]
  train, validation = _corpus(*documents[:3]), _corpus(documents[3], b"new")
  monkeypatch.setattr(ngram, "_CHUNK", chunk)
  if chunk == 1:  # each chunk counts 17 million bins: few of them suffice
    train = train[:4]
  actual = ngram.bits_per_byte(train, validation)
  np.testing.assert_allclose(
    actual, _slow_bits_per_byte(train, validation), rtol=1e-12
  )
