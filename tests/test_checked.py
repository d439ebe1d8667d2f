"""Configs checked by their annotations: types, ranges, keys and words."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from longnet_jax import checked


@dataclasses.dataclass(frozen=True)
class _Inner:
  rate: checked.Share = 0.1

  def __post_init__(self):
    checked.check_fields(self)


@dataclasses.dataclass(frozen=True)
class _Config:
  count: checked.Count
  kind: Literal["a", "b"] = "a"
  heads: checked.Count | None = None
  sizes: tuple[checked.Count, ...] = ()
  power: Annotated[float, checked.Range(above=0, at_most=2, why="tried")] = 1
  inner: _Inner = _Inner()

  def __post_init__(self):
    checked.check_fields(self)


def test_a_mapping_becomes_a_config_of_exact_types():
  config = checked.from_mapping(
    _Config, {"count": 3, "sizes": [4, 5], "inner": {"rate": 0}}
  )
  assert config == _Config(3, sizes=(4, 5), inner=_Inner(0.0))
  assert type(config.inner.rate) is type(config.power) is float
  assert hash(config)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"count": 0}, "count is 0; it must be at least 1"),
    ({"count": 10**22}, f"count is {10**22}; it must be at most 2147483647"),
    ({"count": True}, "count is True; it must be a whole number such as 4"),
    ({"count": None}, "count is None; it must be a whole number such as 4"),
    ({"kind": 1}, "kind is 1; it must be one of a, b"),
    ({"heads": 1.5}, "heads is 1.5; it must be a whole number such as 4"),
    ({"sizes": "12"}, "sizes is '12'; it must be a tuple such as"),
    ({"sizes": (1, 0)}, "sizes[1] is 0; it must be at least 1"),
    ({"power": 0}, "power is 0.0; it must be above 0 (tried)"),
    ({"power": math.nan}, "power is nan; it must be finite, such as 0.1"),
    ({"power": -math.inf}, "power is -inf; it must be finite, such as 0.1"),
    ({"power": 10**400}, "00...; it must be finite, such as 0.1"),
    ({"power": 10**5000}, "power is a number of thousands of digits; it must"),
    ({"inner": {"rate": 1.0}}, "inner.rate is 1.0; it must be below 1"),
    ({"inner": {"rat": 1}}, "no key inner.rat; did you mean inner.rate?"),
    ({"inner": 3}, "inner is 3; it must be a group of keys"),
    ({"zzz": 1}, "the config has no key zzz; known: count, heads, inner, kind"),
  ],
)
def test_refusals_name_the_key_the_value_and_a_legal_choice(settings, message):
  with pytest.raises(checked.RefusedError) as caught:
    checked.from_mapping(_Config, {"count": 1} | settings)
  assert message in str(caught.value)


def test_a_missing_key_is_named():
  with pytest.raises(checked.RefusedError, match="has no count; it has no def"):
    checked.from_mapping(_Config, {})


def test_at_most_80_characters_of_a_value_are_shown():
  assert len(checked.shown("x" * 1000)) == 80
  with pytest.raises(checked.RefusedError) as caught:
    checked.from_mapping(_Config, {"count": "x" * 1000, "y" * 1000: 1})
  assert len(str(caught.value)) < 200


@pytest.mark.parametrize("number", [1, 2, 36, 97, 2**25 * 3])
def test_divisors(number):
  found = checked.divisors(number)
  assert found == sorted(set(found)) and found[0] == 1 and found[-1] == number
  assert all(number % n == 0 for n in found)
  if number < 100:
    assert found == [n for n in range(1, number + 1) if number % n == 0]
