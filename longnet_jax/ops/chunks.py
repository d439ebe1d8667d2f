"""Positions in chunks, of which one at a time is in memory."""

from collections.abc import Callable

from jax import numpy as jnp
from jaxtyping import Array, Shaped

_Cut = Callable[[Shaped[Array, "B T *rest"]], Shaped[Array, "C B R *rest"]]
_Join = Callable[[Shaped[Array, "C B R *rest"]], Shaped[Array, "B T *rest"]]


def make_cut(length: int, chunk: int) -> tuple[_Cut, _Join]:
  """Returns what cuts T positions into chunks of R, zeros at the end, and back.

  A chunk is every C-th position rather than a run of neighbours: then each
  device of a sharded sequence holds its share of every chunk.

  Args:
    length: T.
    chunk: the most positions of a chunk.
  """
  chunks = -(-length // chunk)
  rows = -(-length // chunks)

  def cut(x):
    padding = [(0, 0), (0, rows * chunks - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding).reshape(x.shape[0], rows, chunks, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], rows * chunks, *x.shape[3:])[:, :length]

  return cut, join
