import io
import json

import pytest

from longnet_jax import storage
from longnet_jax.training import attempts, metrics


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass when a test says so."""
  now = [100.0]
  monkeypatch.setattr(attempts.time, "monotonic", lambda: now[0])
  return now


def _open(workdir, start, began):
  return metrics.Writer(
    workdir,
    start=start,
    total=9,
    stream=io.StringIO(),
    attempts=attempts.Attempts(workdir, began),
  )


def _step(writer, clock, step):
  """A step of ten seconds."""
  clock[0] += 10
  writer.record(step, {"step_seconds": 10.0})


def test_steps_that_are_redone_do_not_count(tmp_path, clock):
  first = _open(tmp_path, 0, began=90)
  for step in (1, 2, 3, 4, 5):
    _step(first, clock, step)
  *_, last = metrics.read_metrics(tmp_path)
  assert (last["attempt"], last["wall_seconds"]) == (1, 60)
  assert last["goodput"] == 50 / 60
  # It is killed, last heard of 50 seconds after it began, and of its steps two
  # are kept.
  clock[0] = 1000.0
  second = _open(tmp_path, 2, began=980)
  _step(second, clock, 3)
  second.close()
  *_, last = metrics.read_metrics(tmp_path)
  assert (last["step"], last["attempt"], last["wall_seconds"]) == (3, 2, 30)
  assert last["goodput"] == (20 + 10) / (50 + 30)
  first.close()


def test_a_start_that_never_came_to_a_record_counts(tmp_path, clock):
  attempts.Attempts(tmp_path, began=40)
  attempts.Attempts(tmp_path, began=100)
  third = attempts.Attempts(tmp_path, began=80)
  assert third.values()["attempt"] == 3
  assert third.values()["goodput"] == 0
  entries = json.loads(attempts.attempts_path(tmp_path).read_text())
  assert [entry["seconds"] for entry in entries] == [60, 0, 20]


def test_a_workdir_that_is_gone_is_a_failure_of_storage(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  started = attempts.Attempts(workdir, 0.0)
  workdir.rename(tmp_path / "moved")
  with pytest.raises(storage.StorageError, match="attempts.json was removed"):
    started.write()


@pytest.mark.parametrize(
  "text",
  [
    *("{", "3", "[1]", '[{"began": ""}]', "[" * 100_000),
    *(
      f'[{{"began": "", "seconds": {seconds}}}]'
      for seconds in ("1" + "0" * 400, "NaN", "-1", "1e999")
    ),
  ],
)
def test_what_is_no_list_of_starts_is_named(tmp_path, text):
  attempts.attempts_path(tmp_path).write_text(text)
  with pytest.raises(
    ValueError, match="attempts.json does not list the starts"
  ):
    attempts.Attempts(tmp_path, 0.0)
