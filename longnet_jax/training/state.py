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
  """sha256 over the names, types, shapes and bytes of all parameters."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
