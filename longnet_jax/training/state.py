"""What training carries from step to step."""

import hashlib
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax


class TrainState(NamedTuple):
  """Everything a step reads and writes; data and schedule follow from step."""

  step: Array  # int32, updates done so far
  rng: Array  # uint32 key data; a step's dropout key is this folded with step
  params: Any  # nested dict of float32 arrays
  opt_state: Any


def init_state(
  model, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """A fresh state: random parameters, zero moments, step 0."""
  init_key, step_key = jax.random.split(jax.random.key(seed))
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = model.init(init_key, tokens)["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=jax.random.key_data(step_key),
    params=params,
    opt_state=optimizer.init(params),
  )


def dropout_key(state: TrainState) -> Array:
  """The key of this step's dropout masks."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def num_parameters(params) -> int:
  """Number of scalars in a tree of arrays or of their shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def fingerprint(params) -> str:
  """sha256 over the names, types, shapes and checksums of all parameters.

  It does not depend on where the arrays lie, and no host needs the whole of
  one: devices compute the checksums. They tell a changed bit, but are no
  protection against somebody who looks for arrays with equal ones.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  # One at a time: CPU processes with many reductions in flight block.
  sums = [jax.device_get(_checksum(leaf)) for _, leaf in leaves]
  digest = hashlib.sha256()
  for (path, leaf), words in zip(leaves, sums, strict=True):
    name = jax.tree_util.keystr(path)
    words = " ".join(map(str, words))
    digest.update(f"{name} {leaf.dtype} {leaf.shape} {words}".encode())
  return digest.hexdigest()


@jax.jit
def _checksum(array: Array) -> tuple[Array, Array]:
  """Two sums modulo 2^32 of each element's bits mixed with its place.

  Unlike a hash of bytes in order, a sum is the same whichever device adds
  which part of it.
  """
  kind = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
  words = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(size % 2**32) + step

  def total(seed):
    mixed = _mix(words ^ _mix(place ^ jnp.uint32(seed)))
    return jnp.sum(mixed, dtype=jnp.uint32)

  return total(0x9E3779B9), total(0x7F4A7C15)


def _mix(word: Array) -> Array:
  """A permutation of uint32 that spreads each bit: MurmurHash3's finalizer."""
  word = (word ^ (word >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> jnp.uint32(16))
