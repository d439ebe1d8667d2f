from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from longnet_jax.data import tokenizers

_CODE = b'def f(x):\n    """Returns x."""\n    return x + 1\n\n\n'
_DOCUMENTS = [_CODE * 5, "naïve = '日本語'\r\n\tπ\n".encode() * 3]


@pytest.fixture(scope="module")
def bpe():
  return tokenizers.train_bpe(_DOCUMENTS, 280)


@given(st.binary(max_size=300))
def test_bytes_round_trip(text):
  tokenizer = tokenizers.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.tolist() == list(text)
  assert tokenizer.decode(ids) == text


@given(text=st.binary(max_size=300) | st.text().map(str.encode))
def test_bpe_round_trips_any_bytes(bpe, text):
  ids = bpe.encode(text)
  assert ids.dtype == np.int32
  assert bpe.decode(ids) == text
  assert bpe.byte_lengths[ids].sum() == len(text)
  assert not np.any(ids == bpe.separator_id)


def test_all_bytes_survive_both():
  text = bytes(range(256)) * 3
  for tokenizer in (
    tokenizers.ByteTokenizer(),
    tokenizers.train_bpe([_CODE * 5], 258),
  ):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_texts_are_cut_and_round_trip(bpe, monkeypatch):
  monkeypatch.setattr(tokenizers, "_PIECE", 64)
  text = _CODE * 9 + b"no line break " * 20 + b"\xff" * 200
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert len(ids) < len(text)


def test_vocabularies(bpe):
  assert (bpe.vocab_size, bpe.separator_id) == (280, 279)
  assert bpe.byte_lengths[bpe.separator_id] == 0
  assert bpe.byte_lengths.max() > 1
  byte = tokenizers.ByteTokenizer()
  assert (byte.vocab_size, byte.separator_id) == (264, 256)
  assert byte.byte_lengths.tolist() == [1] * 256 + [0] * 8
  assert byte.decode([256, 97, 263]) == b"a"


def test_training_is_repeatable(bpe):
  again = tokenizers.train_bpe(_DOCUMENTS, 280)
  assert again.fingerprint == bpe.fingerprint
  other = tokenizers.train_bpe(_DOCUMENTS, 279)
  assert other.fingerprint != bpe.fingerprint


def test_save_and_load(bpe, tmp_path):
  for tokenizer in (bpe, tokenizers.ByteTokenizer()):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    text = _CODE + b"\xff\0"
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_empty_text(bpe):
  for tokenizer in (bpe, tokenizers.ByteTokenizer()):
    assert tokenizer.encode(b"").shape == (0,)
    assert tokenizer.decode([]) == b""


@pytest.mark.parametrize("ids", [[-1], [280], [0, 99999]])
def test_ids_outside_the_vocabulary_are_refused(bpe, ids):
  for tokenizer in (bpe, tokenizers.ByteTokenizer()):
    with pytest.raises(ValueError, match=rf"id {ids[-1]} is not in 0\.\."):
      tokenizer.decode(ids)


def test_too_few_merges_are_refused():
  with pytest.raises(ValueError, match="bpe_vocab_size is 9999.*choose that"):
    tokenizers.train_bpe(_DOCUMENTS, 9999)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"tokenizer": "bpe"}'])
def test_files_that_are_no_tokenizer_are_refused(tmp_path, text):
  path = tmp_path / "tokenizer.json"
  with pytest.raises(ValueError, match="no tokenizer at"):
    tokenizers.load(path)
  path.write_text(text)
  with pytest.raises(ValueError, match="is not a tokenizer file"):
    tokenizers.load(path)
