import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from longnet_jax.data import config as config_lib
from longnet_jax.data import needle, pipeline, tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("src")
  for i in range(30):
    text = b"def f%d(x):\n  return '\xff\xc3' + x * %d\n" % (i, i)
    (root / f"m{i}.py").write_bytes(text * (i + 1))
  return root


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
  return config_lib.DataConfig(
    folder=str(folder),
    data_dir=str(tmp_path_factory.mktemp("data")),
    validation_fraction=0.2,
    test_fraction=0.2,
    bpe_vocab_size=280,
    window=50,
  )


def _texts(source, tokenizer) -> list[bytes]:
  """The documents of a source, from the targets of one epoch."""
  targets, weights = [], []
  for step in range(source.num_batches(4)):
    batch = source.batch(step, 4, shuffled=False)
    targets.append(batch["targets"].reshape(-1))
    weights.append(batch["weights"].reshape(-1))
  tokens = np.concatenate(targets)[np.concatenate(weights) == 1]
  ends = np.flatnonzero(tokens == tokenizer.separator_id)
  return [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("layout", ["packed", "long"])
def test_windows_hold_every_byte_of_the_folder(config, folder, kind, layout):
  config = dataclasses.replace(config, tokenizer=kind, layout=layout)
  tokenizer = pipeline.make_tokenizer(config)
  splits = [
    _texts(pipeline.make_source(config, tokenizer, split), tokenizer)
    for split in config_lib.SPLITS
  ]
  assert all(splits)
  read = sorted(text for texts in splits for text in texts)
  assert read == sorted(path.read_bytes() for path in folder.iterdir())


def test_bytes_of_the_targets_are_exact_for_bpe(config):
  config = dataclasses.replace(config, tokenizer="bpe")
  tokenizer = pipeline.make_tokenizer(config)
  source = pipeline.make_source(config, tokenizer, "test")
  batch = source.batch(0, source.num_windows, shuffled=False)
  counted = (batch["weights"] * tokenizer.byte_lengths[batch["targets"]]).sum()
  assert counted == sum(map(len, _texts(source, tokenizer)))
  assert (batch["weights"]).sum() < counted


def test_the_tokenizer_is_trained_once_and_not_on_held_out_text(
  config, monkeypatch
):
  config = dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=270)
  seen = []
  train = tokenizers.train_bpe

  def spy(documents, vocab_size):
    seen.extend(documents)
    return train(seen, vocab_size)

  monkeypatch.setattr(tokenizers, "train_bpe", spy)
  first, again = (pipeline.make_tokenizer(config) for _ in range(2))
  assert first.fingerprint == again.fingerprint
  source = pipeline.make_source(config, first, "train")
  assert sorted(seen) == sorted(_texts(source, first))


def test_a_source_made_anew_goes_on_where_the_first_stopped(config):
  tokenizer = pipeline.make_tokenizer(config)
  first = pipeline.make_source(config, tokenizer, "train")
  again = pipeline.make_source(config, tokenizer, "train")
  assert first.fingerprint == again.fingerprint
  with contextlib.closing(
    pipeline.prefetched(again, 4, start=30, stop=34)
  ) as batches:
    for step, batch in enumerate(batches, start=30):
      for key, array in first.batch(step, 4).items():
        np.testing.assert_array_equal(batch[key], array)
  assert step == 33


def test_prefetching_ends_with_its_block_and_passes_errors_on(config):
  source = pipeline.make_source(config, tokenizers.ByteTokenizer(), "train")
  threads = set(threading.enumerate())
  with contextlib.closing(
    pipeline.prefetched(source, 4, start=0, stop=10**9)
  ) as batches:
    next(batches)
  for thread in set(threading.enumerate()) - threads:
    thread.join(timeout=60)
    assert not thread.is_alive()
  with pytest.raises(ValueError, match="batch_size is 3"):
    next(pipeline.prefetched(source, 3, start=0, stop=9, host_count=2))


def test_needles_come_through_the_same_door():
  config = config_lib.DataConfig(dataset="needle")
  source = pipeline.make_source(config, pipeline.make_tokenizer(config), "test")
  assert isinstance(source, needle.Needle)


def test_an_unknown_split_is_refused(config):
  with pytest.raises(ValueError, match="split is 'dev'; it must be one of"):
    pipeline.make_source(config, tokenizers.ByteTokenizer(), "dev")


def test_an_empty_split_is_refused_and_leaves_nothing(config, folder, tmp_path):
  prepared = pipeline.corpus.documents_lib.Documents(
    dataclasses.replace(config, validation_fraction=0, test_fraction=0)
  )
  tiny = dataclasses.replace(
    config,
    dataset=prepared.name.rsplit("/", 1)[0],
    validation_fraction=1e-9,
    cache_dir=str(tmp_path),
  )
  with pytest.raises(ValueError, match="split 'validation'.*is empty"):
    pipeline.make_source(tiny, tokenizers.ByteTokenizer(), "validation")
  left = [path.name for path in (tmp_path / "longnet_tokens").iterdir()]
  assert len(left) == 1
  assert left[0].endswith(".lock")


_BUILD = """
import json, sys
from longnet_jax.data import config, pipeline
config = config.DataConfig(
    folder=sys.argv[1], data_dir=sys.argv[2], tokenizer="bpe",
    bpe_vocab_size=280, window=50,
)
tokenizer = pipeline.make_tokenizer(config)
source = pipeline.make_source(config, tokenizer, "train")
print(json.dumps([
    tokenizer.fingerprint, source.fingerprint,
    source.batch(7, 4)["tokens"].tolist(),
]))
"""


def test_two_processes_may_build_at_once(folder, tmp_path):
  command = [sys.executable, "-c", _BUILD, folder, tmp_path]
  processes = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  printed = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  first, second = (json.loads(text) for text in printed)
  assert first == second
  left = {path.name for path in pathlib.Path(tmp_path).rglob("*")}
  assert not any("incomplete" in name or "partial" in name for name in left)


_KILLED = """
import os, signal, sys
from longnet_jax.data import config, pipeline, tokenizers
encode, calls = tokenizers.ByteTokenizer.encode, []

def encode_some(self, text):
  calls.append(text)
  if len(calls) == 5:
    os.kill(os.getpid(), signal.SIGKILL)
  return encode(self, text)

tokenizers.ByteTokenizer.encode = encode_some
config = config.DataConfig(folder=sys.argv[1], data_dir=sys.argv[2])
pipeline.make_source(config, tokenizers.ByteTokenizer(), "train")
"""


def test_a_build_killed_while_encoding_is_done_again(folder, tmp_path):
  killed = subprocess.run([sys.executable, "-c", _KILLED, folder, tmp_path])
  assert killed.returncode == -9
  assert list(tmp_path.glob("longnet_tokens/*.partial"))
  config = config_lib.DataConfig(
    folder=str(folder), data_dir=str(tmp_path), window=50
  )
  tokenizer = tokenizers.ByteTokenizer()
  texts = []
  for split in config_lib.SPLITS:
    texts += _texts(pipeline.make_source(config, tokenizer, split), tokenizer)
  assert sorted(texts) == sorted(p.read_bytes() for p in folder.iterdir())
  assert not list(tmp_path.glob("longnet_tokens/*.partial"))
