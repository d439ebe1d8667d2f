"""Copies on this machine of data folders that lie in a bucket.

Tokens are memory-mapped and records are read by C++, which both need files. So
data_dir and cache_dir in a bucket stand for a folder in the user's cache: what
is missing there comes from the bucket, and what is built goes to it, so that
each host builds or loads it once.
"""

import json
import os
import pathlib
import shutil

from longnet_jax import storage

# Last to be written: what a folder in the bucket holds, and that it is whole.
_CONTENTS = "contents.json"


def local(where: storage.Path) -> pathlib.Path:
  """The folder on this machine that stands for a path."""
  if not storage.is_remote(where):
    return where
  scheme, _, rest = str(where).partition("://")
  return _root() / scheme / rest


def fetch(path: pathlib.Path) -> bool:
  """Copies a folder that stands for a whole one in a bucket, if there is one.

  Returns whether it did; raises StorageError where a file has another size.
  """
  remote = _remote(path)
  if remote is None or not storage.exists(remote / _CONTENTS):
    return False
  sizes = storage.read_json(remote / _CONTENTS)
  partial = path.with_name(path.name + ".fetched")
  shutil.rmtree(partial, ignore_errors=True)
  for name, size in sizes.items():
    content = storage.read(remote / name)
    if len(content) != size:
      raise storage.StorageError(
        f"{remote / name} has {len(content):,} bytes and was {size:,}; remove "
        f"{remote}, it is built again"
      )
    target = partial / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
  os.rename(partial, path)
  return True


def fetch_tree(remote: storage.Path) -> None:
  """Copies all files below a path in a bucket, unless they are here."""
  path = local(remote)
  if path is remote or path.exists() or not storage.is_dir(remote):
    return
  partial = path.with_name(path.name + ".fetched")
  shutil.rmtree(partial, ignore_errors=True)
  for file in storage.files(remote):
    target = partial / file.relative_to(remote)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(storage.read(file))
  os.rename(partial, path)


def publish(path: pathlib.Path) -> None:
  """Copies a folder into the bucket that it stands for, if it does."""
  remote = _remote(path)
  if remote is None:
    return
  files = sorted(file for file in path.rglob("*") if file.is_file())
  sizes = {}
  for file in files:
    name = file.relative_to(path).as_posix()
    sizes[name] = file.stat().st_size
    storage.write_whole(remote / name, file.read_bytes())
  storage.write_whole(remote / _CONTENTS, json.dumps(sizes))


def _root() -> pathlib.Path:
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(cache).expanduser() / "longnet_jax" / "buckets"


def _remote(path: pathlib.Path) -> storage.Path | None:
  """The path that a folder below the root stands for."""
  if not path.is_relative_to(_root()):
    return None
  scheme, *rest = path.relative_to(_root()).parts
  return storage.path(f"{scheme}://{'/'.join(rest)}")
