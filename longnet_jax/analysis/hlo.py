"""How often a compiled program runs each of its lines, from its HLO text."""

from collections.abc import Iterator
import re
from typing import NamedTuple

from longnet_jax.ops import tpu

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_KIND = re.compile(r"= (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CONSTANT = re.compile(r" constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(
  r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_LISTED = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")


class Line(NamedTuple):
  """One instruction of a program.

  text: as it is written.
  kind: the operation's name in HLO.
  times: how often it runs in one call of the program.
  """

  text: str
  kind: str
  times: int


class Program(NamedTuple):
  """The instructions that one call runs, loops multiplied out.

  lines: each once; fusions and what they call are one line, but for links of
    a chain, a collective that runs beside several fusions, and for a
    reduce-scatter.
  unknown_loops: loops of which only run time knows how often they turn; they
    count once.
  """

  lines: list[Line]
  unknown_loops: int


def read(text: str) -> Program:
  """Returns the program of `compiled.as_text()`.

  Of the branches of a conditional that with the most estimated cycles counts,
  or the longest where there are none; one with a line in the scope `tpu.RARELY`
  only beside others of its kind.
  """
  bodies, entry = computations(text)
  unknown = []
  lines = list(_walk(bodies, entry, 1, unknown))
  return Program(lines, len(unknown))


def cycles(program: Program) -> int:
  """Returns the cycles that the TPU compiler expects of all lines together.

  Kernels and collectives have no estimate: they count nothing.
  """
  found = ((_CYCLES.search(line.text), line) for line in program.lines)
  return sum(int(m[1]) * line.times for m, line in found if m)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns name -> lines of each computation, and the name of the entry."""
  found, entry, current = {}, None, None
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match and "=" not in line.split("(")[0]:
      current = match[2]
      found[current] = []
      entry = current if match[1] else entry
    elif line.startswith("}"):
      current = None
    elif current:
      found[current].append(line)
  return found, entry


def _walk(computations, name, times, unknown) -> Iterator[Line]:
  for text in computations.get(name, ()):
    match = _KIND.search(text)
    if not match:
      continue
    kind = match[1]
    if kind == "while":
      body = re.search(r"body=%?([\w.\-]+)", text)[1]
      trips = _trips(text, computations)
      if trips is None:
        unknown.append(body)
      yield from _walk(computations, body, times * (trips or 1), unknown)
    elif kind == "conditional":
      branches = (
        list(_walk(computations, branch, times, [])) for branch in _called(text)
      )
      yield from max(branches, key=_weight)
    else:
      yield Line(text, kind, times)
      if kind == "fusion":
        for name in _called(text):
          yield from _sent(text, name, computations[name], times)
      elif kind in ("call", "async-start"):
        for called in _called(text):
          yield from _walk(computations, called, times, unknown)


def _sent(fusion, name, called, times):
  """Yields the collectives inside of a fusion, which calls `name`."""
  for text in called:
    if "chain_id=" in text:
      yield Line(text, _KIND.search(text)[1], times)
    elif name.startswith("all-reduce-scatter") and " all-reduce(" in text:
      # So the TPU compiler writes a reduce-scatter: of the sum its own part.
      shape, rest = fusion.split(" fusion(")[0], text.split(" all-reduce(")[1]
      yield Line(f"{shape} reduce-scatter({rest}", "reduce-scatter", times)


def _called(text):
  """Returns the names of the computations that a line calls."""
  names = _CALLED.findall(text)
  for listed in _LISTED.findall(text):
    names.extend(name.strip().lstrip("%") for name in listed.split(","))
  return names


def _trips(text, computations):
  """Returns how often a loop turns, or None where only run time knows."""
  if match := _TRIPS.search(text):
    return int(match[1])
  condition = re.search(r"condition=%?([\w.\-]+)", text)[1]
  bounds = _CONSTANT.findall("\n".join(computations[condition]))
  return max(map(int, bounds)) if bounds else None


def _weight(lines):
  often = not any(f"/{tpu.RARELY}/" in line.text for line in lines)
  return often, cycles(Program(lines, 0)), len(lines)
