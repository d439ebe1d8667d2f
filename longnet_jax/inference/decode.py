"""Logits of a language model that reads on, token by token or in chunks.

Every logit equals that of the full forward pass over the same tokens, at a cost
per token and in a memory that do not depend on how many came before.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from longnet_jax.inference import cache as cache_lib
from longnet_jax.inference import cached_attention
from longnet_jax.models import attention, transformer
from longnet_jax.models import config as config_lib


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  cache: cache_lib.Cache,
  token: Int[ArrayLike, " B"],
) -> tuple[Float[Array, "B V"], cache_lib.Cache]:
  """Reads one token of each example and returns the logits of the next.

  The given cache is donated: use the returned one. Past `cache.max_length`
  positions the logits are NaN.
  """
  return read_chunk(config, params, cache, token[:, None], jnp.ones_like(token))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read_chunk(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  cache: cache_lib.Cache,
  tokens: Int[Array, "B C"],
  counts: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], cache_lib.Cache]:
  """Reads the first `counts` tokens of each row; returns the last's logits.

  The chunk starts at `cache.position`, a multiple of C. The given cache is
  donated.
  """
  features, cache = transformer.LongNetLM(config).apply(
    {"params": params}, cache, tokens, counts, method=_last_features
  )
  matrix = transformer.output_matrix(params)
  logits = transformer.unembed(features, matrix)[:, 0]
  # Of the last token read: the next position may not fit into int32.
  fits = cache.position - 1 <= cache.max_length - 1
  return jnp.where(fits[:, None], logits, jnp.nan), cache


def _last_features(model, cache, tokens, counts):
  """Returns the features (B, 1, D) of the last token that exists."""
  config = model.config
  positions = cache.position[:, None] + jnp.arange(tokens.shape[1])[None]
  rotation = attention.make_rotation(config, positions)

  def body(block, carry, layer):
    x, cache = carry
    query, key, value = block.project(x, rotation)
    attended, cache = cached_attention.attend(
      config, cache, layer, query, key, value, counts
    )
    return (block.complete(x, attended), cache), None

  # The cache is carried, not scanned over: it is then updated in place.
  scan = nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=config.num_layers,
  )
  x = transformer.embed(model.embedding, tokens, config)
  layers = jnp.arange(config.num_layers)
  (x, cache), _ = scan(model.layers, (x, cache), layers)
  last = jnp.maximum(counts - 1, 0)[:, None, None]
  x = jnp.take_along_axis(x, last, axis=1)
  if config.norm_position == "pre":
    x = model.final_norm(x)
  return x, cache.replace(position=cache.position + counts)
