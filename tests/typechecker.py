"""What the import hook of conftest.py checks annotations with."""

import re

import beartype

_CONF = beartype.BeartypeConf(is_pep484_tower=True)  # an int is a float
_UNCHECKED = re.compile(r"(\w*Config|Pattern|Cache)\.__init__")


def check(function):
  """Returns the function with its arguments and its result checked.

  Not so the making of settings, which take lists for tuples and check what
  they are given themselves, and of pytrees, whose leaves JAX may replace.
  """
  if _UNCHECKED.fullmatch(function.__qualname__):
    return function
  return beartype.beartype(function, conf=_CONF)
