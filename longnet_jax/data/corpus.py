"""The tokens of a split in one memory-mapped file."""

import hashlib
import io
import pathlib
from typing import NamedTuple

import numpy as np

from longnet_jax import checked
from longnet_jax.data import cache, tokenizers
from longnet_jax.data import config as config_lib
from longnet_jax.data import documents as documents_lib


class Corpus(NamedTuple):
  """All documents of a split, one behind the other.

  A separator stands before each document and one after the last, so that the
  successor of every token is the next one of the array: of the last token of a
  document, a separator.
  """

  tokens: np.ndarray  # (n,) unsigned
  starts: np.ndarray  # (documents,) int64: positions of separators but the last
  fingerprint: str  # hex; of dataset, split and tokenizer


def open_corpus(
  config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer, split: str
) -> Corpus:
  """The tokens of a split; made and stored on the first call.

  Raises ValueError for a split that does not exist or has no documents.
  """
  documents = documents_lib.Documents(config)
  key = f"{documents.fingerprint} {split} {tokenizer.fingerprint}"
  fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

  def build(folder: pathlib.Path):
    starts, position = [], 0
    with open(folder / "tokens.bin", "wb") as file:
      for text in documents.read(split):
        tokens = tokenizer.encode(text).astype(dtype)
        file.write(dtype.type(tokenizer.separator_id).tobytes())
        file.write(tokens.tobytes())
        starts.append(position)
        position += 1 + len(tokens)
      file.write(dtype.type(tokenizer.separator_id).tobytes())
    if not starts:
      raise checked.RefusedError(
        f"split {split!r} of {documents.name} is empty; choose a larger "
        f"{split}_fraction or more documents"
      )
    content = io.BytesIO()  # as NumPy does not say why it cannot write
    np.save(content, np.array(starts, np.int64))
    (folder / "starts.npy").write_bytes(content.getvalue())

  path = cache.token_root(config) / fingerprint
  cache.build_once(path, build)
  return Corpus(
    tokens=np.memmap(path / "tokens.bin", dtype, mode="r"),
    starts=np.load(path / "starts.npy", mmap_mode="r"),
    fingerprint=fingerprint,
  )


def bpe_tokenizer(config: config_lib.DataConfig) -> tokenizers.Tokenizer:
  """BPE of the training split; trained and stored on the first call."""
  documents = documents_lib.Documents(config)
  key = f"{documents.fingerprint} bpe {config.bpe_vocab_size}"
  path = (
    cache.token_root(config) / hashlib.sha256(key.encode()).hexdigest()[:16]
  )

  def build(folder: pathlib.Path):
    texts = documents.read("train")
    bpe = tokenizers.train_bpe(texts, config.bpe_vocab_size)
    bpe.save(folder / "tokenizer.json")

  cache.build_once(path, build)
  return tokenizers.load(path / "tokenizer.json")
