"""One owner of a workdir at a time: two runs in one would lose both.

On a file system the owner holds a lock that the system frees with the process,
however it ends. A bucket has no locks: there the owner writes a new number
every few seconds, and a newcomer takes over from one that has stopped counting.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time

import numpy as np

from longnet_jax import checked, storage
from longnet_jax.parallel import hosts

_BEAT = 5.0  # seconds between two numbers
_MISSED = 4  # of them until an owner counts as gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir, *, beat: float = _BEAT) -> Iterator[Callable[[], None]]:
  """Owns `workdir` in this block; gives a check that raises once it is lost.

  The first of several processes owns it for all. Raises ValueError, on every
  process, that says who has it and since when.
  """
  with contextlib.ExitStack() as stack:
    check, problem, failed = lambda: None, "", False
    if hosts.is_first():
      folder = storage.path(workdir)
      try:
        storage.make_dir(folder)
        check = stack.enter_context(_own(folder, beat))
      except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
        if isinstance(error, OSError):
          problem = storage.said(error)
          failed = storage.failed(error)
    problem = hosts.text_of_first(problem)
    if problem:
      failed = hosts.gather(np.int32(failed))[0]
      raise (storage.NoRoomError if failed else checked.RefusedError)(problem)
    yield check


@contextlib.contextmanager
def _own(folder, beat):
  path = folder / "owner.json"
  if storage.is_remote(folder):
    with _counted(path, beat) as check:
      yield check
    return
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise checked.RefusedError(_held(folder, _read(path))) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      with _counted(path, beat) as check:
        yield check
      return
    with storage.named(path):
      file.truncate(0)
      file.write(json.dumps(_me()) + "\n")
      file.flush()
    yield lambda: None


@contextlib.contextmanager
def _counted(path, beat):
  """Owns what `path` says, by counting in it."""
  _await_silence(path, beat)
  me = _me() | {"id": secrets.token_hex(8), "count": 0}
  lost, done = [], threading.Event()

  def count():
    while not done.wait(beat):
      # What cannot be reached now may be reached at the next number.
      with contextlib.suppress(OSError):
        now = _read(path)
        if now and now.get("id") != me["id"]:
          lost.append(now)
          return
        me["count"] += 1
        storage.write_whole(path, json.dumps(me) + "\n")

  def check():
    if lost:
      raise checked.RefusedError(_held(path.parent, lost[0]))

  storage.write_whole(path, json.dumps(me) + "\n")
  time.sleep(beat / 2)  # until another that came at the same time has written
  now = _read(path)
  if now is None or now.get("id") != me["id"]:
    raise checked.RefusedError(_held(path.parent, now))
  thread = threading.Thread(target=count, daemon=True)
  thread.start()
  try:
    yield check
  finally:
    done.set()
    thread.join()
    with contextlib.suppress(OSError):  # or it would hide what went wrong
      if not lost:
        storage.remove(path)


def _await_silence(path, beat):
  """Returns once nobody counts in `path`; ValueError if somebody does."""
  before = _read(path)
  for _ in range(2 * _MISSED if before else 0):
    time.sleep(beat / 2)
    now = _read(path)
    if now is None:
      return
    if now != before:
      raise checked.RefusedError(_held(path.parent, now))


def _me() -> dict:
  now = datetime.datetime.now().astimezone()
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": now.isoformat(" ", "seconds"),
  }


def _read(path) -> dict | None:
  """The owner on record, or None where nothing readable is there."""
  try:
    owner = storage.read_json(path)
  except (FileNotFoundError, ValueError):
    return None
  return owner if isinstance(owner, dict) else None


def _held(folder, owner: dict | None) -> str:
  owner = owner or {}
  return (
    f"workdir {folder} is in use by process {owner.get('pid', '?')} on "
    f"{owner.get('host', '?')} since {owner.get('since', 'just now')}; wait "
    "for it, stop it or choose another --workdir"
  )
