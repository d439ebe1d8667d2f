"""The whole model under every mesh equals the model on one device."""

import functools
import itertools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import attention, transformer
from longnet_jax.models import config as config_lib
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding

BATCH, LENGTH = 8, 32
CONFIG = config_lib.LongNetConfig(
  vocab_size=16,
  num_layers=2,
  model_dim=32,
  num_heads=8,
  ffn_dim=32,
  segment_lengths=(4, 12, 32),
  dilation_rates=(1, 2, 3),
  attention_dropout_rate=0.2,
  dtype="float32",
)


def batch():
  """Two documents a row, cut at different places; targets come next."""
  tokens = np.random.default_rng(0).integers(16, size=(BATCH, LENGTH + 1))
  start = 3 * np.arange(BATCH)[:, None] + 5
  position = np.arange(LENGTH)[None]
  later = position >= start
  found = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.where(later, position - start, position),
    "segment_ids": 1 + later,
  }
  return {name: x.astype(np.int32) for name, x in found.items()}


def loss_and_gradients(mesh):
  model = transformer.LongNetLM(
    CONFIG, attention.make_attention_fn(CONFIG, mesh)
  )
  tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  # The same parameters whatever the mesh.
  leaves, tree = jax.tree.flatten(shapes)
  generator = np.random.default_rng(1)
  params = tree.unflatten(
    [
      np.asarray(generator.normal(size=x.shape) * 0.3, np.float32)
      for x in leaves
    ]
  )
  placed = sharding.shardings_for(params, mesh)

  def loss(params, data):
    logits = model.apply(
      {"params": params},
      data["tokens"],
      data["positions"],
      data["segment_ids"],
      False,
      rngs={"dropout": jax.random.key(2)},
    )
    chosen = jnp.take_along_axis(logits, data["targets"][..., None], -1)
    return (jax.nn.logsumexp(logits, -1) - chosen[..., 0]).mean()

  run = jax.jit(
    jax.value_and_grad(loss),
    in_shardings=(placed, sharding.batch_sharding(mesh)),
  )
  data = sharding.place_batch(batch(), mesh, BATCH)
  return jax.device_get(run(jax.device_put(params, placed), data))


@functools.cache
def one_device():
  return loss_and_gradients(mesh_lib.make_mesh())


MESHES = [
  pytest.param(*x, marks=() if x == (2, 2, 2) else pytest.mark.slow)
  for x in itertools.product((1, 2, 4, 8), repeat=3)
  if np.prod(x) == 8
]


@pytest.mark.parametrize("data, seq, model", MESHES)
def test_equals_one_device(data, seq, model):
  loss, gradients = loss_and_gradients(mesh_lib.make_mesh(data, seq, model))
  wanted_loss, wanted = one_device()
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)

  def check(path, x, y):
    largest = abs(y).max()
    name = sharding.path_name(path)
    np.testing.assert_allclose(
      x, y, rtol=0, atol=1e-5 * max(largest, 1e-3), err_msg=name
    )

  jax.tree_util.tree_map_with_path(check, gradients, wanted)
