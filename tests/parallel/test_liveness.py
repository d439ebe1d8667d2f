import queue
import threading

import pytest

from longnet_jax.parallel import liveness


class _Store:
  """The store of a run, where others count as a test likes."""

  def __init__(self, answers=True):
    self.values, self.answers = {}, answers

  def key_value_set(self, key, value, allow_overwrite):
    assert allow_overwrite
    if not self.answers:
      threading.Event().wait()
    self.values[key] = value

  def key_value_dir_get(self, prefix):
    return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


def _watch(store, patience):
  lost = queue.Queue()
  watch = liveness.Liveness(store, 0, lost.put, period=0.01, patience=patience)
  return watch, lost


def test_a_silent_process_is_lost():
  store = _Store()
  store.values["alive/1"] = "7"  # and never again
  _, lost = _watch(store, 0.2)
  assert lost.get() == "process 1"


def test_a_store_that_does_not_answer_is_lost():
  _, lost = _watch(_Store(answers=False), 0.1)
  assert lost.get() == "the coordinator"


def test_who_counts_is_not_lost():
  store = _Store()
  watches = [
    liveness.Liveness(store, i, pytest.fail, period=0.01, patience=30)
    for i in range(2)
  ]
  while len(store.values) < 2 or min(map(int, store.values.values())) < 9:
    threading.Event().wait(0.01)
  for watch in watches:
    watch.stop()
