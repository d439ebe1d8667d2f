"""Folders that are built once and appear whole or not at all."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys

import tensorflow_datasets as tfds

from longnet_jax import storage
from longnet_jax.data import config as config_lib
from longnet_jax.data import mirror

_SUMS = "checksums.json"


def data_root(config: config_lib.DataConfig) -> pathlib.Path:
  """The folder of tfds datasets."""
  chosen = config.data_dir or tfds.core.constants.DATA_DIR
  return mirror.local(storage.path(chosen))


def token_root(config: config_lib.DataConfig) -> pathlib.Path:
  """The folder of tokenized splits and trained tokenizers."""
  if not config.cache_dir:
    return data_root(config) / "longnet_tokens"
  return mirror.local(storage.path(config.cache_dir)) / "longnet_tokens"


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds `path`.lock; the system frees the lock of a killed process."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name(path.name + ".lock"), "w")
  except OSError as error:
    kind = storage.StorageError if storage.failed(error) else OSError
    raise kind(
      f"cannot write below {str(path.parent)!r} ({error.strerror}); set "
      "data_dir or cache_dir to a folder that can be written"
    ) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def build_once(path: pathlib.Path, build: Callable[[pathlib.Path], None]):
  """Calls `build(folder)` unless `path` is whole, then renames folder to path.

  Safe when several processes call it at once, and when one is killed at any
  moment: what it left is removed by the next call. A folder whose bytes are no
  longer those that were built is built again, and a line on stderr says so.
  """
  if _damage(path) is None:
    return
  with locked(path), storage.named(path):
    if _damage(path) is None:  # another process held the lock and built it
      return
    _discard(path)
    if mirror.fetch(path):
      if _damage(path) is None:
        return
      _discard(path)
    partial = path.with_name(path.name + ".partial")
    try:
      partial.mkdir()
      build(partial)
      _seal(partial)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
    os.rename(partial, path)
    _sync(path.parent)
    mirror.publish(path)


def _discard(path: pathlib.Path):
  """Removes what a killed build has left, and what is damaged."""
  partial = path.with_name(path.name + ".partial")
  if partial.exists():
    shutil.rmtree(partial)
  if path.exists():
    print(
      f"{os.fspath(path)!r} is damaged ({_damage(path)}): it is built again",
      file=sys.stderr,
      flush=True,
    )
    os.rename(path, partial)
    shutil.rmtree(partial)


def _seal(folder: pathlib.Path):
  """Writes down what the files are, and all of it to the disk.

  A rename may reach the disk before the bytes do; then a crash of the machine
  leaves a folder that looks whole.
  """
  sums = {}
  for path in sorted(folder.iterdir()):
    _sync(path)
    sums[path.name] = _identity(path)
  (folder / _SUMS).write_text(json.dumps(sums))
  _sync(folder / _SUMS)
  _sync(folder)


def _sync(path: pathlib.Path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _damage(path: pathlib.Path) -> str | None:
  """What is wrong with a folder that `_seal` has left; None if nothing is."""
  try:
    sums = storage.read_json(path / _SUMS)
    for name, identity in sums.items():
      if _identity(path / name) != identity:
        return f"the bytes of {name} have changed"
  except (FileNotFoundError, NotADirectoryError) as error:
    return f"it has no {pathlib.Path(error.filename).name}"
  except (AttributeError, ValueError):
    return f"{_SUMS} cannot be read"
  return None


def _identity(path: pathlib.Path) -> list:
  """Size and hash of a file."""
  stat = path.stat()
  return [stat.st_size, _hash(path, stat.st_size, stat.st_mtime_ns)]


@functools.lru_cache(maxsize=64)
def _hash(path, size, changed_at):
  """Once for each state of a file: a process opens a corpus several times."""
  del size, changed_at
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
