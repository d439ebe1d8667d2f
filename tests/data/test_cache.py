import pytest

from longnet_jax.data import cache


def test_builds_once(tmp_path):
  calls = []

  def build(folder):
    calls.append(folder)
    (folder / "file").write_text("text")

  for _ in range(2):
    cache.build_once(tmp_path / "new" / "thing", build)
  assert len(calls) == 1
  assert (tmp_path / "new" / "thing" / "file").read_text() == "text"


def test_a_failed_build_leaves_nothing(tmp_path):
  def build(folder):
    (folder / "file").write_text("half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.build_once(tmp_path / "thing", build)
  assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_what_a_killed_build_left_is_removed(tmp_path):
  (tmp_path / "thing.partial").mkdir()
  (tmp_path / "thing.partial" / "stale").touch()
  cache.build_once(tmp_path / "thing", lambda folder: None)
  assert list((tmp_path / "thing").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="set data_dir or cache_dir") as error:
    cache.build_once(tmp_path / "file" / "thing", lambda folder: None)
  assert str(tmp_path / "file") in str(error.value)
