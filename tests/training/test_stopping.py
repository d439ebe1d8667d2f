import signal

import jax

from longnet_jax.training import stopping


def test_processes_agree_a_step_late_and_save_once(monkeypatch):
  """What was asked before a save does not make for a second one."""
  monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
  mesh = jax.make_mesh((8,), ("x",))
  caught = []
  stop = stopping.Stop(mesh, caught, save_minutes=1e-9)
  due = []
  for _ in range(4):
    assert not stop.after_step()
    due.append(stop.save_is_due)
    if stop.save_is_due:
      stop.saved()
  assert due == [False, True, False, True]
  caught.append(signal.SIGTERM)
  assert [stop.after_step() for _ in range(2)] == [False, True]
  assert stop.signal == signal.SIGTERM


def test_a_hang_up_that_is_ignored_stays_so():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stopping.catch_signals():
      assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
      assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
  finally:
    signal.signal(signal.SIGHUP, before)
