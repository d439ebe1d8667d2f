"""Hands the records of a run to a function of the user's, too."""

from collections.abc import Callable
import importlib
import sys

from longnet_jax import checked

# What a user's code may raise; sys.exit would end a run as if it was done.
_FAULTS = (Exception, SystemExit)


def load(name: str) -> Callable:
  """The function that "module:function" names."""
  module, _, function = name.partition(":")
  advice = "give module:function of a module that Python finds"
  if not module or not function.isidentifier():
    checked.refuse("tracker", name, "module:function such as my_runs:track")
  try:
    found = getattr(importlib.import_module(module), function)
  except _FAULTS as error:
    raise checked.RefusedError(
      f"tracker {name}: {_said(error)}; {advice}"
    ) from error
  if not callable(found):
    raise checked.RefusedError(f"tracker {name} is no function; {advice}")
  return found


class Tracker:
  """What the function returned, called with each record's numbers.

  function(settings, workdir) gives (step, {name: number}) -> None. An error of
  the former is refused; one of the latter is said, and the run goes on.
  """

  def __init__(self, name: str, function: Callable, settings: dict, workdir):
    self._name = name
    try:
      self._track = function(settings, str(workdir))
    except _FAULTS as error:
      raise checked.RefusedError(f"tracker {name}: {_said(error)}") from error
    if not callable(self._track):
      raise checked.RefusedError(
        f"tracker {name} returned {checked.shown(self._track)}; it must return "
        "a function of a step and a dictionary of numbers"
      )

  def record(self, step: int, values: dict[str, int | float]) -> None:
    """Calls it."""
    try:
      self._track(step, values)
    except _FAULTS as error:
      print(
        f"tracker {self._name} failed at step {step}: {_said(error)}",
        file=sys.stderr,
        flush=True,
      )


def _said(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
