"""How far a command is: one line on stderr that takes the place of the last."""

import sys
import time

# Seconds between two lines where there is no terminal.
_PATIENCE = 10


class Progress:
  """Shows texts; elsewhere than on a terminal only some of them."""

  def __init__(self, stream=None):
    self._stream = stream or sys.stderr
    self._on_terminal = self._stream.isatty()
    self._shown = None  # when

  def show(self, text: str) -> None:
    """Says what is being done."""
    now = time.monotonic()
    if self._on_terminal:
      self._write(f"\r{text}\x1b[K")
    elif self._shown is None or now > self._shown + _PATIENCE:
      self._shown = now
      self._write(f"{text}\n")

  def clear(self) -> None:
    """Makes room for what is printed."""
    if self._on_terminal:
      self._write("\r\x1b[K")

  def _write(self, text):
    self._stream.write(text)
    self._stream.flush()
