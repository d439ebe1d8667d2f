"""Dilated attention in constant memory: the "xla" implementation.

The sequences of `windows.py` are taken straight from the inputs by index
arithmetic, attended to in blocks (`blockwise.py`) and put back, all branches
in one pass over the window.

Backward keeps query, key, value, out and lse only. As the mixture is one
softmax, each branch's backward runs with the global lse and D, and nothing per
branch is saved (mixing_gradient=False recomputes the branch's own D).
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import attention, blockwise, dilation
from longnet_jax.ops import windows as windows_lib
from longnet_jax.ops.attention import Rows


def attend(settings, query, key, value, lengths, segment_ids, seed):
  """Returns the mixture's (out, lse); arguments as `reference.attend`."""
  if not query.size:
    return jnp.zeros_like(query), jnp.full(query.shape[:3], -jnp.inf)
  rows = math.prod(query.shape[:3])
  if rows >= 2**31:
    raise ValueError(
      f"batch * length * heads is {rows}; one device indexes fewer than "
      f"{2**31} rows: shard the sequence (axis_name)"
    )
  length = query.shape[1]
  branches = tuple((min(w, length), r) for w, r in settings.branches)
  settings = settings._replace(branches=branches)
  return _attend(settings, query, key, value, lengths, segment_ids, seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, *inputs):
  return _forward(settings, *inputs)[0]


def _forward(settings, *inputs):
  """Returns (out, lse) and what the backward pass needs."""
  problem = _make_problem(settings, *inputs)
  step = functools.partial(_forward_step, problem)
  out, lse = _over_windows(problem, step)
  return (out, lse), (*inputs, out, lse)


def _backward(settings, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  *inputs, out, lse = residuals
  problem = _make_problem(settings, *inputs)
  dout, dlse = grads
  delta = -dlse
  if settings.mixing_gradient:
    wide = attention.accumulator(out.dtype)
    delta += (dout.astype(wide) * out.astype(wide)).sum(-1)
  # A row without keys must not take part: exp(s - inf) = 0.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  step = functools.partial(_backward_step, problem, (dout, lse, delta))
  return *_over_windows(problem, step), None, None, None


_attend.defvjp(_forward, _backward)


class _Problem(NamedTuple):
  """One call: its arrays, and how they are cut."""

  settings: tuple
  query: jax.Array
  key: jax.Array
  value: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  seed: jax.Array | None
  sizes: windows_lib.Sizes
  windows: windows_lib.Windows
  dtype: jnp.dtype  # of the products


def _make_problem(settings, query, *rest):
  backend = jax.default_backend()
  sizes = windows_lib.SIZES.get(backend, windows_lib.SIZES["gpu"])
  windows = windows_lib.plan_windows(settings.branches, query.shape, sizes)
  # On CPU bf16 products are slower than float32 ones; float16 overflows.
  dtype = query.dtype
  if dtype != jnp.bfloat16 or backend == "cpu":
    dtype = attention.accumulator(dtype)
  return _Problem(settings, query, *rest, sizes, windows, dtype)


def _over_windows(problem, step):
  """Returns the arrays (B, T, ...) whose windows `step(index)` computes."""
  batch, length = problem.query.shape[:2]
  windows = problem.windows
  found = lax.map(step, jnp.arange(windows.steps))

  def join(x):
    x = x.reshape(-1, *x.shape[3:])
    x = x[: batch * windows.per_example * windows.length]
    return x.reshape(batch, -1, *x.shape[1:])[:, :length]

  return jax.tree.map(join, found)


def _forward_step(problem, step):
  """Returns out and lse of one step's windows, (windows, W, N, ...)."""
  mixed = None
  for group in windows_lib.branch_groups(problem.settings.branches):
    found = _over_sequences(problem, step, group, _forward_sequences)
    lses = [_put_back(problem, i, lse, -jnp.inf) for i, (_, lse) in found]
    lse = functools.reduce(jnp.logaddexp, lses)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    out = sum(
      jnp.exp(branch_lse - finite)[..., None] * _put_back(problem, i, out, 0)
      for branch_lse, (i, (out, _)) in zip(lses, found, strict=True)
    )
    mixed = attention.merge(*mixed, out, lse) if mixed else (out, lse)
  out, lse = mixed
  return out.astype(problem.query.dtype), lse


def _backward_step(problem, grads, step):
  """Returns dquery, dkey, dvalue of one step's windows."""
  totals = (0, 0, 0)
  for group in windows_lib.branch_groups(problem.settings.branches):
    run = functools.partial(_backward_sequences, grads=grads)
    for i, parts in _over_sequences(problem, step, group, run):
      parts = (_put_back(problem, i, part, 0) for part in parts)
      totals = [a + b for a, b in zip(totals, parts, strict=True)]
  dquery, dkey, dvalue = totals
  dquery = dquery * problem.settings.scale

  def share(x):  # the query heads of one key head add up
    kv_heads = problem.key.shape[2]
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)

  found = dquery, share(dkey), share(dvalue)
  return jax.tree.map(lambda x: x.astype(problem.query.dtype), found)


def _over_sequences(problem, step, group, run):
  """Returns [(branch, arrays (windows, S, N, R, ...))] of a branch group."""
  windows, sizes = problem.windows, problem.sizes
  num_heads = problem.query.shape[2]
  found = []
  phases = [_phase(problem, i) for i in range(len(problem.settings.branches))]
  for sequences in windows_lib.plan_sequences(
    problem.settings.branches, group, windows, phases, sizes
  ):
    together = windows_lib.sequences_together(sequences, sizes)
    table = windows_lib.chunk(sequences.table, together)

    def one_chunk(rows, sequences=sequences):
      located = _locate(problem, step, sequences, rows)
      return run(problem, sequences, located)

    packed = lax.map(one_chunk, jnp.asarray(table))
    start = 0
    for index, count in sequences.branches:
      found.append(
        (
          index,
          jax.tree.map(
            lambda x, a=start, n=count: x.reshape(-1, *x.shape[2:])[
              a : a + n
            ].reshape(windows.per_step, -1, num_heads, *x.shape[2:]),
            packed,
          ),
        )
      )
      start += count
  return sorted(found, key=lambda pair: pair[0])


def _put_back(problem, branch, packed, fill):
  """Returns (windows, W, N, ...) from (windows, S, N, R, ...)."""
  undilate = functools.partial(
    dilation.undilate,
    branch=problem.settings.branches[branch],
    phase=_phase(problem, branch),
    length=problem.windows.length,
    fill=fill,
  )
  return jax.vmap(undilate)(packed)


def _phase(problem, branch):
  return dilation.phases(
    problem.query.shape[2],
    problem.settings.branches[branch][1],
    problem.settings.head_phase,
  )


class _Located(NamedTuple):
  """Where the rows of G sequences lie, (G, R), and what they may see."""

  query: jax.Array  # index into (B T N, H)
  key: jax.Array  # index into (B T K, H)
  valid: jax.Array  # whether there is such a row
  query_rows: Rows
  key_rows: Rows


def _locate(problem, step, sequences, table):
  """Finds the rows of the sequences that the lines of `table` describe."""
  batch, length, num_heads, _ = problem.query.shape
  windows, settings = problem.windows, problem.settings
  branch, window, start, segment, rate, head, phase = (
    table[:, i, None] for i in range(table.shape[1])
  )
  window = step * windows.per_step + window
  example = window // windows.per_example
  origin = window % windows.per_example * windows.length + start
  count = jnp.arange(sequences.rows)[None, :]
  offset = phase + rate * count
  position = origin + offset
  inside = (offset < segment) & (example < batch)
  valid = inside & (position < length)
  row = jnp.minimum(example, batch - 1) * length
  row = row + jnp.minimum(position, length - 1)
  group = num_heads // problem.key.shape[2]

  ids = key_ids = None
  if settings.padding == "zeros":
    seen = count < -(-segment // rate)
  else:
    seen = valid
  if problem.segment_ids is not None:
    ids = problem.segment_ids.reshape(-1)[row]
  elif problem.lengths is not None or not settings.is_causal:
    ids = jnp.zeros_like(row)
  if problem.lengths is not None:
    ends = problem.lengths[jnp.minimum(example, batch - 1)]
    seen = seen & (position < ends)
  if ids is not None:
    key_ids = jnp.where(seen, ids, attention.HIDDEN_KEY)
    ids = jnp.where(inside, ids, attention.HIDDEN_QUERY)
  hashes = key_hashes = None
  if problem.seed is not None:
    hashes, key_hashes = (
      attention.row_bits(problem.seed, branch, example, head, position, side)
      for side in (0, 1)
    )
  return _Located(
    row * num_heads + head,
    row * problem.key.shape[2] + head // group,
    valid,
    Rows(ids=ids, hashes=hashes),
    Rows(ids=key_ids, hashes=key_hashes),
  )


def _forward_sequences(problem, sequences, located):
  """Returns out (G, R, H) and lse (G, R) of G sequences."""
  query, key, value = _take_inputs(problem, located)
  attend = functools.partial(
    blockwise.forward, shape=_shape(problem, sequences)
  )
  return _each(attend, query, key, value, located.query_rows, located.key_rows)


def _backward_sequences(problem, sequences, located, *, grads):
  """Returns dquery, dkey, dvalue (G, R, H) of G sequences."""
  query, key, value = _take_inputs(problem, located)
  dout, lse, delta = grads
  dout = _take(dout, located.query, located.valid).astype(problem.dtype)
  lse = _take(lse[..., None], located.query, located.valid, jnp.inf)[..., 0]
  delta = _take(delta[..., None], located.query, located.valid)[..., 0]
  masks = located.query_rows, located.key_rows
  shape = _shape(problem, sequences)
  if not problem.settings.mixing_gradient:
    attend = functools.partial(blockwise.forward, shape=shape)
    out, _ = _each(attend, query, key, value, *masks)
    delta += (dout.astype(out.dtype) * out).sum(-1)
  attend = functools.partial(blockwise.backward, shape=shape)
  return _each(attend, query, key, value, dout, lse, delta, *masks)


def _shape(problem, sequences):
  return blockwise.Shape(
    causal=problem.settings.is_causal,
    tile=sequences.tile,
    block=problem.sizes.block,
    dropout_rate=problem.settings.dropout_rate,
  )


def _take_inputs(problem, located):
  """Returns query (scaled), key and value rows (G, R, H)."""
  query = _take(problem.query, located.query, located.valid)
  key, value = (
    _take(x, located.key, located.valid) for x in (problem.key, problem.value)
  )
  query, key, value = (x.astype(problem.dtype) for x in (query, key, value))
  return query * problem.settings.scale, key, value


def _take(x, index, valid, fill=0):
  """Returns rows (G, R, H) of x (B, T, heads, H); `fill` where not valid."""
  rows = x.reshape(-1, x.shape[-1]).at[index].get(mode="promise_in_bounds")
  return jnp.where(valid[..., None], rows, jnp.asarray(fill, x.dtype))


def _each(attend, *args):
  """Maps over the first axis; a single sequence stays a plain matrix.

  Batched products of one are slower than products on CPU.
  """
  if args[0].shape[0] > 1:
    return jax.vmap(attend)(*args)
  found = attend(*jax.tree.map(lambda x: x[0], args))
  return jax.tree.map(lambda x: x[None], found)
