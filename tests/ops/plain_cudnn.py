"""cuDNN's two functions in plain jnp, as strict as what they stand in for."""

import contextlib
from unittest import mock

import jax
from jax import numpy as jnp

from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import cudnn_attention


@contextlib.contextmanager
def installed():
  """As on a GPU, and float32 is taken, too: errors are not hidden in bf16."""
  plain = cudnn_attention.Primitives(forward, backward)
  with (
    mock.patch.object(cudnn_attention, "primitives", lambda: plain),
    mock.patch.object(cudnn_attention, "TYPES", ("bfloat16", "float32")),
    kernels.compiling_for("gpu"),
  ):
    yield


def forward(query, key, value, lengths, *, scale, is_causal):
  scores = _scores(query, key, lengths, scale, is_causal)
  lse = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - lse[..., None])
  out = jnp.einsum("gnqk,gknh->gqnh", weights, _wide(value, query))
  return out.astype(query.dtype), lse


def backward(query, key, value, lengths, out, lse, dout, *, scale, is_causal):
  assert out.dtype == dout.dtype == query.dtype and lse.dtype == jnp.float32
  assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
  scores = _scores(query, key, lengths, scale, is_causal)
  # In base 2, where the largest float overflows.
  log2e = jnp.float32(1.4426950408889634)
  weights = jnp.exp2(scores * log2e - (lse * log2e)[..., None])
  out, dout = (x.astype(jnp.float32) for x in (out, dout))
  delta = (out * dout).sum(-1).swapaxes(1, 2)
  dweights = jnp.einsum("gqnh,gknh->gnqk", dout, _wide(value, query))
  dscores = weights * (dweights - delta[..., None]) * scale
  dquery = jnp.einsum("gnqk,gknh->gqnh", dscores, _wide(key, query))
  dkey = jnp.einsum("gnqk,gqnh->gknh", dscores, query.astype(jnp.float32))
  dvalue = jnp.einsum("gnqk,gqnh->gknh", weights, dout)

  def shared(x):
    return x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[-1]).sum(3)

  grads = dquery, shared(dkey), shared(dvalue)
  return tuple(x.astype(query.dtype) for x in grads)


def _wide(x, query):
  """Returns float32 key or value rows of each query head."""
  return jnp.repeat(x.astype(jnp.float32), query.shape[2] // x.shape[2], 2)


def _scores(query, key, lengths, scale, is_causal):
  assert query.dtype == key.dtype and str(query.dtype) in cudnn_attention.TYPES
  sequences, rows, _, width = query.shape
  assert width % 8 == 0 and key.shape[0] == sequences
  scores = jnp.einsum(
    "gqnh,gknh->gnqk", query.astype(jnp.float32), _wide(key, query)
  )
  scores = scores * scale
  row, column = jnp.arange(rows)[:, None], jnp.arange(key.shape[1])[None]
  if is_causal:
    assert key.shape[1] == rows
    scores = jnp.where((row >= column)[None, None], scores, -jnp.inf)
  if lengths is not None:
    assert lengths.shape == (sequences,) and lengths.dtype == jnp.int32
    lengths = lengths[:, None, None, None]
    scores = jnp.where(column[None, None] < lengths, scores, -jnp.inf)
    # Nobody says what it makes of a row that sees no key.
    scores = jnp.where(lengths > 0, scores, jnp.nan)
  return scores
