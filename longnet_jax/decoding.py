"""Logits of a language model that reads prompts in chunks, then token by token.

Every logit equals that of the full forward pass over the same tokens, at a cost
per token and in a memory that do not depend on how many came before.
"""

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Integer
import numpy as np

from longnet_jax import parallel_prefill
from longnet_jax.models import attention, cached_attention, transformer
from longnet_jax.models import cache as cache_lib
from longnet_jax.models import config as config_lib


def prefill(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  tokens: Integer[ArrayLike, "B T"],
  lengths: Sequence[int] | Integer[ArrayLike, " B"] | None = None,
  *,
  max_length: int | None = None,
  chunk: int = 512,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Float[Array, "B V"], cache_lib.Cache]:
  """Reads prompts and returns what `decode_step` goes on from.

  Beyond the cache and the tokens, memory depends on `chunk` and not on T.

  Args:
    config: of the model.
    params: of the model.
    tokens: prompts, filled up on the right with anything.
    lengths: of each prompt; all T by default.
    max_length: positions, prompt included, that a dense or sparse cache makes
      room for: config.max_positions or T by default, whichever is longer.
      Dilated attention needs no bound; one shorter than a segment saves bytes.
    chunk: rows of each prompt that are computed at once; results do not depend
      on it.
    mesh: of `parallel.mesh.make_mesh`. Its `seq` devices share the positions of
      the whole prompts, which they read at once and not in chunks; `data` the
      prompts, `model` the heads. The cache lies over the mesh. To decode there,
      give `decode_step` parameters that do, by
      `parallel.sharding.place_for_reading(params, mesh)`; to decode on one
      device, move the cache to it with `jax.device_put`.

  Returns:
    The logits after each prompt's last token, and the cache.

  Raises:
    ValueError: a length or the chunk is out of range, or the positions cannot
      number the prompt.
  """
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not tokens.size:
    raise ValueError(
      f"tokens have shape {tokens.shape}; it must be (B, T), both at least 1"
    )
  lowest, highest = tokens.min(), tokens.max()
  if (
    tokens.dtype.kind not in "iu" or lowest < 0 or highest >= config.vocab_size
  ):
    raise ValueError(
      f"tokens are {tokens.dtype} from {lowest} to {highest}; they must be ints"
      f" from 0 to {config.vocab_size - 1}"
    )
  batch, length = tokens.shape
  if chunk < 1:
    raise ValueError(f"chunk is {chunk}; it must be at least 1")
  lengths = _checked_lengths(lengths, batch, length)
  if max_length is None and config.attention != "dilated":
    max_length = max(config.max_positions, length)
  make_cache = functools.partial(
    cache_lib.make_cache, config, batch, max_length=max_length
  )
  room = jax.eval_shape(make_cache).max_length
  if length > room:
    raise ValueError(
      f"a prompt of {length} tokens is longer than the {room} positions there"
      " is room for; shorten it"
    )
  if mesh is not None:
    return parallel_prefill.read(
      config, params, tokens, lengths, max_length=room, mesh=mesh
    )
  cache = make_cache()
  # Powers of two, so that prompts of many lengths share one compilation.
  chunk = min(chunk, 1 << (length - 1).bit_length())
  tokens = np.pad(tokens, [(0, 0), (0, -length % chunk)])
  last = jnp.zeros((batch, config.vocab_size), jnp.float32)
  for start in range(0, length, chunk):
    counts = np.clip(lengths - start, 0, chunk)
    logits, cache = _read(
      config, params, cache, tokens[:, start : start + chunk], counts
    )
    last = jnp.where((counts > 0)[:, None], logits, last)
  return last, cache


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
  return _read(config, params, cache, token[:, None], jnp.ones_like(token))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(config, params, cache, tokens, counts):
  """Reads the first `counts` (B,) of tokens (B, C); returns the last's logits.

  The chunk starts at `cache.position`, a multiple of C.
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


def _checked_lengths(lengths, batch, length):
  if lengths is None:
    return np.full(batch, length, np.int32)
  lengths = np.asarray(lengths, np.int32)
  if lengths.shape != (batch,):
    raise ValueError(
      f"lengths have shape {lengths.shape}; tokens hold {batch} prompts"
    )
  if lengths.min() < 1 or lengths.max() > length:
    raise ValueError(
      f"lengths are {lengths.tolist()}; each must be 1 to {length}, the length"
      " of tokens"
    )
  return lengths
