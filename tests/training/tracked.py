"""Trackers as users have them."""

import json
import pathlib


def track(settings, workdir):
  """Writes the settings and each record as a line."""
  path = pathlib.Path(workdir) / "tracked.jsonl"
  path.write_text(json.dumps(settings) + "\n")

  def record(step, values):
    with path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")

  return record


def refuse(settings, workdir):
  """Cannot reach its server when it starts."""
  raise ConnectionError("no server")


def leave(settings, workdir):
  """Ends the process where it cannot log in."""
  raise SystemExit(0)


def leave_later(settings, workdir):
  """Ends the process at a step."""
  return lambda step, values: leave(settings, workdir)


def forget(settings, workdir):
  """Returns nothing."""


def lose(settings, workdir):
  """Cannot reach its server later."""

  def record(step, values):
    raise ConnectionError(f"no server\nfor {values}")

  return record
