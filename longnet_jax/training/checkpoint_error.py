"""What storage and orbax raise over a checkpoint, in one line."""

import contextlib

from longnet_jax import checked, storage

# What storage says -> what has happened.
_CAUSES = {
  "RESOURCE_EXHAUSTED": "the disk is full",
  "No space left": "the disk is full or has no room for another file",
  "quota exceeded": "the disk quota is used up",
  "File too large": "the limit on the size of a file is reached (ulimit -f)",
  "NOT_FOUND": "files of the checkpoint were removed meanwhile",
  "No ArrayMetadata found": "files of the checkpoint were removed meanwhile",
}


class CheckpointError(checked.RefusedError):
  """A checkpoint that cannot be written or read, and what to do."""


class WriteError(CheckpointError):
  """A checkpoint that cannot be written."""


@contextlib.contextmanager
def explained(problem: str, advice: str = "", kind=CheckpointError):
  """Turns whatever orbax and the file system raise into one line."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:
    text = str(error).strip() or type(error).__name__
    causes = (cause for said, cause in _CAUSES.items() if said in text)
    reason = next(causes, _short(text))
    line = f"{problem}: {reason}"
    if isinstance(error, OSError) and error.errno in storage.FULL:
      kind = WriteError
    raise kind(f"{line}; {advice}" if advice else line) from error


def _short(text: str) -> str:
  """One line of an error, whose end says more than its middle."""
  line = text.splitlines()[0].partition(" [")[0]
  return line if len(line) <= 240 else f"{line[:80]} ... {line[-150:]}"
