"""Next-token cross-entropy whose logits are never whole in memory."""

import functools

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int


def cross_entropy(
  features: Float[Array, "B T D"],
  matrix: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Weighted sum of token losses in nats, and the sum of the weights.

  The pair, rather than their ratio, is what adds up exactly over the parts of
  an accumulated batch and over the batches of an evaluation.
  """
  losses = token_losses(features, matrix, targets, chunk=chunk)
  return jnp.sum(losses * weights), jnp.sum(weights)


def token_losses(
  features: Float[Array, "B T D"],
  matrix: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  *,
  chunk: int,
) -> Float[Array, "B T"]:
  """-log softmax(features @ matrix)[target] in nats, float32.

  At most (B, chunk, V) logits exist at a time, in the backward pass too, where
  they are computed again. Products take the type of the features; sums and the
  softmax are float32.
  """
  length = targets.shape[1]
  chunks = -(-length // chunk)
  rows = -(-length // chunks)
  # A chunk is every chunks-th position rather than a run of neighbours: then
  # each device of a sharded sequence holds its share of every chunk.
  split = functools.partial(_split, rows=rows, chunks=chunks)
  one_chunk = jax.checkpoint(functools.partial(_chunk_losses, matrix))
  if chunks == 1:
    return one_chunk(features, targets)
  losses = jax.lax.map(
    lambda pair: one_chunk(*pair), (split(features), split(targets))
  )
  losses = jnp.moveaxis(losses, 0, 2)
  return losses.reshape(losses.shape[0], rows * chunks)[:, :length]


def _split(array: Array, rows: int, chunks: int) -> Array:
  """(B, T, ...) -> (chunks, B, rows, ...), padded with zeros at the end."""
  batch, length, *rest = array.shape
  padding = [(0, 0), (0, rows * chunks - length)] + [(0, 0)] * len(rest)
  array = jnp.pad(array, padding).reshape(batch, rows, chunks, *rest)
  return jnp.moveaxis(array, 2, 0)


def _chunk_losses(matrix: Array, features: Array, targets: Array) -> Array:
  logits = jnp.einsum(
    "btd,dv->btv",
    features,
    matrix.astype(features.dtype),
    preferred_element_type=jnp.float32,
  )
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen
