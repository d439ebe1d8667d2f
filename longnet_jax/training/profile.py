"""A trace of a few steps, which xprof and TensorBoard open."""

import pathlib
import re
import tempfile

import jax

from longnet_jax import checked, storage
from longnet_jax.parallel import hosts


def parse(text: str | None, last: int) -> range:
  """The steps that a text such as "100:5" names, up to `last` of the run."""
  if text is None:
    return range(0)
  legal = f"STEP:COUNT such as {min(100, last)}:1"
  found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
  if not found:
    checked.refuse("profile", text, legal)
  first, count = map(int, found.groups())
  if not 1 <= first <= last or not count:
    checked.refuse(
      "profile", text, f"{legal}, with STEP in 1 to {last} and COUNT above 0"
    )
  return range(first, min(first + count, last + 1))


class Profile:
  """Traces the given steps of the first process into WORKDIR/profile."""

  def __init__(self, steps: range, workdir):
    self._steps = steps if hosts.is_first() else range(0)
    self._folder = storage.absolute(workdir) / "profile"
    if self._steps and _is_file(self._folder):
      raise checked.RefusedError(
        f"{self._folder} is a file, and a profile goes into a folder of that "
        "name; move it away"
      )
    self._temporary = None  # of a trace that goes to a bucket
    self._runs = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._end()

  def describe(self, start: int) -> str:
    """One line on what a run that has done `start` steps will trace, if any."""
    if not self._steps:
      return ""
    first, last = self._steps[0], self._steps[-1]
    if last <= start:
      return f"profile: step {last} is past; choose one after {start}"
    return f"profile: steps {first} to {last} go to {self._folder}"

  def begin(self, step: int) -> None:
    """Starts the trace where `step` is the first to be traced."""
    if self._runs or step not in self._steps:
      return
    folder = self._folder
    if storage.is_remote(folder):
      self._temporary = tempfile.TemporaryDirectory()
      folder = pathlib.Path(self._temporary.name)
    jax.profiler.start_trace(folder)
    self._runs = True

  def end(self, step: int, state) -> None:
    """Ends it where `step` is the last one, once that is computed."""
    if self._runs and step + 1 not in self._steps:
      jax.block_until_ready(state)
      self._end()

  def _end(self):
    if not self._runs:
      return
    self._runs = False
    advice = "make room, or train without --profile"
    with storage.named(self._folder):
      with storage.written_by_library(self._folder, advice):
        jax.profiler.stop_trace()
    if self._temporary is None:
      return
    with self._temporary as name:
      local = pathlib.Path(name)
      for file in storage.files(local):
        remote = self._folder / file.relative_to(local).as_posix()
        storage.write_whole(remote, file.read_bytes())


def _is_file(where: storage.Path) -> bool:
  return not storage.is_remote(where) and where.is_file()
