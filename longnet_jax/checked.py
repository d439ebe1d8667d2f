"""Configs checked by their annotations, and the error of all that is refused.

A config is a frozen dataclass whose annotations say what a field may be:

  window: checked.Count
  layout: Literal["packed", "long"]
  dropout_rate: checked.Share

Its `__post_init__` calls `check_fields`, then refuses what does not fit
together. Every refusal reads "NAME is VALUE; it must be LEGAL".
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from typing import Annotated, Any, Literal, NoReturn

_MOST_SHOWN = 80
_KINDS = {
  int: "a whole number such as 4",
  float: "a number such as 0.1",
  str: "a string",
  bool: "True or False",
}
_HOLDS = {
  "at_least": operator.ge,
  "above": operator.gt,
  "at_most": operator.le,
  "below": operator.lt,
}


class RefusedError(ValueError):
  """What a user gave and cannot be: a setting, a flag, a file, a folder.

  The text is one line that names the value and a legal choice; commands print
  it without a traceback. Any other ValueError is a call against a contract.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
  """Bounds of a number, written into its annotation.

  Attributes:
    at_least: smallest legal value.
    above: largest value that is too small.
    at_most: largest legal value.
    below: smallest value that is too large.
    why: what the bounds come from, for those who break them.
  """

  at_least: float | None = None
  above: float | None = None
  at_most: float | None = None
  below: float | None = None
  why: str = ""

  def check(self, name: str, value: float) -> None:
    """Raises RefusedError naming the bound that `value` breaks."""
    for word, holds in _HOLDS.items():
      bound = getattr(self, word)
      if bound is not None and not holds(value, bound):
        why = f" ({self.why})" if self.why else ""
        refuse(name, value, f"{word.replace('_', ' ')} {bound}{why}")


# Arrays and counters hold int32.
Count = Annotated[int, Range(at_least=1, at_most=2**31 - 1)]
CountOrZero = Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
# Random keys are made of 32 bits.
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
Share = Annotated[float, Range(at_least=0, below=1)]
# The lower end is far from where float32 becomes 0.
Epsilon = Annotated[float, Range(at_least=1e-30, at_most=1)]


def refuse(name: str, value: Any, legal: str) -> NoReturn:
  """Raises RefusedError for the value of a setting."""
  raise RefusedError(f"{name} is {shown(value)}; it must be {legal}")


def shown(value: Any) -> str:
  """At most 80 characters of the repr of a value."""
  try:
    return cut(repr(value))
  except ValueError:  # Python prints integers of up to 4300 digits
    return "a number of thousands of digits"


def cut(text: str) -> str:
  """At most 80 characters of a text."""
  return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def check_fields(config: Any) -> None:
  """Checks each field of a frozen dataclass against its annotation.

  Lists become tuples, and whole numbers in the place of a float floats.
  """
  for name, hint in _hints(type(config)).items():
    value = _checked(hint, getattr(config, name), name)
    object.__setattr__(config, name, value)


def from_mapping(cls: type, settings: Mapping[str, Any], prefix: str = ""):
  """An instance of a dataclass from a mapping, nested ones from nested ones.

  Raises RefusedError naming the key, with `prefix` before it: an unknown one
  with its nearest neighbour, a missing one, or one with an illegal value.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  check_keys(settings, fields, prefix)
  values = {}
  for name, field in fields.items():
    if name in settings:
      values[name] = settings[name]
      hint = _hints(cls)[name]
      if dataclasses.is_dataclass(hint):
        values[name] = _group(hint, settings[name], prefix + name)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise RefusedError(f"the config has no {prefix}{name}; it has no default")
  try:
    return cls(**values)
  except RefusedError as error:
    raise RefusedError(f"{prefix}{error}") from error


def check_keys(
  settings: Iterable[str], known: Iterable[str], prefix: str = ""
) -> None:
  """Raises RefusedError for a key that is not known, naming the nearest."""
  known = [prefix + key for key in known]
  for key in settings:
    if f"{prefix}{key}" not in known:
      raise RefusedError(unknown_key(f"{prefix}{key}", known))


def unknown_key(key: str, known: Iterable[str]) -> str:
  """The message for a dotted key that does not exist, naming the nearest."""
  group, _, name = key.rpartition(".")
  siblings = {
    k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group
  }
  names = siblings or {k: k for k in known}
  near = difflib.get_close_matches(name if siblings else key, names, n=1)
  hint = (
    f"did you mean {names[near[0]]}?"
    if near
    else f"known: {', '.join(sorted(names.values()))}"
  )
  return f"the config has no key {cut(key)}; {hint}"


def divisors(number: int) -> list[int]:
  """All divisors of a number from 1 on, in order: what a refusal may advise."""
  small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
  return sorted({*small, *(number // n for n in small)})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls, include_extras=True)


def _group(cls, settings, path):
  if not isinstance(settings, Mapping):
    refuse(path, settings, "a group of keys")
  return from_mapping(cls, settings, f"{path}.")


def _checked(hint, value, name):
  """`value` as the annotation wants it, or RefusedError."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    kind, *ranges = arguments
    value = _checked(kind, value, name)
    for each in ranges:
      each.check(name, value)
    return value
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in arguments:
      return None
    (hint,) = (a for a in arguments if a is not type(None))
    return _checked(hint, value, name)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      refuse(name, value, "a tuple such as (2048,) or ('*.py',)")
    return tuple(
      _checked(arguments[0], entry, f"{name}[{index}]")
      for index, entry in enumerate(value)
    )
  if origin is Literal:
    if not any(type(value) is type(a) and value == a for a in arguments):
      several = "one of " if len(arguments) > 1 else ""
      refuse(name, value, several + ", ".join(map(str, arguments)))
    return value
  if hint is float:
    return _float(value, name)
  if type(value) is not hint and not dataclasses.is_dataclass(hint):
    refuse(name, value, _KINDS[hint])
  return value


def _float(value, name):
  if type(value) not in (int, float):
    refuse(name, value, _KINDS[float])
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number):
    refuse(name, value, "finite, such as 0.1")
  return number
