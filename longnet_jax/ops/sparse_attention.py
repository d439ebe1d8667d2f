"""Sparse Transformer attention in its fixed pattern, a baseline of LongNet."""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
import numpy as np

# Query rows whose scores exist at once; more fall out of cache.
_ROWS = 256


def sparse_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  block: int,
  summary: int,
  is_causal: bool = False,
  scale: float | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  dropout_rate: float = 0.0,
  dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
  """Attends to the row's own block and to the summary columns of the others.

  The summary columns are the last `summary` of each block; causal rows see
  those of earlier blocks. One softmax runs over both sets, in float32. Time is
  O(T (block + summary T / block)), that is O(T sqrt(T)) for blocks of sqrt(T);
  at most 256 rows of scores exist at once, and the backward pass computes them
  again. Source: Child et al., arXiv 1904.10509, section 4.2.

  Args:
    query: N heads of width H.
    key: K heads, a divisor of N.
    value: as the keys.
    block: local block length.
    summary: columns of each block that are shown to the others.
    is_causal: whether rows see earlier rows and themselves only.
    scale: of the scores, by default 1 / sqrt(H).
    segment_ids: rows see only those with the same number.
    dropout_rate: of the probabilities.
    dropout_key: needed for a dropout rate above 0.
  """
  batch, length, heads, width = query.shape
  if block < 1:
    raise ValueError(f"block is {block}; use at least 1")
  if not 0 <= summary <= block:
    raise ValueError(f"summary must be 0 to block={block}, got {summary}")
  if heads % key.shape[2]:
    raise ValueError(
      f"{key.shape[2]} key heads do not divide {heads} query heads"
    )
  if dropout_rate and dropout_key is None:
    raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_key")
  if not query.size:
    return query
  attend = functools.partial(
    _attend_example,
    block=min(block, length),
    summary=min(summary, length),
    is_causal=is_causal,
    scale=1 / math.sqrt(width) if scale is None else scale,
    dropout_rate=dropout_rate,
  )
  keys = jax.random.split(dropout_key, batch) if dropout_rate else None
  return jax.vmap(attend)(query, key, value, segment_ids, keys)


def _attend_example(
  query,
  key,
  value,
  segments,
  dropout_key,
  *,
  block,
  summary,
  is_causal,
  scale,
  dropout_rate,
):
  """One example (T, N, H): a loop over chunks of each block's query rows."""
  length, heads, width = query.shape
  kv_heads = key.shape[1]
  blocks = -(-length // block)
  rows = min(block, _ROWS)
  chunks = -(-block // rows)

  def split(x):
    padding = [(0, blocks * block - length)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(blocks, block, *x.shape[1:])

  positions = np.arange(blocks * block, dtype=np.int32).reshape(blocks, block)
  columns = jax.tree.map(
    lambda x: jnp.asarray(x) if x is positions else split(x),
    {"key": key, "value": value, "position": positions, "segment": segments},
  )
  summaries = jax.tree.map(
    lambda x: x[:, block - summary :].reshape(-1, *x.shape[2:]), columns
  )
  grouped = query.reshape(length, kv_heads, heads // kv_heads, width)
  chunked = jnp.pad(
    split(grouped), [(0, 0), (0, chunks * rows - block)] + [(0, 0)] * 3
  ).reshape(blocks * chunks, rows, *grouped.shape[1:])

  @jax.checkpoint
  def attend(index, query):
    own, chunk = index // chunks, index % chunks
    local = jax.tree.map(lambda x: x[own], columns)
    seen = jax.tree.map(lambda *parts: jnp.concatenate(parts), local, summaries)
    # Rows past the block's end are padding that the caller cuts off.
    row = jnp.minimum(chunk * rows + jnp.arange(rows), block - 1)
    visible = _visible(
      jax.tree.map(lambda x: x[row], local), seen, own, block, is_causal
    )
    visible &= (seen["position"] < length)[None]
    key = (
      None if dropout_key is None else jax.random.fold_in(dropout_key, index)
    )
    return _attend(query, seen, visible, scale, dropout_rate, key)

  out = lax.map(lambda x: attend(*x), (jnp.arange(blocks * chunks), chunked))
  out = out.reshape(blocks, chunks * rows, heads, width)[:, :block]
  return out.reshape(blocks * block, heads, width)[:length]


def _visible(rows, seen, own, block, is_causal):
  """Returns which of the seen columns each row attends to, (rows, columns)."""
  # The own block comes first; its summary columns are not counted twice.
  is_local = np.arange(seen["position"].size) < block
  visible = jnp.broadcast_to(
    (is_local | (seen["position"] // block != own))[None],
    (rows["position"].size, seen["position"].size),
  )
  if is_causal:
    visible &= rows["position"][:, None] >= seen["position"][None]
  if rows["segment"] is not None:
    visible &= rows["segment"][:, None] == seen["segment"][None]
  return visible


def _attend(query, seen, visible, scale, dropout_rate, dropout_key):
  """Softmax attention of one chunk of rows, query (rows, K, N / K, H)."""
  scores = scale * jnp.einsum(
    "rkgh,skh->kgrs", query, seen["key"], preferred_element_type=jnp.float32
  )
  # A finite bound: padding rows, which see nothing, must not become NaN.
  scores = jnp.where(visible[None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores)
  if dropout_rate:
    kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
    weights = jnp.where(kept, weights / (1 - dropout_rate), 0.0)
  return jnp.einsum(
    "kgrs,skh->rkgh", weights.astype(query.dtype), seen["value"]
  )
