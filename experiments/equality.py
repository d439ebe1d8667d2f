"""Whether a mesh changes the result: attention and whole models, compared.

Errors are the largest difference from one device over the largest entry, of
values and gradients. What attention is compared with is the dense reference,
which masks a full matrix of scores and knows no shards.
"""

import functools

import jax
from jax import numpy as jnp
import numpy as np

from longnet_jax.models import attention, transformer
from longnet_jax.models import config as config_lib
from longnet_jax.ops import dilated_attention
from longnet_jax.parallel import sequence, sharding

BATCH, HEADS, WIDTH = 2, 4, 8
# name: T, key heads, branches and options; on 8 devices of 8 rows segments lie
# inside a shard, equal it, span 2, 3, 4 and all, straddle shards and are cut.
CASES = {
  "inside": (64, 4, (4, 8), (1, 3), {}),
  "spans 2, 4, all": (64, 4, (16, 32, 64), (1, 2, 4), {}),
  "spans 3": (64, 4, (24,), (5,), {}),
  "ragged length": (59, 4, (8, 20, 64), (1, 3, 6), {}),
  "grouped heads": (64, 2, (8, 32), (1, 3), {}),
  "blocked phase": (64, 4, (16, 64), (2, 3), {"head_phase": "blocked"}),
  "documents, lengths": (59, 2, (8, 24, 64), (1, 2, 4), {"masks": True}),
  "dropout": (64, 4, (8, 32), (1, 3), {"dropout_rate": 0.3}),
}
# Heads, width and layers that every mesh of 8 devices divides.
_MODEL = {
  "vocab_size": 16,
  "num_layers": 2,
  "model_dim": 32,
  "num_heads": 8,
  "ffn_dim": 32,
  "segment_lengths": (4, 12, 32),
  "dilation_rates": (1, 2, 3),
  "sparse_block": 8,
  "sparse_summary": 2,
  "attention_dropout_rate": 0.2,
  "dtype": "float32",
}
_ROWS, _LENGTH = 8, 32


def attention_error(name: str, is_causal: bool, mesh: jax.sharding.Mesh):
  """Returns the error of one of `CASES` under a mesh of `make_mesh`."""
  found = _attend(sequence.over_mesh(mesh), name, is_causal)
  return largest_error(found, _wanted(name, is_causal))


def largest_error(found, wanted) -> float:
  """Returns the largest error over the arrays of two equal trees."""

  def error(x, y):
    return float(abs(x - y).max() / abs(y).max())

  return max(jax.tree.leaves(jax.tree.map(error, found, wanted)))


@functools.cache
def _wanted(name, is_causal):
  dense = functools.partial(
    dilated_attention.dilated_attention, implementation="reference"
  )
  return _attend(dense, name, is_causal)


def _attend(attend, name, is_causal):
  """Returns out, dquery, dkey, dvalue of a case."""
  length, kv_heads, lengths, rates, options = CASES[name]
  options = dict(options)
  *tensors, dout = (
    jax.random.normal(jax.random.key(i), (BATCH, length, n, WIDTH))
    for i, n in enumerate((HEADS, kv_heads, kv_heads, HEADS))
  )
  traced = {}
  if options.pop("masks", False):
    starts = jnp.array([[length // 3], [length // 2]])
    later = jnp.arange(length)[None] >= starts
    traced["segment_ids"] = later.astype(jnp.int32)
    traced["key_value_seq_lengths"] = jnp.array([length - 7, length])
  if "dropout_rate" in options:
    traced["dropout_key"] = jax.random.key(len(tensors))
  options.update(segment_lengths=lengths, dilation_rates=rates)

  @jax.jit
  def run(tensors, dout, traced):
    call = functools.partial(attend, is_causal=is_causal, **options, **traced)
    out, vjp = jax.vjp(call, *tensors)
    return out, *vjp(dout)

  return jax.device_get(run(tensors, dout, traced))


def model_config(core: str) -> config_lib.LongNetConfig:
  """Returns a model that every mesh of 8 devices divides, for any core."""
  return config_lib.LongNetConfig(**_MODEL, attention=core)


def model_loss(core: str, mesh: jax.sharding.Mesh):
  """Returns loss and gradients of a decoder on two documents a row.

  Positions start again with each document, targets cross the borders of
  shards, and parameters, data and dropout are the same whatever the mesh.
  """
  config = model_config(core)
  model = transformer.LongNetLM(
    config, attention.make_attention_fn(config, mesh)
  )
  params = _params(model)
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
  data = sharding.place_batch(_batch(), mesh, _ROWS)
  return jax.device_get(run(jax.device_put(params, placed), data))


def _params(model):
  """Returns random parameters that do not depend on a mesh."""
  tokens = jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  generator = np.random.default_rng(1)
  return tree.unflatten(
    [
      np.asarray(generator.normal(size=x.shape) * 0.3, np.float32)
      for x in leaves
    ]
  )


def _batch():
  """Two documents a row, cut at different places; targets come next."""
  tokens = np.random.default_rng(0).integers(16, size=(_ROWS, _LENGTH + 1))
  start = 3 * np.arange(_ROWS)[:, None] + 5
  position = np.arange(_LENGTH)[None]
  later = position >= start
  found = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.where(later, position - start, position),
    "segment_ids": 1 + later,
  }
  return {name: x.astype(np.int32) for name, x in found.items()}
