"""What a TPU's compiler has to be told, and others must not hear."""

from typing import TypeVar

import jax
from jax import lax

from longnet_jax.ops import kernels

# A jax.named_scope of the branch of a conditional that hardly ever runs, which
# plans of a step do not count.
RARELY = "rarely"

_Arrays = TypeVar("_Arrays")


def written_once(arrays: _Arrays) -> _Arrays:
  """Returns arrays that a TPU writes to memory before anything reads them.

  Otherwise XLA makes an array again in each of its readers where it takes that
  for cheaper, which for a cut out of a large array or for a table it is not.
  Values and derivatives are what they were, and on other platforms the program.
  """
  return _written_once(arrays) if kernels.platform() == "tpu" else arrays


@jax.custom_jvp
def _written_once(arrays):
  return lax.optimization_barrier(arrays)


@_written_once.defjvp
def _derive(primals, tangents):
  return _written_once(*primals), tangents[0]
