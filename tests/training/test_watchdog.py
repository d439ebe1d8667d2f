import subprocess
import sys
import time

import pytest

from longnet_jax.training import watchdog


def _stalls(stream, **changes):
  arguments = dict(minutes=0.2 / 60, ends=False) | changes
  return watchdog.Watchdog(**arguments, stream=stream)


def _text_after(path, condition):
  """What the file holds once it holds `condition`."""
  while condition not in (text := path.read_text()):
    time.sleep(0.02)
  return text


def test_a_run_that_stands_still_shows_where(tmp_path):
  path = tmp_path / "said"
  with path.open("w") as stream, _stalls(stream) as watch:
    watch.done(7)
    text = _text_after(path, "test_watchdog.py")
  assert "nothing has ended for 0.00333333 minutes since step 7; all" in text
  assert "_text_after" in text


@pytest.mark.parametrize("minutes", [0.0, 1.0])
def test_a_run_that_goes_on_is_left_alone(tmp_path, minutes):
  path = tmp_path / "said"
  with path.open("w") as stream, _stalls(stream, minutes=minutes) as watch:
    for step in range(20):
      watch.done(step)
      time.sleep(0.02)
  assert not path.read_text()


def test_it_can_end_the_process():
  program = (
    "import threading\nfrom longnet_jax.training import watchdog\n"
    "with watchdog.Watchdog(0.2 / 60, ends=True):\n"
    "  threading.Event().wait()\n"
  )
  ended = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert ended.returncode == watchdog.STALLED
  assert "the process ends; all threads" in ended.stderr
