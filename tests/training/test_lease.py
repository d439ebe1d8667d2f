import json
import subprocess
import sys

import pytest

from longnet_jax import storage
from longnet_jax.training import lease

_BEAT = 0.05


@pytest.fixture
def counted(monkeypatch):
  """A file system without locks, as a bucket is."""

  def refuse(*_):
    raise OSError(lease.errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lease.fcntl, "flock", refuse)


@pytest.fixture(params=["lock", "count"])
def workdir(request, tmp_path):
  if request.param == "count":
    request.getfixturevalue("counted")
  return tmp_path / "run"


def test_a_second_owner_is_told_of_the_first(workdir):
  with lease.hold(workdir, beat=_BEAT) as check:
    pid, host = (lease._me()[name] for name in ("pid", "host"))
    with pytest.raises(ValueError, match=f"process {pid} on {host} since 20"):
      with lease.hold(workdir, beat=_BEAT):
        pass
    check()
  with lease.hold(workdir, beat=_BEAT):
    pass


def test_a_killed_owner_keeps_no_lock(tmp_path):
  program = (
    "import os, signal, sys\nfrom longnet_jax.training import lease\n"
    "with lease.hold(sys.argv[1]):\n  os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  ended = subprocess.run([sys.executable, "-c", program, tmp_path])
  assert ended.returncode < 0
  assert json.loads((tmp_path / "owner.json").read_text())["pid"]
  with lease.hold(tmp_path):
    pass


def test_a_killed_owner_stops_counting(counted, tmp_path):
  owner = {"id": "x", "host": "h", "pid": 1, "since": "then", "count": 7}
  (tmp_path / "owner.json").write_text(json.dumps(owner))
  with lease.hold(tmp_path, beat=_BEAT) as check:
    check()


def test_an_owner_that_froze_finds_out(counted, tmp_path):
  with lease.hold(tmp_path, beat=_BEAT) as check:
    other = {"id": "x", "host": "h", "pid": 1, "since": "then", "count": 0}
    (tmp_path / "owner.json").write_text(json.dumps(other))
    for _ in range(200):
      lease.time.sleep(_BEAT / 5)
      try:
        check()
      except ValueError as error:
        assert "in use by process 1 on h since then" in str(error)
        break
    else:
      pytest.fail("the owner has not noticed")


def test_a_full_disk_is_no_owner(tmp_path, monkeypatch):
  def fail():
    raise OSError(lease.errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(lease, "_me", fail)
  with pytest.raises(
    ValueError, match="owner.json: No space .*; make"
  ) as error:
    with lease.hold(tmp_path):
      pass
  assert isinstance(error.value, storage.StorageError)
