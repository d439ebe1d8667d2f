"""Where files lie: folders of this machine, and buckets as gs:// and s3://.

Every path that a user gives comes in through `path`. A bucket has neither
append nor atomic rename, and does not need the latter: an object appears whole
or not at all.
"""

from collections.abc import Iterator
import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from typing import Any

from etils import epath

from longnet_jax import checked

# Scheme -> what reads it, and the extra that installs that.
_SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")

# A disk that is full, at its quota or limit, broken or read-only, or gone.
_ADVICE = {
  errno.ENOSPC: "make room, then start again",
  errno.EDQUOT: "make room within the quota, then start again",
  errno.EFBIG: "raise the limit on the size of a file (ulimit -f), then start "
  "again",
  errno.EIO: "check the disk, then start again",
  errno.EROFS: "mount it so that it can be written, then start again",
  errno.ESTALE: "mount the disk anew, then start again",
}
FAILURES = tuple(_ADVICE)
# Those that only a write can have.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Path = pathlib.Path | epath.Path
# Of a whole number in JSON: far more than any has, and far from overflowing.
_MOST_DIGITS = 100


class StorageError(OSError):
  """A bucket or a disk did not answer, or said no."""


class NoRoomError(StorageError, checked.RefusedError):
  """A folder that was given and that a failed disk keeps from being used."""


def path(name: str | os.PathLike) -> Path:
  """A path of this machine, ~ expanded, or in a bucket.

  Raises ValueError for a scheme that is not known or not installed, and for
  what is no name.
  """
  text = os.fspath(name)
  if not is_name(text):
    checked.refuse("a path", text, "a name such as runs/NAME")
  found = _URL.match(text)
  if not found:
    return _local(text)
  scheme = found.group(1)
  if scheme not in _SCHEMES:
    known = ", ".join(f"{known}://" for known in _SCHEMES)
    raise checked.RefusedError(
      f"{text[:80]!r}: {scheme}:// is not known; use {known} or a folder of "
      "this machine"
    )
  if not re.match(rf"{scheme}://[^/]", text):
    raise checked.RefusedError(
      f"{text[:80]!r} names no bucket; use {scheme}://BUCKET/DIR"
    )
  module, extra = _SCHEMES[scheme]
  if importlib.util.find_spec(module) is None:
    raise checked.RefusedError(
      f"{text[:80]!r}: {scheme}:// needs {module}, which is not installed; "
      f"pip install 'longnet-jax[{extra}]', or use a folder of this machine"
    )
  return epath.Path(text)


def is_name(text: str) -> bool:
  """Whether the system takes a text as the name of a file or a path."""
  try:
    return bool(text) and b"\0" not in os.fsencode(text)
  except UnicodeEncodeError:
    return False


def is_remote(where: Path) -> bool:
  """Whether a path lies in a bucket."""
  return not isinstance(where, pathlib.Path)


def absolute(name: str | os.PathLike) -> Path:
  """The path, independent of the current folder."""
  where = path(name)
  return where if is_remote(where) else where.absolute()


def exists(where: Path) -> bool:
  """Whether there is a file or folder; StorageError where none can tell."""
  with _asking(where):
    return where.exists()


def is_dir(where: Path) -> bool:
  """Whether there is a folder; in a bucket, anything below it."""
  with _asking(where):
    return where.is_dir()


def files(where: Path) -> Iterator[Path]:
  """All files below a folder."""
  with _asking(where):
    for entry in where.iterdir():
      if entry.is_dir():
        yield from files(entry)
      else:
        yield entry


def make_dir(where: Path) -> None:
  """Makes a folder and those above it; a bucket has none to make."""
  if not is_remote(where):
    where.mkdir(parents=True, exist_ok=True)


def read(where: Path) -> bytes:
  """All bytes of a file; FileNotFoundError if there is none."""
  with _asking(where):
    return where.read_bytes()


def read_json(where: Path) -> Any:
  """What a JSON file holds; ValueError says why it holds none."""
  return parse_json(read(where))


def parse_json(text: str | bytes) -> Any:
  """What a JSON text describes; ValueError says why it is none.

  Whole numbers are those that a float can hold, too.
  """
  try:
    return json.loads(text, parse_int=_whole)
  except RecursionError as error:
    raise ValueError("it nests too deep") from error


@contextlib.contextmanager
def written_by_library(folder: Path, advice: str) -> Iterator[None]:
  """Raises StorageError where a library written in C++ cannot write.

  Such a library raises a RuntimeError that quotes the system.
  """
  try:
    yield
  except RuntimeError as error:
    for reason in map(os.strerror, FAILURES):
      if reason in str(error):
        raise StorageError(
          f"cannot write into {os.fspath(folder)!r}: {reason}; {advice}"
        ) from error
    raise


@contextlib.contextmanager
def named(where: Path) -> Iterator[None]:
  """Adds the file to what the system says of a write without naming one."""
  try:
    yield
  except OSError as error:
    if error.errno in FULL and error.filename is None:
      error.filename = os.fspath(where)
    raise


def gone(where: Path) -> StorageError:
  """What to say of a run's file that is no longer where it was."""
  return StorageError(
    f"{where} was removed or replaced during the run; if its workdir was "
    "moved, start again there: it goes on from the last checkpoint"
  )


def failed(error: OSError) -> bool:
  """Whether storage failed, rather than that a path was a wrong one."""
  return isinstance(error, StorageError) or error.errno in FAILURES


def said(error: OSError) -> str:
  """A line on an error of the system, with what to do about a failed disk."""
  advice = _ADVICE.get(error.errno)
  if advice is None:
    return str(error)
  where = "" if error.filename is None else f"{os.fspath(error.filename)}: "
  return f"{where}{error.strerror}; {advice}"


@contextlib.contextmanager
def on_this_machine(where: Path) -> Iterator[pathlib.Path]:
  """A file as one of this machine, for readers that need one."""
  if not is_remote(where):
    yield where
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / where.name
    copy.write_bytes(read(where))
    yield copy


def write_whole(where: Path, content: str | bytes) -> None:
  """Writes a file whole or not at all."""
  data = content.encode() if isinstance(content, str) else content
  if is_remote(where):
    with _asking(where):
      where.write_bytes(data)
    return
  temporary = where.with_name(where.name + ".tmp")
  try:
    with named(where), open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, where)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def remove(where: Path) -> None:
  """Removes a file or a whole folder, if there is one."""
  with _asking(where):
    if not where.exists():
      return
    if is_remote(where):
      where.rmtree() if where.is_dir() else where.unlink()
    elif where.is_dir():
      shutil.rmtree(where)
    else:
      where.unlink()


def check_writable(folder: Path) -> None:
  """Raises OSError unless the folder, or what it would be made in, can be
  written; leaves nothing behind."""
  if is_remote(folder):
    probe = folder / f"probe-{secrets.token_hex(8)}"
    write_whole(probe, bytes(4096))
    remove(probe)
    return
  while not folder.exists():
    folder = folder.parent
  if not folder.is_dir():
    raise NotADirectoryError(20, "it is a file", str(folder))
  with named(folder), tempfile.TemporaryFile(dir=folder) as probe:
    probe.write(bytes(4096))


def _whole(digits: str) -> int:
  number = int(digits)
  if len(digits) > _MOST_DIGITS:
    raise ValueError(f"it has a number of {len(digits)} digits")
  return number


def _local(text: str) -> pathlib.Path:
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise checked.RefusedError(f"{text[:80]!r}: ~ names no user") from error


@contextlib.contextmanager
def _asking(where: Path) -> Iterator[None]:
  """Says in one line what a bucket's library raises, after its retries."""
  try:
    yield
  except OSError as error:
    if not is_remote(where) or isinstance(error, FileNotFoundError):
      raise
    raise StorageError(_line(where, error)) from error
  except Exception as error:
    if not is_remote(where):
      raise
    raise StorageError(_line(where, error)) from error


def _line(where: Path, error: Exception) -> str:
  reason = " ".join(str(error).split())[:200] or type(error).__name__
  return (
    f"{where}: {reason}; check the name of the bucket, the credentials and the "
    "network"
  )
