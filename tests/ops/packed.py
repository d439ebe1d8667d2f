"""Calls of a kernel itself, whose rows are packed, and what the oracle says."""

import re
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import kernels
from tests.ops import family, oracle

LARGEST = np.finfo(np.float32).max
SCALE = -0.3


class Case(NamedTuple):
  """A call of a kernel; `more` keys lie elsewhere and are seen by all."""

  rows: int
  keys: int
  heads: int = 2
  kv_heads: int = 1
  width: int = 3
  batch: int = 2
  segments: int = 2
  is_causal: bool = False
  lengths: str | None = None
  ids: int = 0
  more: int = 5

  def check(self, name: str) -> bool:
    """Checks an implementation's kernel; returns whether it takes the case."""
    return check(name, self)


# Tiles, blocks and parts; what fills them up; the past of a far branch, whose
# keys are more than its rows, or fewer; every mask.
CASES = {
  "odd square": Case(45, 45, heads=4, kv_heads=2, is_causal=True, width=16),
  "holes": Case(9, 33, ids=2, lengths="heads", width=128, more=0),
  "all masks": Case(40, 40, ids=1, lengths="heads", is_causal=True, more=0),
  "square": Case(8, 8, is_causal=True, width=128, kv_heads=2),
  "odd square, wide": Case(45, 45, is_causal=True, width=130, batch=1),
  "all keys": Case(9, 9, width=128),
  "past": Case(5, 43, lengths="scalar", width=128, more=0),
  "past of more rows": Case(41, 3, lengths="heads", heads=4, kv_heads=2),
  "no key at all": Case(7, 20, lengths="none", more=0),
  "causal with a length": Case(40, 40, lengths="heads", is_causal=True),
  "documents": Case(24, 24, ids=1, is_causal=True, heads=4, width=16),
}


def draw(seed: int) -> Case:
  """Returns a random case."""
  rng = np.random.default_rng(seed)
  rows, keys = rng.integers(1, 70, 2)
  is_causal = bool(rng.integers(2))
  kv_heads = int(rng.integers(1, 3))
  return Case(
    int(rows),
    int(rows if is_causal else keys),
    heads=kv_heads * int(rng.integers(1, 4)),
    kv_heads=kv_heads,
    width=int(rng.choice([1, 16, 24, 128])),
    batch=int(rng.integers(1, 3)),
    segments=int(rng.integers(1, 3)),
    is_causal=is_causal,
    lengths=rng.choice([None, "heads"]),
    ids=int(rng.integers(0, 3)),
    more=int(rng.integers(0, 9)),
  )


def check(name: str, case: Case) -> bool:
  """Backward gets out and lse of all keys, those elsewhere included."""
  implementation, context, _ = family.IMPLEMENTATIONS[name]
  if implementation not in kernels.FILES:
    return False
  query, key, value, mask, seen = make(case)
  rng = np.random.default_rng(1)
  dout = rng.normal(size=query.shape).astype(np.float32)
  dlse = rng.normal(size=query.shape[:4]).astype(np.float32)
  forward = lambda *x: oracle.forward(*x[:3], x[3][None], SCALE)[:2]
  backward = lambda *x: oracle.backward(*x[:3], x[3][None], SCALE, *x[4:])
  n = case.keys
  near = query, key[:, :, :n], value[:, :, :n], seen[..., :n]
  wanted = of_each(forward, *near)
  out, lse = of_each(forward, query, key, value, seen)
  grads = of_each(backward, query, key, value, seen, dout, dlse)
  lse = np.where(np.isneginf(lse), LARGEST, lse)
  terms = [x.astype(np.float32) for x in (out, lse, dout, dlse)]

  @jax.jit
  def run(lengths, ids, *terms):
    mask = kernels.Mask(case.is_causal, lengths, ids)
    first, rest = (
      [query, *(jnp.asarray(x[:, :, cut]) for x in (key, value))]
      for cut in (slice(n), slice(n, None))
    )
    found = kernel.forward(*first, mask, scale=SCALE)
    grads = [kernel.backward(*first, mask, *terms, scale=SCALE)]
    if case.more:
      grads.append(kernel.backward(*rest, kernels.Mask(), *terms, scale=SCALE))
    dquery, *dkeys = zip(*grads, strict=True)
    return *found, sum(dquery), *(jnp.concatenate(x, 2) for x in dkeys)

  with context():
    kernel = kernels.load(implementation, kernels.platform())
    why = kernel.supports(query, key, mask, dlse)
    if why:
      match = re.escape(f"implementation={implementation!r} {why}; use ")
      with pytest.raises(ValueError, match=match):
        run(mask.lengths, mask.ids, *terms)
      return False
    found = run(mask.lengths, mask.ids, *terms)
  assert all(x.dtype == jnp.float32 for x in found)
  family.compare(found, (*wanted, *grads), 1e-5, 3e-5, rtol=1e-5)
  return True


def make(case):
  """Returns query, key, value, mask, what is seen (B, S, N, M, n + more)."""
  rng = np.random.default_rng(0)
  axes = case.batch, case.segments
  normal = lambda *shape: rng.normal(size=(*axes, *shape)).astype(np.float32)
  query = normal(case.rows, case.heads, case.width)
  both = case.keys + case.more
  key, value = (normal(both, case.kv_heads, case.width) for _ in range(2))
  seen = np.ones((*axes, case.heads, case.rows, case.keys), bool)
  if case.is_causal:
    seen &= np.tril(seen[0, 0, 0])
  lengths = {
    None: None,
    "scalar": np.int32(case.keys - 2),
    "heads": rng.integers(0, case.keys + 1, (*axes, case.heads)),
    "none": np.zeros((*axes, case.heads)),
  }[case.lengths]
  if lengths is not None:
    lengths = np.asarray(lengths, np.int32)
    seen &= np.arange(case.keys) < np.reshape(lengths, (*lengths.shape, 1, 1))
    lengths = jnp.asarray(lengths)
  ids = []
  for i in range(case.ids):  # alike for all heads, and not
    mine = rng.integers(0, 3, (*axes, case.rows, case.heads if i else 1))
    others = rng.integers(0, 3, (*axes, case.keys, case.kv_heads if i else 1))
    ids.append((jnp.asarray(mine, jnp.int32), jnp.asarray(others, jnp.int32)))
    mine, others = (np.moveaxis(x, 3, 2) for x in (mine, others))
    others = np.repeat(others, mine.shape[2] // others.shape[2], 2)
    seen &= mine[..., None] == others[..., None, :]
  more = np.ones((*seen.shape[:-1], case.more), bool)
  mask = kernels.Mask(case.is_causal, lengths, tuple(ids))
  return query, key, value, mask, np.concatenate([seen, more], -1)


def of_each(function, *arrays):
  """Stacks what a function returns of each of B x S sequences."""
  axes = arrays[0].shape[:2]
  found = [function(*(x[at] for x in arrays)) for at in np.ndindex(axes)]
  found = map(np.stack, zip(*found, strict=True))
  return [x.reshape(*axes, *x.shape[1:]) for x in found]
