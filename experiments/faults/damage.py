"""Bytes that change: flipped, cut short, deleted, and worse."""

import pathlib
import random

KINDS = ("byte flipped", "cut short", "deleted")
# What readers of text and of headers fear.
_PAYLOADS = (
  b"[" * 100_000,
  b'{"a":' * 20_000,
  b"9" * 5_000,
  b"\xff\xfe\x00",
  b"\x00" * 64,
  b"NaN",
  b"-1",
  b"1e999",
  b"null",
  b'"',
)


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
  """Does one of KINDS to a file that is not empty."""
  content = bytearray(path.read_bytes())
  if kind == "deleted":
    path.unlink()
  elif kind == "cut short":
    path.write_bytes(content[: rng.randrange(max(len(content), 1))])
  else:
    if content:
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def mutated(content: bytes, rng: random.Random) -> bytes:
  """The content with one change, or at times up to four, of random kinds."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    data = rng.choice(_CHANGES)(data, rng)
  return bytes(data)


def _place(data, rng):
  """A position, most often near either end: there the headers are."""
  near = rng.choice((64, 1024, len(data)))
  place = rng.randrange(min(near, len(data)) + 1)
  return place if rng.random() < 0.5 else len(data) - place


def _flip(data, rng):
  if data:
    data[_place(data, rng) % len(data)] ^= 1 << rng.randrange(8)
  return data


def _set(data, rng):
  if data:
    data[_place(data, rng) % len(data)] = rng.randrange(256)
  return data


def _cut(data, rng):
  return data[: _place(data, rng)]


def _remove(data, rng):
  place = _place(data, rng)
  del data[place : place + rng.choice((1, 8, 512))]
  return data


def _repeat(data, rng):
  place = _place(data, rng)
  data[place:place] = data[place : place + rng.choice((1, 8, 512))]
  return data


def _insert(data, rng):
  place = _place(data, rng)
  data[place:place] = rng.choice(_PAYLOADS)
  return data


_CHANGES = (_flip, _flip, _set, _cut, _remove, _repeat, _insert)
