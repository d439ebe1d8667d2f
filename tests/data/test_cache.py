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


def test_a_full_disk_names_the_folder(tmp_path):
  def build(folder):
    with open("/dev/full", "w") as file:
      file.write("text")

  with pytest.raises(OSError, match="No space left .*thing'"):
    cache.build_once(tmp_path / "thing", build)


def test_what_a_killed_build_left_is_removed(tmp_path):
  (tmp_path / "thing.partial").mkdir()
  (tmp_path / "thing.partial" / "stale").touch()
  cache.build_once(tmp_path / "thing", lambda folder: None)
  (file,) = (tmp_path / "thing").iterdir()
  assert file.name == "checksums.json"


def _flip(path):
  content = bytearray(path.read_bytes())
  content[2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda folder: _flip(folder / "file"), "the bytes of file have changed"),
    (lambda folder: (folder / "file").write_bytes(b""), "the bytes of file"),
    (lambda folder: (folder / "file").unlink(), "it has no file"),
    (lambda folder: (folder / "checksums.json").unlink(), "it has no checksum"),
    (
      lambda folder: (folder / "checksums.json").write_text("[1]"),
      "checksums.json cannot be read",
    ),
    (
      lambda folder: (folder / "checksums.json").write_bytes(b"\xff{"),
      "checksums.json cannot be read",
    ),
  ],
)
def test_what_is_damaged_is_built_again_in_one_line(
  tmp_path, capsys, damage, message
):
  path = tmp_path / "thing"

  def build():
    cache.build_once(path, lambda folder: (folder / "file").write_text("text"))

  build()
  assert not capsys.readouterr().err
  damage(path)
  build()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"'{path}' is damaged ({message}")
  assert (path / "file").read_text() == "text"
  build()
  assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="set data_dir or cache_dir") as error:
    cache.build_once(tmp_path / "file" / "thing", lambda folder: None)
  assert str(tmp_path / "file") in str(error.value)
