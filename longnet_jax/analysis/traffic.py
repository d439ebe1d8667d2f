"""What a compiled program reads and writes in memory, by its HLO text."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16} | {
  f"{kind}{bits}": bits for kind in "fsu" for bits in (8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\([^()]*\)|\S+) "
  r"(?P<kind>[\w-]+)\((?P<operands>.*?)\)(?P<rest>, .*|$)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Names of what is there already; nothing moves.
_FREE = (
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota"),
  *("after-all", "partition-id", "replica-id", "copy-done", "async-done"),
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

  def called(self, attribute):
    return re.search(attribute + r"=%?([\w.-]+)", self.rest)[1]


def kernels(text: str) -> list[Kernel]:
  """Returns what `compiled.as_text()` runs, loops as often as they turn.

  A kernel writes its results and reads its operands, each once; of what it
  only slices or gathers from, as much as it takes. Caches are not known of.

  Raises:
    ValueError: a loop turns as often as only run time tells.
  """
  computations, entry = _parsed(re.sub(r"/\*.*?\*/", "", text))
  return list(_run(computations, entry, 1))


def _parsed(text):
  """Returns name -> instructions by name, and the name of the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif match := _INSTRUCTION.match(line):
      operands = _NAME.findall(match["operands"])
      fields = match["name"], match["type"], match["kind"]
      current[match["name"]] = _Instruction(*fields, operands, match["rest"])
  return computations, entry


def _run(computations, name, times) -> Iterator[Kernel]:
  known = computations[name]
  for x in known.values():
    if x.kind in _FREE:
      continue
    if x.kind == "while":
      trips = _TRIPS.search(x.rest)
      if not trips:
        raise ValueError(f"only run time tells how often loop {x.name} turns")
      body = x.called("body")
      yield from _run(computations, body, times * int(trips[1]))
    elif x.kind == "call":
      yield from _run(computations, x.called("to_apply"), times)
    elif x.kind == "fusion":
      inside = computations[x.called("calls")]
      yield Kernel("fusion", times, _written(x, inside) + _read(inside))
    else:
      read = sum(known[y].size for y in x.operands if y in known)
      if x.kind in _PARTIAL:
        read = x.size
      target = re.search(r'custom_call_target="(.*?)"', x.rest)
      yield Kernel(target[1] if target else x.kind, times, x.size + read)


def _written(fusion, inside):
  """Returns what a fusion writes: of what it updates in place, the update."""
  updates = [x for x in inside.values() if x.kind == _UPDATE]
  saved = sum(x.size - inside[x.operands[1]].size for x in updates)
  return max(fusion.size - saved, 0)


def _read(inside):
  """Returns what a fusion reads of its parameters."""
  total = 0
  for x in inside.values():
    if x.kind == "parameter":
      uses = list(_uses(inside, x.name))
      if all(is_first and y.kind in _PARTIAL for y, is_first in uses):
        total += sum(y.size for y, _ in uses if y.kind != _UPDATE)
      else:
        total += x.size
  return total


def _uses(inside, name):
  """Yields who uses a value, and whether as its first operand."""
  for x in inside.values():
    if name in x.operands:
      if x.kind == "bitcast":
        yield from _uses(inside, x.name)
      else:
        yield x, x.operands[0] == name
