"""What becomes of a fault, and what may not."""

from collections.abc import Callable
import contextlib
import math
import os
import signal
from typing import Any, NamedTuple

from longnet_jax import checked

UNDISTURBED = "as undisturbed"
REFUSED = "refused in one line"
BEFORE = "went on from the one before"
TRACEBACK = "traceback"
HANG = "hang over 10 s"
LOST = "lost"
WRONG = "wrong without a word"
GREW = "grew"  # of a long run alone
OUTCOMES = (UNDISTURBED, REFUSED, BEFORE, TRACEBACK, HANG, LOST, WRONG)
FAILURES = (TRACEBACK, HANG, LOST, WRONG, GREW)
_SECONDS = 10


class Trial(NamedTuple):
  """One fault.

  Attributes:
    row: of the table.
    outcome: one of OUTCOMES.
    said: what a failure said.
    measured: numbers of a long run.
  """

  row: str
  outcome: str
  said: str = ""
  measured: dict[str, float] | None = None


class _HangError(BaseException):
  """Past the time of a trial; no `except Exception` takes it for damage."""


def attempt(
  row: str,
  call: Callable[[], Any],
  is_right: Callable[[Any], bool],
  outcome: str = UNDISTURBED,
) -> Trial:
  """The trial of a call that may give what is right, or refuse in one line."""
  try:
    with _limited(_SECONDS):
      found = call()
      right = is_right(found)
  except _HangError:
    return Trial(row, HANG)
  except (checked.RefusedError, OSError) as error:
    said = str(error)
    return Trial(row, REFUSED if _is_line(said) else TRACEBACK, said[:300])
  except Exception as error:
    return Trial(row, TRACEBACK, f"{type(error).__name__}: {error}"[:300])
  return Trial(row, outcome if right else WRONG, "" if right else shown(found))


def of_process(row: str, code: int, err: str, codes: tuple[int, ...]) -> Trial:
  """The trial of a process that was to be refused with one of these codes."""
  lines = [x for x in err.splitlines() if x.startswith("error: ")]
  said = f"exit {code}: {err[-300:]}"
  if "Traceback" in err:
    return Trial(row, TRACEBACK, said)
  if code in codes and len(lines) == 1:
    return Trial(row, REFUSED)
  return Trial(row, WRONG, said)


def shown(found: Any) -> str:
  """At most 300 characters of what was found, in one line."""
  return " ".join(repr(found).split())[:300]


def _is_line(text: str) -> bool:
  return bool(text) and "\n" not in text


@contextlib.contextmanager
def _limited(seconds: int):
  """Ends the block by an exception after so many seconds.

  More where others wait for the processors, too.
  """

  def ring(*_):
    raise _HangError

  before = signal.signal(signal.SIGALRM, ring)
  crowd = max(1.0, os.getloadavg()[0] / os.cpu_count())
  signal.alarm(math.ceil(seconds * crowd))
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
