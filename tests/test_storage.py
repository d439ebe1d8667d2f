import pathlib

import pytest

from longnet_jax import storage


@pytest.mark.parametrize(
  "name, message",
  [
    ("ftp://host/run", "ftp:// is not known; use gs://, s3://"),
    ("gs:/bucket/run", "names no bucket; use gs://BUCKET"),
    ("s3:///run", "names no bucket"),
    (pathlib.Path("gs://bucket/run"), "names no bucket"),
    ("gs://bucket/run", r"needs gcsfs, .* pip install 'longnet-jax\[gcs\]'"),
    ("s3://bucket/run", r"needs s3fs, .* pip install 'longnet-jax\[s3\]'"),
    ("", "a path is ''; it must be a name such as runs/NAME"),
    ("a\0b", "a path is 'a.x00b'; it must be a name"),
    ("\ud800", "a path is '.ud800'; it must be a name"),
    ("~nobody-by-that-name/run", "names no user"),
  ],
  ids=str,
)
def test_what_cannot_be_reached_is_named(name, message, monkeypatch):
  monkeypatch.setattr(storage.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ValueError, match=message):
    storage.path(name)


def test_local_paths(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert storage.path("~/run") == tmp_path / "run"
  assert storage.path("a:b/c") == pathlib.Path("a:b/c")
  assert storage.absolute("run") == pathlib.Path.cwd() / "run"


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
  (tmp_path / "file.tmp").symlink_to("/dev/full")
  with pytest.raises(OSError) as caught:
    storage.write_whole(tmp_path / "file", "new")
  assert storage.said(caught.value) == (
    f"{tmp_path}/file: No space left on device; make room, then start again"
  )
  assert storage.failed(caught.value)
  error = FileNotFoundError(2, "No such file", "x")
  assert storage.said(error) == str(error) and not storage.failed(error)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  path.write_text("old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(storage.os, "replace", fail)
  with pytest.raises(OSError):
    storage.write_whole(path, "new")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
  assert path.read_text() == "old"


@pytest.mark.parametrize(
  "text", ["{", "\udcff", "[" * 100_000, "9" * 5000, "9" * 400]
)
def test_what_is_no_json_is_one_kind_of_error(tmp_path, text):
  path = tmp_path / "file"
  path.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(ValueError):
    storage.read_json(path)
