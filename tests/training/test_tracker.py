import sys
import types

import pytest

from longnet_jax.training import tracker
from tests.training import tracked

_HERE = "tests.training.tracked"


class _Leaving(types.ModuleType):
  """A module that ends the process."""

  def __getattr__(self, name):
    raise SystemExit(0)


@pytest.mark.parametrize(
  "name, message",
  [
    ("track", "tracker is 'track'; it must be module:function such as my_runs"),
    (f"{_HERE}:", "it must be module:function"),
    ("nowhere:track", "tracker nowhere:track: ModuleNotFoundError: .*nowhere"),
    (
      f"{_HERE}:trick",
      f"tracker {_HERE}:trick: AttributeError.*; give module:",
    ),
    (f"{_HERE}_leaving:track", f"tracker {_HERE}_leaving:track: SystemExit: 0"),
    (f"{_HERE}:json", f"tracker {_HERE}:json is no function; give module:"),
  ],
)
def test_what_is_no_tracker_is_named(monkeypatch, name, message):
  monkeypatch.setitem(sys.modules, f"{_HERE}_leaving", _Leaving(_HERE))
  with pytest.raises(ValueError, match=message):
    tracker.load(name)


@pytest.mark.parametrize(
  "function, message",
  [
    (tracked.refuse, "tracker mine: ConnectionError: no server"),
    (tracked.leave, "tracker mine: SystemExit: 0"),
    (tracked.forget, "tracker mine returned None; it must return a function"),
  ],
)
def test_a_tracker_that_does_not_start_is_named(function, message):
  with pytest.raises(ValueError, match=message):
    tracker.Tracker("mine", function, {}, "run")


def test_a_tracker_that_fails_later_is_named_and_asked_again(capsys):
  tracking = tracker.Tracker("mine", tracked.lose, {}, "run")
  for step in (1, 2):
    tracking.record(step, {"loss": 2.5})
  first, second = capsys.readouterr().err.splitlines()
  assert first.startswith("tracker mine failed at step 1: ConnectionError: no")
  assert second.startswith("tracker mine failed at step 2: ")


def test_a_tracker_does_not_end_the_run(capsys):
  tracking = tracker.Tracker("mine", tracked.leave_later, {}, "run")
  tracking.record(1, {"loss": 2.5})
  assert capsys.readouterr().err == (
    "tracker mine failed at step 1: SystemExit: 0\n"
  )
