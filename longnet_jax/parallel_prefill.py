"""Prompts read all at once by many devices, which share their positions.

The forward pass is the training one, positions over the mesh axis `seq`. What
decoding still needs of it is a few rows of each layer, those of the segments
that the prompts end in, and only these leave the layer.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from longnet_jax.models import attention, transformer
from longnet_jax.models import cache as cache_lib
from longnet_jax.models import config as config_lib
from longnet_jax.parallel import rows, sharding


def read(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, " B"],
  *,
  max_length: int | None,
  mesh: jax.sharding.Mesh,
) -> tuple[Float[Array, "B V"], cache_lib.Cache]:
  """Returns the logits after each prompt and the cache, over the mesh.

  Args:
    config: of the model.
    params: of the model, on the mesh or not.
    tokens: prompts, filled up on the right.
    lengths: of each prompt, 1 to T.
    max_length: as `cache.make_cache`.
    mesh: a mesh of `make_mesh`.
  """
  padding = _padded(tokens.shape[1], mesh.shape["seq"]) - tokens.shape[1]
  tokens = np.pad(tokens, [(0, 0), (0, padding)])
  spec = sharding.fit(sharding.BATCH, tokens.shape, mesh)
  tokens = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, spec))
  return _read(
    config,
    sharding.place_for_reading(params, mesh),
    tokens,
    jnp.asarray(lengths, jnp.int32),
    max_length,
    mesh,
  )


def _padded(length, shards):
  """Returns a length that `shards` divide, and that many prompts share.

  At most an eighth is added: eight lengths and compilations an octave.
  """
  step = max(1, (1 << (length - 1).bit_length()) // 16)
  length = -(-length // step) * step
  return -(-length // shards) * shards


@functools.partial(jax.jit, static_argnames=("config", "max_length", "mesh"))
def _read(config, params, tokens, lengths, max_length, mesh):
  """Compiled once for each padded length."""
  shapes = jax.eval_shape(
    lambda: cache_lib.make_cache(config, len(lengths), max_length=max_length)
  )
  last, keys, values = transformer.LongNetLM(config).apply(
    {"params": params}, shapes, tokens, lengths, mesh, method=_last_and_kept
  )
  logits = transformer.unembed(last, transformer.output_matrix(params))[:, 0]
  cache = shapes.replace(keys=keys, values=values, position=lengths)
  placed = sharding.cache_shardings(cache, mesh)
  return logits, jax.lax.with_sharding_constraint(cache, placed)


def _last_and_kept(model, shapes, tokens, lengths, mesh):
  """Returns the last features (B, 1, D), and the keys and values to keep."""
  config = model.config
  attend = attention.make_attention_fn(config, mesh)
  branches = cache_lib.branches(config, shapes.max_length)
  held = [
    cache_lib.held_positions(branch, keys.shape[3], lengths)
    for branch, keys in zip(branches, shapes.keys, strict=True)
  ]
  # What was filled in has no number of its own, and nothing looks at it.
  positions = jnp.minimum(jnp.arange(tokens.shape[1])[None], lengths.max() - 1)
  rotation = attention.make_rotation(config, positions)

  def keep(x):
    return tuple(
      rows.take(x, where, jnp.asarray(branch.kv_heads), mesh=mesh)
      for branch, where in zip(branches, held, strict=True)
    )

  def body(block, x, _):
    query, key, value = block.project(x, rotation)
    attended = attend(
      query,
      key,
      value,
      is_causal=True,
      segment_ids=None,
      dropout_rate=0.0,
      dropout_key=None,
      scale=None,
    )
    return block.complete(x, attended), (keep(key), keep(value))

  scan = nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=config.num_layers,
    out_axes=1,
  )
  x = transformer.embed(model.embedding, tokens, config)
  x, (keys, values) = scan(model.layers, x, None)
  ends = (lengths - 1)[:, None, None]
  x = rows.take(x[:, :, None], ends, jnp.zeros(1, jnp.int32), mesh=mesh)[:, 0]
  return (
    model.final_norm(x) if config.norm_position == "pre" else x,
    keys,
    values,
  )
