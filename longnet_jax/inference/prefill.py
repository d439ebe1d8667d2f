"""Prompts in, and out what decoding goes on from.

One device reads them in chunks, as it decodes. Many devices share the positions
and read all at once: the forward pass is the training one, positions over the
mesh axis `seq`. What decoding still needs of it is a few rows of each layer,
those of the segments that the prompts end in, and only these leave the layer.
"""

from collections.abc import Sequence
import functools
from typing import Any, SupportsIndex

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer
import numpy as np

from longnet_jax import checked, pattern
from longnet_jax.inference import cache as cache_lib
from longnet_jax.inference import decode, rows
from longnet_jax.models import attention, transformer
from longnet_jax.models import config as config_lib
from longnet_jax.parallel import sharding


def prefill(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  tokens: Integer[ArrayLike, "B T"],
  lengths: Sequence[int] | Integer[ArrayLike, " B"] | None = None,
  *,
  max_length: SupportsIndex | None = None,
  chunk: SupportsIndex = 512,
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
    raise checked.RefusedError(
      f"tokens have shape {tokens.shape}; it must be (B, T), both at least 1"
    )
  lowest, highest = tokens.min(), tokens.max()
  if (
    tokens.dtype.kind not in "iu" or lowest < 0 or highest >= config.vocab_size
  ):
    raise checked.RefusedError(
      f"tokens are {tokens.dtype} from {lowest} to {highest}; they must be ints"
      f" from 0 to {config.vocab_size - 1}"
    )
  batch, length = tokens.shape
  chunk = pattern.as_int("chunk", chunk)
  lengths = _checked_lengths(lengths, batch, length)
  if max_length is None and config.attention != "dilated":
    max_length = max(config.max_positions, length)
  make_cache = functools.partial(
    cache_lib.make_cache, config, batch, max_length=max_length
  )
  room = jax.eval_shape(make_cache).max_length
  if length > room:
    raise checked.RefusedError(
      f"a prompt of {length} tokens is longer than the {room} positions there"
      " is room for; shorten it"
    )
  if mesh is not None:
    return _read_over_mesh(config, params, tokens, lengths, room, mesh)
  return _read_in_chunks(config, params, tokens, lengths, make_cache(), chunk)


def _checked_lengths(lengths, batch, length):
  if lengths is None:
    return np.full(batch, length, np.int32)
  lengths = np.asarray(lengths, np.int32)
  if lengths.shape != (batch,):
    raise checked.RefusedError(
      f"lengths have shape {lengths.shape}; tokens hold {batch} prompts"
    )
  if lengths.min() < 1 or lengths.max() > length:
    raise checked.RefusedError(
      f"lengths are {lengths.tolist()}; each must be 1 to {length}, the length"
      " of tokens"
    )
  return lengths


def _read_in_chunks(config, params, tokens, lengths, cache, chunk):
  """Returns the logits after each prompt and the cache, on one device."""
  batch, length = tokens.shape
  # Powers of two, so that prompts of many lengths share one compilation.
  chunk = min(chunk, 1 << (length - 1).bit_length())
  tokens = np.pad(tokens, [(0, 0), (0, -length % chunk)])
  last = jnp.zeros((batch, config.vocab_size), jnp.float32)
  for start in range(0, length, chunk):
    counts = np.clip(lengths - start, 0, chunk)
    logits, cache = decode.read_chunk(
      config, params, cache, tokens[:, start : start + chunk], counts
    )
    last = jnp.where((counts > 0)[:, None], logits, last)
  return last, cache


def _read_over_mesh(config, params, tokens, lengths, max_length, mesh):
  """Returns the logits after each prompt and the cache, over the mesh."""
  padding = _padded(tokens.shape[1], mesh.shape["seq"]) - tokens.shape[1]
  tokens = np.pad(tokens, [(0, 0), (0, padding)])
  spec = sharding.fit(sharding.BATCH, tokens.shape, mesh)
  tokens = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, spec))
  return _read_whole(
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
def _read_whole(config, params, tokens, lengths, max_length, mesh):
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
