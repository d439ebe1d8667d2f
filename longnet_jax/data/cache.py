"""Folders that are built once and appear whole or not at all."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil

import tensorflow_datasets as tfds

from longnet_jax import storage
from longnet_jax.data import config as config_lib
from longnet_jax.data import mirror


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
    raise OSError(
      f"cannot write below {str(path.parent)!r} ({error.strerror}); set "
      "data_dir or cache_dir to a folder that can be written"
    ) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def build_once(path: pathlib.Path, build: Callable[[pathlib.Path], None]):
  """Calls `build(folder)` unless `path` exists, then renames folder to path.

  Safe when several processes call it at once, and when one is killed at any
  moment: what it left is removed by the next call.
  """
  if path.exists():
    return
  with locked(path):
    if path.exists():  # another process held the lock and built it
      return
    if mirror.fetch(path):
      return
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
      shutil.rmtree(partial)
    partial.mkdir()
    try:
      build(partial)
    except BaseException:
      shutil.rmtree(partial)
      raise
    os.rename(partial, path)
    mirror.publish(path)
