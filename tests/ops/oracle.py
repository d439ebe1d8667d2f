"""Dilated attention in float64 NumPy, written from the definition alone.

The mixture is one softmax over the multiset union of the keys of all branches:
with c_ij the number of branches in which row i sees key j,

    P_ij = c_ij exp(s_ij) / sum_j c_ij exp(s_ij),    out = P V.
"""

import numpy as np


def counts(
  length,
  num_heads,
  branches,
  *,
  is_causal=False,
  head_phase="interleaved",
  lengths=None,
  segment_ids=None,
):
  """Returns (branches, N, T, T) booleans for one example: i sees j."""
  seen = np.zeros((len(branches), num_heads, length, length), bool)
  for b, (w, r) in enumerate(branches):
    for head in range(num_heads):
      phase = head % r
      if head_phase == "blocked":
        phase = head // -(-num_heads // r)
      for i in range(length):
        for j in range(length):
          seen[b, head, i, j] = (
            i // w == j // w
            and i % w % r == phase
            and j % w % r == phase
            and (j <= i or not is_causal)
            and (lengths is None or j < lengths)
            and (segment_ids is None or segment_ids[i] == segment_ids[j])
          )
  return seen


def forward(query, key, value, seen, scale):
  """Returns out (T, N, H), lse (T, N) and P (N, T, T) of one example."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  group = query.shape[1] // key.shape[1]
  key, value = (np.repeat(x, group, axis=1) for x in (key, value))
  scores = scale * np.einsum("inh,jnh->nij", query, key)
  multiplicity = seen.sum(0)
  top = np.where(multiplicity > 0, scores, -np.inf).max(-1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  weights = multiplicity * np.exp(np.where(multiplicity > 0, scores - top, 0))
  total = weights.sum(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = np.log(total) + top
  probabilities = weights / np.where(total > 0, total, 1)
  out = np.einsum("nij,jnh->inh", probabilities, value)
  return out, lse[..., 0].T, probabilities


def backward(query, key, value, seen, scale, dout, dlse, mixing_gradient=True):
  """Returns dquery, dkey, dvalue of sum(dout * out) + sum(dlse * lse)."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  kv_heads = key.shape[1]
  group = query.shape[1] // kv_heads
  _, _, total = forward(query, key, value, seen, scale)
  key, value = (np.repeat(x, group, axis=1) for x in (key, value))
  dweights = np.einsum("inh,jnh->nij", dout, value)
  if mixing_gradient:
    delta = (total * dweights).sum(-1, keepdims=True)
    dscores = total * (dweights - delta)
  else:
    # Each branch keeps its share of the mixture and its own softmax.
    shares = seen / np.maximum(seen.sum(0), 1) * total
    mass = shares.sum(-1, keepdims=True)
    own = shares / np.where(mass > 0, mass, 1)
    delta = (own * dweights).sum(-1, keepdims=True)
    dscores = (shares * (dweights - delta)).sum(0)
  dscores += total * dlse.T[:, :, None]
  dquery = scale * np.einsum("nij,jnh->inh", dscores, key)
  dkey = scale * np.einsum("nij,inh->jnh", dscores, query)
  dvalue = np.einsum("nij,inh->jnh", total, dout)
  shape = (len(dkey), kv_heads, group, -1)
  return dquery, dkey.reshape(shape).sum(2), dvalue.reshape(shape).sum(2)
