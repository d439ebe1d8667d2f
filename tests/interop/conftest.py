"""Goldens, read once."""

import functools
import pathlib

import pytest

from longnet_jax.interop import golden

_FOLDER = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def read_golden():
  """Returns state, keyword dictionary and arrays of a golden by its name."""
  return functools.cache(lambda name: golden.read(_FOLDER / f"{name}.npz"))
