import pathlib
import signal
import subprocess
import sys
import sysconfig

import pytest

from longnet_jax import checked, storage
from longnet_jax.data import config as config_lib
from longnet_jax.data import documents as documents_lib
from longnet_jax.data import source_code


def _write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return root


def _folder(root: pathlib.Path, count: int = 40) -> pathlib.Path:
  return _write(
    root, {f"m{i}.py": b"x = %d\n" % i * (i + 1) for i in range(count)}
  )


def _config(folder, data_dir, **settings) -> config_lib.DataConfig:
  return config_lib.DataConfig(
    folder=str(folder), data_dir=str(data_dir), **settings
  )


def _read(config) -> dict[str, list[bytes]]:
  documents = documents_lib.Documents(config)
  return {split: sorted(documents.read(split)) for split in config_lib.SPLITS}


def _scan(folder, include=("*.py",), exclude=("test", ".*")):
  return source_code.scan(str(folder), include, exclude)


def test_every_byte_of_every_file_is_read_back(tmp_path):
  folder = _folder(tmp_path / "src")
  _write(folder, {"latin.py": b"# caf\xe9 \xff\xfe\n", "cr.py": b"\r\n\x1a"})
  splits = _read(_config(folder, tmp_path / "data"))
  assert all(splits.values())
  texts = sorted(sum(splits.values(), []))
  assert texts == sorted(path.read_bytes() for path in folder.iterdir())


def test_scan_leaves_out_excluded_empty_and_other_files(tmp_path):
  files = {
    "b.py": b"b",
    "a/z.py": b"z",
    "a/test/t.py": b"t",
    ".git/g.py": b"g",
    "a/b/c.py": b"c",
    "a/notes.txt": b"n",
    "empty.py": b"",
  }
  scanned = _scan(_write(tmp_path, files))
  assert [file.path for file in scanned] == ["a/b/c.py", "a/z.py", "b.py"]


def test_the_default_folder_is_real_code_without_tests():
  config = config_lib.DataConfig()
  folder = sysconfig.get_path("stdlib")
  paths = {f.path for f in _scan(folder, config.include, config.exclude)}
  assert {"ast.py", "json/decoder.py"} <= paths
  parts = {part for path in paths for part in path.split("/")}
  assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages"})


def test_repositories_are_joined_in_path_order(tmp_path):
  files = {
    "pack/b.py": b"second",
    "pack/a/x.py": b"first",
    "pack/c.py": b"third\n",
    "pack/__init__.py": b"",
  } | {f"single{i}.py": b"%d" % i for i in range(9)}
  folder = _write(tmp_path / "src", files)
  splits = _read(_config(folder, tmp_path / "data", level="repository"))
  texts = sum(splits.values(), [])
  assert len(texts) == 10
  assert b"first\nsecond\nthird\n" in texts


def _split_by_name(folder, level, validation=0.3, test=0.2) -> dict[str, str]:
  documents = source_code.group(_scan(folder), level)
  splits = source_code.split_documents(documents, validation, test)
  return {
    document.name: split
    for split, inside in splits.items()
    for document in inside
  }


def test_identical_files_are_on_one_side(tmp_path):
  folder = _folder(tmp_path)
  copies = {f"copy/{p.name}": p.read_bytes() for p in folder.glob("*.py")}
  by_name = _split_by_name(_write(folder, copies), "file")
  assert len(by_name) == 80
  assert set(by_name.values()) == set(config_lib.SPLITS)
  for name in copies:
    assert by_name[name] == by_name[pathlib.Path(name).name]


def test_repositories_that_share_a_file_are_on_one_side(tmp_path):
  files = {}
  for i in range(40):
    # Chains of four: 4k - 4k+1 - 4k+2 - 4k+3 share files pairwise.
    files[f"p{i}/own.py"] = b"own %d" % i
    files[f"p{i}/__init__.py"] = b"\n"
    files[f"p{i}/left.py"] = b"link %d" % (i if i % 4 else -i)
    files[f"p{i}/right.py"] = b"link %d" % (i + 1 if i % 4 != 3 else -100 - i)
  by_name = _split_by_name(_write(tmp_path, files), "repository")
  assert set(by_name.values()) == set(config_lib.SPLITS)
  for i in range(0, 40, 4):
    assert len({by_name[f"p{j}"] for j in range(i, i + 4)}) == 1


def test_a_split_does_not_move_when_others_come_or_are_renamed(tmp_path):
  folder = _folder(tmp_path)
  before = _split_by_name(folder, "file")
  _write(folder, {f"new{i}.py": b"new %d" % i for i in range(20)})
  after = _split_by_name(folder, "file")
  assert before == {name: after[name] for name in before}
  (folder / "m3.py").rename(folder / "renamed.py")
  assert _split_by_name(folder, "file")["renamed.py"] == before["m3.py"]


def test_small_folders_fill_every_split_and_too_small_ones_are_refused(
  tmp_path,
):
  folder = _folder(tmp_path, count=3)
  by_name = _split_by_name(folder, "file", 0.001, 0.001)
  assert set(by_name.values()) == set(config_lib.SPLITS)
  (folder / "m2.py").write_bytes((folder / "m1.py").read_bytes())
  with pytest.raises(ValueError, match="2 different document.*3 splits"):
    _split_by_name(folder, "file")
  assert set(_split_by_name(folder, "file", 0.5, 0).values()) == {
    "train",
    "validation",
  }


def test_changed_content_is_another_dataset(tmp_path):
  folder = _folder(tmp_path / "src")
  config = _config(folder, tmp_path / "data")
  paths = set()
  for content in (b"one", b"two", b"one"):
    (folder / "m0.py").write_bytes(content)
    paths.add(source_code.builder(config).data_path)
    assert content in sum(_read(config).values(), [])
  assert len(paths) == 2


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "holds no file that is not empty and matches include ('*.py',)"),
    ({"a.py": b""}, "holds no file that is not empty"),
    ({"a.txt": b"text"}, "choose another folder or pattern"),
    (
      {"a/b.py": b"\x7fELF\0"},
      "'a/b.py' in folder {folder} is a binary file (zero byte at 4); "
      "add 'b.py' to exclude",
    ),
  ],
)
def test_unusable_folders_are_named_and_nothing_is_written(
  tmp_path, files, message
):
  folder = tmp_path / "src"
  folder.mkdir()
  with pytest.raises(ValueError) as error:
    source_code.builder(_config(_write(folder, files), tmp_path / "data"))
  assert message.format(folder=repr(str(folder))) in str(error.value)
  assert not (tmp_path / "data").exists()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match="must be an existing folder"):
    source_code.builder(_config(tmp_path / "no", tmp_path / "data"))


def test_a_file_that_changes_while_read_stops_the_build(tmp_path, monkeypatch):
  folder = _folder(tmp_path / "src")
  scan = source_code.scan

  def scan_then_change(*arguments):
    files = scan(*arguments)
    (folder / "m5.py").write_bytes(b"changed")
    return files

  monkeypatch.setattr(source_code, "scan", scan_then_change)
  with pytest.raises(ValueError, match=r"m5.py' changed while read"):
    source_code.builder(_config(folder, tmp_path / "data"))
  assert not list((tmp_path / "data").rglob("*.array_record*"))


_KILLED = """
import os, signal, sys
from longnet_jax.data import config, source_code
read, calls = source_code._read, []

def read_some(*arguments):
  calls.append(arguments)
  if len(calls) == 20:
    os.kill(os.getpid(), signal.SIGKILL)
  return read(*arguments)

source_code._read = read_some
source_code.builder(config.DataConfig(folder=sys.argv[1], data_dir=sys.argv[2]))
"""


def test_a_killed_build_leaves_nothing_half_written(tmp_path):
  folder = _folder(tmp_path / "src")
  data_dir = tmp_path / "data"
  killed = subprocess.run([sys.executable, "-c", _KILLED, folder, data_dir])
  assert killed.returncode == -signal.SIGKILL
  assert documents_lib.prepared(str(data_dir)) == {}
  left = list(data_dir.rglob("incomplete.*"))
  assert left
  assert len(sum(_read(_config(folder, data_dir)).values(), [])) == 40
  assert not list(data_dir.rglob("incomplete.*"))


def test_links_to_folders_are_left_out_and_said(tmp_path, capsys):
  real = _folder(tmp_path / "elsewhere", 3)
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  (corpus / "repository").symlink_to(real)
  message = "1 links to folders are left out, the first is .*repository"
  with pytest.raises(checked.RefusedError, match=message):
    _scan(corpus)
  _write(corpus, {"a.py": b"a"})
  assert [file.path for file in _scan(corpus)] == ["a.py"]
  assert "1 links to folders are left out" in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["No space left on device", "a defect"])
def test_a_full_disk_is_no_defect(tmp_path, monkeypatch, reason):
  def prepare(self):
    raise RuntimeError(f"Failed to finalize writing: write() failed: {reason};")

  monkeypatch.setattr(source_code.SourceCode, "download_and_prepare", prepare)
  config = _config(_folder(tmp_path / "src", 3), tmp_path / "data")
  full = pytest.raises(storage.StorageError, match="data': No space .*data_dir")
  defect = pytest.raises(RuntimeError, match="a defect")
  with defect if reason == "a defect" else full:
    documents_lib.Documents(config)
