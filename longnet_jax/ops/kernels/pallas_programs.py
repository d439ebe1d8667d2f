"""The two programs of the TPU kernel: what one step of a grid computes.

Scores are kept transposed, keys down the sublanes and queries across the lanes,
so that what there is one of for each query - lse, D, ids, the running maximum -
is a vector along the lanes. With c = scale log2(e), for block after block of
the keys that a block of queries sees,

    S = c K Q^T,    m' = max(m, max_j S),    P = exp2(S - m'),
    l' = l exp2(m - m') + sum_j P,    O^T' = O^T exp2(m - m') + V^T P,

and in the end out = O / l, lse = m / log2(e) + log(l).
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array
import numpy as np

_LOG2E = math.log2(math.e)
_LOWEST = float(np.finfo(np.float32).min)


class Cut(NamedTuple):
  """How the queries or the keys of a sequence are cut.

  rows: of the sequence, filled up to whole tiles.
  tile: rows that lie in VMEM at once; whole blocks.
  block: rows that meet at once.
  half: whether half a block may meet.
  """

  rows: int
  tile: int
  block: int
  half: bool

  @property
  def tiles(self) -> int:
    """Tiles in a sequence."""
    return self.rows // self.tile


class Plan(NamedTuple):
  """How one call is computed; all of it is static.

  batch, segments, heads, group: of the arrays; query heads of a key head.
  width: of a head, filled up.
  queries, keys: how either is cut.
  down: whether heads lie along the sublanes, rows along the lanes.
  is_causal, has_length, scale: of the mask, and of scores.
  """

  batch: int
  segments: int
  heads: int
  group: int
  width: int
  queries: Cut
  keys: Cut
  down: bool
  is_causal: bool
  has_length: bool
  scale: float

  def shape(self, rows: int) -> tuple[int, int]:
    """Returns the shape of rows of one head, as they lie."""
    return (self.width, rows) if self.down else (rows, self.width)

  def length(self, scalars, b, n, s) -> Array:
    """Returns how many keys a head sees of a sequence, of lengths or of one."""
    if scalars.shape[0] == 2:
      return scalars[1]
    return scalars[1 + (b * self.heads + n) * self.segments + s]


class _Step(NamedTuple):
  """A tile of queries that meets a tile of keys.

  row, column: numbers of their first rows, counted as keys are.
  length: how many keys are seen.
  """

  plan: Plan
  query: jax.Ref
  key: jax.Ref
  ids: list[jax.Ref]
  row: Array
  column: Array
  length: Array


def forward(scalars, query, key, value, *refs, plan):
  """Grid (B, N, S, tiles, key tiles); scratch is the state of a tile."""
  *ids, out, lse, top, total, acc = refs
  b, n, s, i, j = map(pl.program_id, range(5))
  row, column = scalars[0] + i * plan.queries.tile, j * plan.keys.tile
  length = plan.length(scalars, b, n, s)
  step = _Step(plan, query, key, ids, row, column, length)

  @pl.when(j == 0)
  def _():
    for ref, start in ((top, _LOWEST), (total, 0.0), (acc, 0.0)):
      ref[...] = jnp.full(ref.shape, start)

  @pl.loop(0, plan.queries.tile // plan.queries.block)
  def _(block):
    start = block * plan.queries.block

    def meet(c, masked, diagonal):
      parts = _parts(plan, c, start, diagonal, plan.keys.half)
      # All scores first: the second half is multiplied while the exponentials
      # of the first are taken.
      scores = [_scores(step, *part, masked, diagonal) for part in parts]
      for (rows, keys), part in zip(parts, scores, strict=True):
        old = top[:, rows]
        new = jnp.maximum(old, part.max(0, keepdims=True))
        shrink, weights = jnp.exp2(old - new), jnp.exp2(part - new)
        v = _read(plan, value, keys)
        found = _dot(v, weights.astype(v.dtype), int(plan.down), 0)
        top[:, rows] = new
        total[:, rows] = total[:, rows] * shrink + weights.sum(0, keepdims=True)
        acc[:, rows] = acc[:, rows] * shrink + found

    _over_keys(step, start, meet)

    @pl.when(j == plan.keys.tiles - 1)
    def _():
      rows = _span(start, plan.queries.block)
      some = total[:, rows] > 0
      sums = jnp.where(some, total[:, rows], 1.0)
      found = acc[:, rows] * (1 / sums)
      _write(plan, out, rows, found if plan.down else found.T)
      found = top[:, rows] / _LOG2E + jnp.log(sums)
      lse[:, rows] = jnp.where(some, found, -jnp.inf)


def backward(scalars, query, key, value, out, lse, dout, *refs, plan, has_dlse):
  """Grid (B, K, S, key tiles, group, tiles); gradients add up in VMEM.

  Those of all queries of a sequence and key head stay while its keys pass by,
  those of a tile of keys while its queries do.
  """
  dlse, refs = (refs[0], refs[1:]) if has_dlse else (None, refs)
  *ids, dquery, dkey, dvalue = refs
  b, n, s, j, g, i = map(pl.program_id, range(6))
  dquery = dquery.at[g]
  row, column = scalars[0] + i * plan.queries.tile, j * plan.keys.tile
  length = plan.length(scalars, b, n * plan.group + g, s)
  step = _Step(plan, query, key, ids, row, column, length)
  h = 0 if plan.down else 1

  @pl.when(j == 0)
  def _():
    zeros = jnp.zeros(plan.shape(plan.queries.tile), jnp.float32)
    _write(plan, dquery, _span(i * plan.queries.tile, plan.queries.tile), zeros)

  @pl.when((g == 0) & (i == 0))
  def _():
    dkey[...] = dvalue[...] = jnp.zeros(dkey.shape, jnp.float32)

  @pl.loop(0, plan.queries.tile // plan.queries.block)
  def _(block):
    start = block * plan.queries.block
    rows = _span(start, plan.queries.block)
    delta = _read(plan, out, rows).astype(jnp.float32)
    delta *= _read(plan, dout, rows).astype(jnp.float32)
    delta = (delta if plan.down else delta.T).sum(0, keepdims=True)
    if has_dlse:
      delta -= dlse[:, rows]

    def meet(c, masked, diagonal):
      for rows, keys in _parts(plan, c, start, diagonal, False):
        q, k, v = (
          _read(plan, *x) for x in ((query, rows), (key, keys), (value, keys))
        )
        do = _read(plan, dout, rows).astype(q.dtype)
        scores = _scores(step, rows, keys, masked, diagonal)
        weights = jnp.exp2(scores - lse[:, rows] * _LOG2E)
        rest = delta[:, plan.queries.block - rows.size :]
        dscores = weights * (_dot(v, do, h, h) - rest) * plan.scale
        weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
        if plan.down:
          dq, dk, dv = _dot(k, dscores, 1, 0), (q, dscores), (do, weights)
          dk, dv = _dot(*dk, 1, 1), _dot(*dv, 1, 1)
        else:
          dq, dk, dv = _dot(dscores, k, 0, 0), (dscores, q), (weights, do)
          dk, dv = _dot(*dk, 1, 0), _dot(*dv, 1, 0)
        place = _span(i * plan.queries.tile + rows.start, rows.size)
        for ref, where, x in (
          (dquery, place, dq),
          (dkey, keys, dk),
          (dvalue, keys, dv),
        ):
          _write(plan, ref, where, _read(plan, ref, where) + x)

    _over_keys(step, start, meet)


def _over_keys(step, start, meet):
  """Calls meet(c, masked, diagonal) for each block of keys that is seen.

  First those that are seen whole, then those that a length or ids cut, and last
  the one on the diagonal; none above that.

  Args:
    step: the `_Step`.
    start: of the block of queries in its tile.
    meet: takes the number of a block in its tile, and two static booleans.
  """
  plan, size = step.plan, np.int32(step.plan.keys.block)
  below, seen = step.row + start - step.column, plan.keys.tile
  if plan.is_causal:
    seen = jnp.clip(below, 0, seen)
  if plan.has_length:
    seen = jnp.clip(step.length - step.column, 0, seen)
  masked = plan.has_length or bool(step.ids)
  whole = 0 if step.ids else lax.div(seen, size)
  pl.loop(0, whole)(lambda c: meet(c, False, False))
  if masked:
    end = lax.div(seen + (size - 1), size)
    pl.loop(whole, end)(lambda c: meet(c, True, False))
  if plan.is_causal:

    @pl.when((below >= 0) & (below < plan.keys.tile))
    def _():
      meet(lax.div(below, size), masked, True)


def _parts(plan, c, start, diagonal, halves):
  """Returns what meets of two blocks: (queries, keys), each in its tile.

  On the diagonal the second half of the keys meets that of the queries alone.
  """
  first, size = c * plan.keys.block, plan.keys.block
  if not (plan.keys.half and (halves or diagonal)):
    return [(_span(start, plan.queries.block), _span(first, size))]
  half = size // 2
  skip = half if diagonal else 0
  return [
    (_span(start, plan.queries.block), _span(first, half)),
    (_span(start + skip, plan.queries.block - skip), _span(first + half, half)),
  ]


def _scores(step, rows, keys, masked, diagonal):
  """Returns S (keys, queries) of a part, -inf where a key is not seen."""
  plan = step.plan
  h = 0 if plan.down else 1
  scores = _dot(
    _read(plan, step.key, keys), _read(plan, step.query, rows), h, h
  )
  scores *= plan.scale * _LOG2E
  column = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  column += step.column + keys.start
  seen = []
  if diagonal:
    row = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen.append(step.row + rows.start + row >= column)
  if masked and plan.has_length:
    seen.append(column < step.length)
  for i in range(0, len(step.ids), 2):
    # As a column, which in memory would be spread over 128 lanes.
    others = jnp.broadcast_to(step.ids[i + 1][:, keys], (128, keys.size)).T
    seen.append(others[:, :1] == step.ids[i][:, rows])
  if seen:
    seen = functools.reduce(jnp.logical_and, seen)
    scores = jnp.where(seen, scores, -jnp.inf)
  return scores


def _dot(a, b, i, j):
  """Sums over axis i of a and j of b, in float32."""
  precision = lax.Precision.DEFAULT
  if a.dtype == jnp.float32 and _is_precise():
    precision = lax.Precision.HIGHEST
  axes = ((i,), (j,)), ((), ())
  return lax.dot_general(
    a, b, axes, precision=precision, preferred_element_type=jnp.float32
  )


def _is_precise():
  """Whether `jax.default_matmul_precision` asks for more than one pass."""
  precision = jax.config.jax_default_matmul_precision
  return precision not in (None, "default", "fastest", "bfloat16")


def _span(start, size):
  return pl.ds(pl.multiple_of(start, size), size)


def _read(plan, ref, rows):
  return ref[:, rows] if plan.down else ref[rows]


def _write(plan, ref, rows, x):
  ref[(slice(None), rows) if plan.down else rows] = x
