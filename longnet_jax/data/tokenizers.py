"""Bytes to token ids and back, exactly, for any bytes."""

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import json
import os
from typing import Protocol, runtime_checkable

from jaxtyping import Int
import numpy as np
import tokenizers

from longnet_jax import checked, storage


@runtime_checkable
class Tokenizer(Protocol):
  """Ids of text are below `separator_id`, which stands before a document."""

  vocab_size: int  # ids are in 0..vocab_size-1
  separator_id: int
  byte_lengths: np.ndarray  # (vocab_size,) int32: bytes an id stands for
  fingerprint: str  # hex; equal for tokenizers that encode alike

  def encode(self, text: bytes) -> Int[np.ndarray, " n"]:
    """Ids, int32; `decode` gives back the same bytes, whatever they are."""
    ...

  def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> bytes:
    """The bytes of the ids; separators and unused ids stand for none."""
    ...

  def save(self, path: str | os.PathLike):
    """Writes a file that `load` reads."""
    ...


class ByteTokenizer:
  """A byte is its own id; 256 separates, and 257..263 are never used.

  They bring the vocabulary to a multiple of eight, so that the output matrix
  can be sharded.
  """

  vocab_size = 264
  separator_id = 256
  fingerprint = "bytes"

  def __init__(self):
    self.byte_lengths = (np.arange(self.vocab_size) < 256).astype(np.int32)

  def encode(self, text: bytes) -> Int[np.ndarray, " n"]:
    """Ids, int32 of n bytes."""
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> bytes:
    """The bytes among the ids."""
    ids = _checked(ids, self.vocab_size)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def save(self, path: str | os.PathLike):
    """Writes a file that `load` reads."""
    _write(path, json.dumps({"tokenizer": "bytes"}))


class BpeTokenizer:
  """Byte-pair encoding over all 256 bytes; the last id is the separator.

  The library works on characters; a byte b is given to it as the character
  U+00b (Latin-1), so that invalid UTF-8 takes the same way as any other text.
  """

  def __init__(self, model: tokenizers.Tokenizer):
    self._model = model
    self._tokens = [
      model.id_to_token(i).encode("latin-1")
      for i in range(model.get_vocab_size())
    ] + [b""]
    self.vocab_size = len(self._tokens)
    self.separator_id = self.vocab_size - 1
    self.byte_lengths = np.array([len(t) for t in self._tokens], np.int32)
    self.fingerprint = hashlib.sha256(model.to_str().encode()).hexdigest()[:16]

  def encode(self, text: bytes) -> Int[np.ndarray, " n"]:
    """Ids, int32."""
    pieces = [piece.decode("latin-1") for piece in _pieces(text)]
    encodings = self._model.encode_batch(pieces)
    ids = [np.array(e.ids, np.int32) for e in encodings]
    return np.concatenate(ids) if ids else np.zeros(0, np.int32)

  def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> bytes:
    """The bytes of the ids."""
    ids = _checked(ids, self.vocab_size)
    return b"".join(self._tokens[i] for i in ids)

  def save(self, path: str | os.PathLike):
    """Writes a file that `load` reads."""
    _write(
      path, json.dumps({"tokenizer": "bpe", "model": self._model.to_str()})
    )


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> BpeTokenizer:
  """Learns merges until there are `vocab_size` ids, the separator included.

  Merges stay inside words, numbers, punctuation and white space (indentation
  after a line break is one such piece). Raises ValueError where the documents
  have too few pairs that occur twice.
  """
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(_WORDS), behavior="isolated"
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    min_frequency=2,
    initial_alphabet=[chr(byte) for byte in range(256)],
    show_progress=False,
  )
  pieces = (piece for document in documents for piece in _pieces(document))
  model.train_from_iterator((p.decode("latin-1") for p in pieces), trainer)
  if model.get_vocab_size() != vocab_size - 1:
    raise checked.RefusedError(
      f"bpe_vocab_size is {vocab_size}, but the training split has merges for "
      f"{model.get_vocab_size() + 1} ids only; choose that or less"
    )
  return BpeTokenizer(model)


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` wrote; ValueError if the file is not one."""
  try:
    return from_record(storage.read_json(storage.path(path)))
  except OSError as error:
    raise checked.RefusedError(
      f"no tokenizer at {str(path)!r}; put the tokenizer.json of the model "
      "there (experiments.import_weights does with --tokenizer=FILE)"
    ) from error
  except Exception as error:  # the library raises bare Exception on bad text
    raise checked.RefusedError(
      f"{str(path)!r} is not a tokenizer file; it must be one that a "
      "tokenizer's save() wrote"
    ) from error


def from_record(stored: dict) -> Tokenizer:
  """The tokenizer that `save` wrote, from its parsed JSON."""
  if stored["tokenizer"] == "bytes":
    return ByteTokenizer()
  return BpeTokenizer(tokenizers.Tokenizer.from_str(stored["model"]))


# Latin-1 letters include the bytes of UTF-8 characters beyond ASCII.
_WORDS = (
  r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+"
  r"|\r?\n[ \t]*|\s+(?!\S)|\s+"
)
_PIECE = 2**20


def _pieces(text: bytes) -> Iterator[bytes]:
  """Parts of about a megabyte, so that long texts encode in parallel.

  They end behind a line break where there is one; a function of the text alone.
  """
  start = 0
  while start < len(text):
    stop = start + _PIECE
    if stop < len(text):
      stop = text.rfind(b"\n", start, stop) + 1 or stop
    yield text[start:stop]
    start = stop


def _checked(ids, vocab_size: int) -> Int[np.ndarray, " n"]:
  ids = np.asarray(ids, np.int64).reshape(-1)
  wrong = ids[(ids < 0) | (ids >= vocab_size)]
  if wrong.size:
    raise checked.RefusedError(f"id {wrong[0]} is not in 0..{vocab_size - 1}")
  return ids


def _write(path: str | os.PathLike, text: str):
  """Writes a whole file or none."""
  storage.write_whole(storage.path(path), text)
