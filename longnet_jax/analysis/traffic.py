"""What a compiled program reads and writes in memory, by its HLO text."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

from longnet_jax.analysis import hlo

_BITS = {"pred": 8, "bf16": 16} | {
  f"{kind}{bits}": bits for kind in "fsu" for bits in (8, 16, 32, 64)
}
_INSTRUCTION = re.compile(
  r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\([^()]*\)|\S+) "
  r"(?P<kind>[\w-]+)\((?P<operands>.*?)\)(?P<rest>, .*|$)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_LIBRARY = re.compile(r'custom_call_target="(.*?)"')
# Names of what is there already, and of others that are lines themselves.
_FREE = (
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota"),
  *("after-all", "partition-id", "replica-id", "copy-done", "async-done"),
  *("call", "async-start"),
)
_UPDATE = "dynamic-update-slice"
# These read of their first operand what they return, an update nothing.
_PARTIAL = ("slice", "dynamic-slice", "gather", _UPDATE)


class Kernel(NamedTuple):
  """One instruction that runs `times` and moves so many bytes each time.

  name: what it calls if that is a library's, else its kind.
  """

  name: str
  times: int
  size: int


class _Instruction(NamedTuple):
  name: str
  type: str
  kind: str
  operands: list[str]
  rest: str

  @property
  def size(self):
    return sum(
      math.prod(int(n) for n in shape.split(",") if n) * _BITS[dtype] // 8
      for dtype, shape in _ARRAY.findall(self.type)
      if dtype in _BITS
    )


def kernels(text: str) -> list[Kernel]:
  """Returns what `compiled.as_text()` runs, loops as often as they turn.

  A kernel writes its results and reads its operands, each once; of what it
  only slices or gathers from, as much as it takes. Caches are not known of.

  Raises:
    ValueError: only run time tells how often a loop turns.
  """
  program = hlo.read(text)
  if program.unknown_loops:
    raise ValueError(
      f"only run time tells how often {program.unknown_loops} loops turn"
    )
  bodies, _ = hlo.computations(text)
  bodies = {name: list(_parsed(lines)) for name, lines in bodies.items()}
  known = {x.name: x for body in bodies.values() for x in body}
  found = []
  for line in program.lines:
    for x in _parsed([line.text]):
      if x.kind not in _FREE:
        library = _LIBRARY.search(x.rest)
        name = library[1] if library else x.kind
        found.append(Kernel(name, line.times, _moved(x, known, bodies)))
  return found


def _parsed(lines) -> Iterator[_Instruction]:
  for line in lines:
    if match := _INSTRUCTION.match(line):
      operands = _NAME.findall(match["operands"])
      fields = match["name"], match["type"], match["kind"]
      yield _Instruction(*fields, operands, match["rest"])


def _moved(x, known, bodies):
  """Returns the bytes that an instruction reads and writes."""
  if x.kind == "fusion":
    inside = bodies[re.search(r"calls=%?([\w.-]+)", x.rest)[1]]
    return _written(x, inside, known) + _read(inside)
  if x.kind in _PARTIAL:
    return 2 * x.size
  return x.size + sum(known[y].size for y in x.operands if y in known)


def _written(fusion, inside, known):
  """Returns what a fusion writes: of what it updates in place, the update."""
  updates = [x for x in inside if x.kind == _UPDATE]
  saved = sum(x.size - known[x.operands[1]].size for x in updates)
  return max(fusion.size - saved, 0)


def _read(inside):
  """Returns what a fusion reads of its parameters."""
  total = 0
  for x in inside:
    if x.kind == "parameter":
      uses = list(_uses(inside, x.name))
      if all(is_first and y.kind in _PARTIAL for y, is_first in uses):
        total += sum(y.size for y, _ in uses if y.kind != _UPDATE)
      else:
        total += x.size
  return total


def _uses(inside, name):
  """Yields who uses a value, and whether as its first operand."""
  for x in inside:
    if name in x.operands:
      if x.kind == "bitcast":
        yield from _uses(inside, x.name)
      else:
        yield x, x.operands[0] == name
