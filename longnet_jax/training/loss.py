"""Next-token cross-entropy whose logits are never whole in memory."""

import functools
import math

import jax
from jax import Array, lax
import jax.numpy as jnp
from jaxtyping import Float, Int

from longnet_jax.models import transformer
from longnet_jax.ops import chunks, kernels, tpu

# Of `_softmax_from_target`: exp(-this) is 2^-86, the part of a target.
_BELOW_TARGET = 86 * math.log(2)
# And the loss up to which a sum of parts and its inverse are in float32.
_GREATEST_LOSS = 140.0
_SUBLANES = 8  # the least columns that a TPU multiplies by


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
  run = functools.partial(_run, chunk, features, matrix, targets, weights)
  if kernels.platform() == "tpu" and features.dtype == jnp.bfloat16:
    found = run(_softmax_from_target)
    exact = jax.named_scope(tpu.RARELY)(functools.partial(run, _softmax))
    is_right = (found[0] < _GREATEST_LOSS).all()  # not so of NaN
    found = lax.cond(is_right, lambda: found, exact)
  else:
    found = run(_softmax)
  losses, dfeatures, dmatrix = found
  return jnp.sum(losses * weights), (dfeatures, dmatrix, losses)


def _run(chunk, features, matrix, targets, weights, softmax_of):
  """Returns the losses of all tokens, dfeatures and dmatrix."""
  cut, join = chunks.make_cut(targets.shape[1], chunk)

  def one_chunk(dmatrix, piece):
    x, y, weight = piece
    softmax, losses = softmax_of(x, y, matrix)
    hot = jax.nn.one_hot(y, softmax.shape[-1], dtype=softmax.dtype)
    dlogits = ((softmax - hot) * weight[..., None]).astype(x.dtype)
    dx = jnp.einsum("btv,dv->btd", dlogits, matrix.astype(x.dtype))
    dmatrix += jnp.einsum(
      "btd,btv->dv", x, dlogits, preferred_element_type=jnp.float32
    )
    return dmatrix, (losses, dx)

  pieces = tuple(map(cut, (features, targets, weights)))
  zero = jnp.zeros(matrix.shape, jnp.float32)
  dmatrix, (losses, dfeatures) = lax.scan(one_chunk, zero, pieces)
  return join(losses), join(dfeatures), dmatrix.astype(matrix.dtype)


def _backward(chunk, residuals, scale):
  del chunk
  dfeatures, dmatrix, losses = (x * scale.astype(x.dtype) for x in residuals)
  return dfeatures, dmatrix, None, losses


_weighted_sum.defvjp(_forward, _backward)


def _softmax(features, targets, matrix):
  """Returns softmax(logits) and the losses, float32."""
  logits, lse, chosen = _logits(features, targets, matrix)
  return jnp.exp(logits - lse[..., None]), lse - chosen


def _softmax_from_target(features, targets, matrix):
  """Returns what `_softmax` does, but for rounding, of bfloat16.

  exp(logits - shift) needs no second pass over the logits to find their maximum
  if the shift is known before: the target's logit is, from one column. Parts of
  the softmax then begin at 2^-86, which bfloat16 holds exactly, and those that
  are lost below are 1e-12 of it. Of losses above `_GREATEST_LOSS`, of tokens of
  any weight, it knows no more than that they are. Others may be off by what
  rounding the largest parts comes to, less than 2^-8.

  A TPU writes the parts as the product ends, in bfloat16, and adds them up as
  another product: neither logits nor a reduction of them pass through memory.
  """
  wide, dtype = jnp.float32, features.dtype
  columns = jnp.take(matrix.astype(dtype), targets, axis=1)
  chosen = jnp.einsum(
    "btd,dbt->bt", features.astype(wide), columns.astype(wide)
  )
  logits = transformer.unembed(features, matrix)
  shift = chosen + _BELOW_TARGET
  parts = jnp.exp(logits - shift[..., None]).astype(dtype)
  ones = jnp.ones((parts.shape[-1], _SUBLANES), dtype)
  # Otherwise XLA sums in a pass of its own, over float32.
  parts, ones = lax.optimization_barrier((parts, ones))
  total = jnp.einsum("btv,vk->btk", parts, ones, preferred_element_type=wide)
  log_total = jnp.log(total[..., :1])
  # Not 1 / total, whose derivative is out of range.
  softmax = parts.astype(wide) * jnp.exp(-log_total)
  return softmax, log_total[..., 0] + _BELOW_TARGET


def _logits(features, targets, matrix):
  """Returns logits, their logsumexp, and those of the targets, float32."""
  logits = transformer.unembed(features, matrix)
  return logits, jax.nn.logsumexp(logits, axis=-1), _choose(logits, targets)


def _choose(logits, targets):
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
