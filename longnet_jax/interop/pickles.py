"""Reads the pickles of torch without running their code.

Two guards stand before what a hostile file could do. The instructions are
walked first, without following them, and refused where following them would
take absurd memory or time. Then they are followed by an unpickler that knows a
handful of harmless names, refuses any other before it is looked up, and hands
out opaque values only, which no instruction can look into or change.
"""

import collections
from collections.abc import Callable, Mapping
import io
import pickle
import pickletools
import types
from typing import Any

# Most entries of a tuple, those of its own tuples included. Dictionary keys are
# tuples at times, and hashing one recurses through all of it.
_LARGEST_TUPLE = 10_000
# Instructions that reach around the table of names.
_FORBIDDEN = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


class RefusedNameError(ValueError):
  """A pickle names something that is not known."""


class Opaque:
  """A value that no instruction of a pickle can look into or change."""

  __slots__ = ("_value",)

  def __init__(self, value: Any):
    object.__setattr__(self, "_value", value)

  def __setattr__(self, name: str, value: Any):
    raise AttributeError(f"it sets {name} of a {type(self).__name__}")


class Function(Opaque):
  """A function that a pickle may call, and neither read nor change."""

  __slots__ = ()

  def __call__(self, *arguments):
    """Calls the function."""
    return self._value(*arguments)


def reveal(opaque: Any, kind: type[Opaque]) -> Any:
  """Returns what a value of this kind holds; TypeError if it is no such."""
  if not isinstance(opaque, kind):
    raise TypeError(
      f"a {type(opaque).__name__} where a {kind.__name__} belongs"
    )
  return opaque._value


def load(
  data: bytes,
  names: Mapping[tuple[str, str], Opaque],
  storage: Callable[[tuple], Opaque],
) -> Any:
  """Returns what a pickle describes, with Opaque values inside.

  Args:
    data: the pickle.
    names: (module, name) -> what stands for it, beside plain containers.
    storage: turns a persistent id into what stands for it.

  Raises:
    RefusedNameError: the pickle names something else; nothing was executed.
    Exception: of any kind, where the pickle is damaged.
  """
  _check_instructions(data)
  return _Unpickler(data, names, storage).load()


class _Unpickler(pickle.Unpickler):
  """Builds containers, and what the caller's names and storages give."""

  def __init__(self, data, names, storage):
    super().__init__(io.BytesIO(data), encoding="utf-8")
    self._names = {
      # Instructions that make objects need types; those of C never change.
      ("collections", "OrderedDict"): collections.OrderedDict,
      # The arguments that training was given.
      ("argparse", "Namespace"): types.SimpleNamespace,
      **names,
    }
    self._storage = storage

  def find_class(self, module: str, name: str) -> Any:
    """Returns our stand-in for a listed name; imports nothing."""
    if (module, name) not in self._names:
      shown = f"{module}.{name}".encode("unicode_escape").decode()
      raise RefusedNameError(shown[:200])
    return self._names[module, name]

  def persistent_load(self, pid: Any) -> Any:
    """Returns a storage."""
    return self._storage(pid)


def _check_instructions(data):
  """Raises ValueError where following a pickle would exhaust the machine.

  Follows the sizes of tuples through the stack and the memo.
  """
  stack, memo, mark = [], {}, pickletools.markobject
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name in _FORBIDDEN:
      raise ValueError(f"it has the instruction {opcode.name}")
    if opcode.name in _PUTS:
      index = len(memo) if argument is None else argument
      # The unpickler takes memory up to the index.
      if index > len(data):
        raise ValueError(f"memo index {index} in {len(data)} bytes")
      memo[index] = stack[-1]
      continue
    if opcode.name in _GETS:
      stack.append(memo[argument])
      continue
    taken = _take(stack, opcode)
    size = 1
    if opcode.name in _TUPLES:
      size += sum(taken)
      if size > _LARGEST_TUPLE:
        raise ValueError(f"it nests a tuple of {_LARGEST_TUPLE} entries")
    if opcode.name == "DUP":
      stack += taken * 2
    else:
      stack += [mark if x is mark else size for x in opcode.stack_after]


def _take(stack, opcode):
  """Takes off what an instruction takes off, and returns the sizes."""
  mark, before = pickletools.markobject, opcode.stack_before
  taken = []
  if mark in before or (opcode.name == "POP" and stack[-1:] == [mark]):
    while stack[-1] is not mark:
      taken.append(stack.pop())
    stack.pop()
    before = before[: before.index(mark)] if mark in before else []
  for _ in before:
    taken.append(stack.pop())
  return [1 if x is mark else x for x in taken]
