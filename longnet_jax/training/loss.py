"""Next-token cross-entropy whose logits are never whole in memory."""

import functools

import jax
from jax import Array, lax
import jax.numpy as jnp
from jaxtyping import Float, Int

from longnet_jax.models import transformer
from longnet_jax.ops import chunks, kernels


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

  The gradients of a chunk, with p the softmax of its logits, y the targets,

    dlogits = weight (p - y),  dfeatures = dlogits matrix^T,
    dmatrix = features^T dlogits,

  are made where its logits are, so that none are computed a second time.
  """
  total = _weighted_sum(features, matrix, targets, weights, chunk)
  return total, jnp.sum(weights)


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
  cut, join = chunks.make_cut(targets.shape[1], chunk)

  @jax.checkpoint
  def one_chunk(pair):
    _, lse, chosen = _logits(*pair, matrix)
    return lse - chosen

  return join(lax.map(one_chunk, (cut(features), cut(targets))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_sum(features, matrix, targets, weights, chunk):
  losses = token_losses(features, matrix, targets, chunk=chunk)
  return jnp.sum(losses * weights)


def _forward(features, matrix, targets, weights, chunk):
  """Returns the sum, and the gradients of it."""
  cut, join = chunks.make_cut(targets.shape[1], chunk)
  on_tpu = kernels.platform() == "tpu" and features.dtype == jnp.bfloat16
  softmax_of = _softmax_of_two_products if on_tpu else _softmax

  def one_chunk(dmatrix, piece):
    x, y, weight = piece
    softmax, lse, chosen = softmax_of(x, y, matrix)
    hot = jax.nn.one_hot(y, softmax.shape[-1], dtype=softmax.dtype)
    dlogits = ((softmax - hot) * weight[..., None]).astype(x.dtype)
    dx = jnp.einsum("btv,dv->btd", dlogits, matrix.astype(x.dtype))
    dmatrix += jnp.einsum(
      "btd,btv->dv", x, dlogits, preferred_element_type=jnp.float32
    )
    return dmatrix, (lse - chosen, dx)

  pieces = tuple(map(cut, (features, targets, weights)))
  zero = jnp.zeros(matrix.shape, jnp.float32)
  dmatrix, (losses, dfeatures) = lax.scan(one_chunk, zero, pieces)
  losses = join(losses)
  residuals = join(dfeatures), dmatrix.astype(matrix.dtype), losses
  return jnp.sum(losses * weights), residuals


def _backward(chunk, residuals, scale):
  del chunk
  dfeatures, dmatrix, losses = (x * scale.astype(x.dtype) for x in residuals)
  return dfeatures, dmatrix, None, losses


_weighted_sum.defvjp(_forward, _backward)


def _softmax(features, targets, matrix):
  """Returns softmax(logits), logsumexp and the targets' logits, float32."""
  logits, lse, chosen = _logits(features, targets, matrix)
  return jnp.exp(logits - lse[..., None]), lse, chosen


def _softmax_of_two_products(features, targets, matrix):
  """Returns what `_softmax` does, its first rounded to bfloat16.

  A TPU is sooner done with a second product than with logits in float32 that go
  to memory and come back: the maximum is taken where the first one ends, and
  the exponential where the second one does.
  """
  logits = transformer.unembed(features, matrix)
  chosen = _choose(logits, targets)
  most = logits.max(axis=-1, keepdims=True)
  again = transformer.unembed(lax.optimization_barrier(features), matrix)
  exponentials = jnp.exp(again - most)
  total = exponentials.sum(axis=-1, keepdims=True)
  rounded = lax.optimization_barrier(exponentials.astype(features.dtype))
  lse = (most + jnp.log(total))[..., 0]
  return rounded.astype(jnp.float32) / total, lse, chosen


def _logits(features, targets, matrix):
  """Returns logits, their logsumexp, and those of the targets, float32."""
  logits = transformer.unembed(features, matrix)
  return logits, jax.nn.logsumexp(logits, axis=-1), _choose(logits, targets)


def _choose(logits, targets):
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
