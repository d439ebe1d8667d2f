import json
import pathlib

import pytest

from longnet_jax import storage
from longnet_jax.data import cache, mirror
from longnet_jax.data import config as config_lib


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that takes the place of gs://bucket, and a cache of its own."""
  path = storage.path
  stands_for = lambda name: (
    tmp_path / str(name)[5:] if str(name).startswith("gs://") else path(name)
  )
  monkeypatch.setattr(storage, "path", stands_for)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  write = storage.write_whole

  def write_below(where, content):
    where.parent.mkdir(parents=True, exist_ok=True)  # which buckets need not
    write(where, content)

  monkeypatch.setattr(storage, "write_whole", write_below)
  return tmp_path / "bucket"


@pytest.fixture
def here(tmp_path):
  """The folder on this machine that stands for gs://bucket/data."""
  folder = tmp_path / "cache" / "longnet_jax" / "buckets" / "gs" / "bucket"
  (folder / "data").mkdir(parents=True)
  return folder / "data"


def _build(folder: pathlib.Path):
  (folder / "tokens.bin").write_bytes(b"1234")


def test_what_is_built_goes_to_the_bucket_and_comes_back(bucket, here):
  cache.build_once(here / "built", _build)
  assert (bucket / "data" / "built" / "tokens.bin").read_bytes() == b"1234"
  (here / "built").rename(here / "of another host")
  cache.build_once(here / "built", pytest.fail)
  assert (here / "built" / "tokens.bin").read_bytes() == b"1234"


def test_what_was_not_wholly_sent_is_built_again(bucket, here):
  cache.build_once(here / "built", _build)
  (here / "built").rename(here / "of another host")
  (bucket / "data" / "built" / "contents.json").unlink()
  assert not mirror.fetch(here / "built")
  cache.build_once(here / "built", _build)
  contents = (bucket / "data" / "built" / "contents.json").read_text()
  assert json.loads(contents)["tokens.bin"] == 4


def test_a_file_of_another_size_is_refused(bucket, here):
  cache.build_once(here / "built", _build)
  (here / "built").rename(here / "of another host")
  (bucket / "data" / "built" / "tokens.bin").write_bytes(b"123")
  with pytest.raises(storage.StorageError, match="tokens.bin has 3 bytes"):
    mirror.fetch(here / "built")


def test_a_folder_of_this_machine_is_itself(tmp_path):
  config = config_lib.DataConfig(data_dir=str(tmp_path))
  assert cache.data_root(config) == tmp_path
  assert cache.token_root(config) == tmp_path / "longnet_tokens"
  assert not mirror.fetch(tmp_path)
