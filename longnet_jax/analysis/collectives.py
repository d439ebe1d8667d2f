"""What a compiled program sends between devices, read from its HLO text."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

from longnet_jax.analysis import hlo

_SIZES = {
  "f64": 8,
  "f32": 4,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "pred": 1,
}
_LINE = re.compile(
  r"= (?P<shape>\(*\w+\[.*?) "
  r"(?P<kind>all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
  r"(?:-start)?\("
)
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUP = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH_GROUP = re.compile(
  r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}"
)


class Collective(NamedTuple):
  """One collective operation, as one device sees it.

  kind: the operation's name in HLO.
  dtype: the type of what it moves, in HLO's words.
  group: devices that talk; 2 for a permutation.
  received: the most bytes that a device receives.
  """

  kind: str
  dtype: str
  group: int
  received: int


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of `compiled.as_text()`, each loop body once.

  A collective that the TPU compiler spreads over several computations, to run
  beside them, is one chain and counts once.

  With s the bytes of the result on a device and D the size of a group, a
  device receives (D - 1) / D s from an all-gather or all-to-all, (D - 1) s
  from a reduce-scatter, 2 (D - 1) / D s from an all-reduce, s from a permute.
  """
  lines = (hlo.Line(line, "", 1) for line in text.splitlines())
  return [found for found, _ in _all(lines)]


def of_program(program: hlo.Program) -> Iterator[tuple[Collective, int]]:
  """Yields the collectives of a program and how often each is run."""
  return _all(program.lines)


def _all(lines):
  """Yields the collectives of lines and how often each is run."""
  chains = set()
  for line in lines:
    if not (match := _LINE.search(line.text)):
      continue
    if chain := _CHAIN.search(line.text):
      if chain.groups() in chains:
        continue
      chains.add(chain.groups())
    for found in _read(line.text, match):
      yield found, line.times


def _read(line, match):
  """Yields what one line moves, array by array."""
  kind = match["kind"]
  arrays = _ARRAY.findall(match["shape"])
  if "-start(" in line and kind != "all-reduce":  # operands come first
    arrays = arrays[len(arrays) // 2 :]
  group = 2 if kind == "collective-permute" else _group_size(line)
  for dtype, dims in arrays:
    size = math.prod(int(d) for d in dims.split(",") if d) * _SIZES[dtype]
    received = {
      "all-gather": size * (group - 1) // group,
      "all-to-all": size * (group - 1) // group,
      "all-reduce": 2 * size * (group - 1) // group,
      "reduce-scatter": size * (group - 1),
      "collective-permute": size,
    }[kind]
    yield Collective(kind, dtype, group, received)


def _group_size(line):
  if match := _IOTA_GROUP.search(line):
    return int(match[2])
  if match := _MESH_GROUP.search(line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    # A part of an axis is written 'name':(devices before)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)
  return len(_GROUP.search(line)[1].split(","))
