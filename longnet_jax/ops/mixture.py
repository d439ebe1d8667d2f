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
  out, lse = forward(settings, inputs, Part())
  return (out, lse), (*inputs, out, lse)


def _backward(settings, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  *inputs, out, lse = residuals
  terms = backward_terms(settings, out, lse, *grads)
  return *backward(settings, inputs, terms, Part()), None, None, None


_attend.defvjp(_forward, _backward)


class Part(NamedTuple):
  """Which part of a whole the inputs are; by default all of it.

  example, position, head: where the first of each lies in the whole.
  num_heads: heads of the whole; None where the inputs hold them all.
  branches: the index of each branch in the whole; None for 0, 1, ...
  dtype: the type of the results; None for that of the query.
  """

  example: jax.Array | int = 0
  position: jax.Array | int = 0
  head: jax.Array | int = 0
  num_heads: int | None = None
  branches: tuple[int, ...] | None = None
  dtype: jnp.dtype | None = None


def forward(settings, inputs, part):
  """Returns out and lse of the mixture of `settings.branches`."""
  problem = _make_problem(settings, part, *inputs)
  return _over_windows(problem, functools.partial(_forward_step, problem))


def backward(settings, inputs, terms, part):
  """Returns dquery, dkey, dvalue; the mixture may be a part of a larger one.

  `terms` are `backward_terms` of the whole mixture.
  """
  problem = _make_problem(settings, part, *inputs)
  step = functools.partial(_backward_step, problem, terms)
  return _over_windows(problem, step)


def backward_terms(settings, out, lse, dout, dlse):
  """Returns dout, the global lse and D: all that a branch's backward needs."""
  delta = -dlse
  if settings.mixing_gradient:
    wide = attention.accumulator(out.dtype)
    delta += (dout.astype(wide) * out.astype(wide)).sum(-1)
  # A row without keys must not take part: exp(s - inf) = 0.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  return dout, lse, delta


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the type that inputs of `dtype` are multiplied in."""
  # On CPU bf16 products are slower than float32 ones; float16 overflows.
  if dtype == jnp.bfloat16 and jax.default_backend() != "cpu":
    return dtype
  return attention.accumulator(dtype)


class _Problem(NamedTuple):
  """One call: its arrays, and how they are cut."""

  settings: tuple
  part: Part
  query: jax.Array
  key: jax.Array
  value: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  seed: jax.Array | None
  sizes: windows_lib.Sizes
  windows: windows_lib.Windows
  dtype: jnp.dtype  # of the products


def _make_problem(settings, part, query, *rest):
  sizes = windows_lib.device_sizes()
  windows = windows_lib.plan_windows(settings.branches, query.shape, sizes)
  dtype = product_dtype(query.dtype)
  return _Problem(settings, part, query, *rest, sizes, windows, dtype)


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

  def mix(group):
    found = _over_sequences(problem, step, group, _forward_sequences)
    lses = [_put_back(problem, i, lse, -jnp.inf) for i, (_, lse) in found]
    lse = functools.reduce(jnp.logaddexp, lses)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    out = sum(
      jnp.exp(branch_lse - finite)[..., None] * _put_back(problem, i, out, 0)
      for branch_lse, (i, (out, _)) in zip(lses, found, strict=True)
    )
    return out, lse

  join = lambda mixed, other: attention.merge(*mixed, *other)
  out, lse = _over_groups(problem, mix, join, (0, -jnp.inf))
  return out.astype(problem.part.dtype or problem.query.dtype), lse


def _backward_step(problem, grads, step):
  """Returns dquery, dkey, dvalue of one step's windows."""
  run = functools.partial(_backward_sequences, grads=grads)

  def share(x):  # the query heads of one key head add up
    kv_heads = problem.key.shape[2]
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)

  def total(group):
    found = _over_sequences(problem, step, group, run)
    dquery, dkey, dvalue = (
      sum(_put_back(problem, i, parts[which], 0) for i, parts in found)
      for which in range(3)
    )
    return dquery * problem.settings.scale, share(dkey), share(dvalue)

  join = lambda total, other: jax.tree.map(jnp.add, total, other)
  found = _over_groups(problem, total, join, (0, 0, 0))
  dtype = problem.part.dtype or problem.query.dtype
  return jax.tree.map(lambda x: x.astype(dtype), found)


def _over_groups(problem, run, join, nothing):
  """Joins `run(group)` over the branch groups, one group after the other.

  In a loop: left to order the groups itself, the compiler keeps the packed
  rows of all of them in memory. `nothing` is what the arrays start with.
  """
  groups = windows_lib.branch_groups(problem.settings.branches)
  if len(groups) == 1:
    return run(groups[0])
  runs = [lambda _, group=group: run(group) for group in groups]
  start = jax.tree.map(
    lambda x, fill: lax.full_like(problem.query, fill, x.dtype, x.shape),
    jax.eval_shape(runs[0], 0),
    nothing,
  )
  return lax.fori_loop(
    0, len(runs), lambda i, total: join(total, lax.switch(i, runs, i)), start
  )


def _over_sequences(problem, step, group, run):
  """Returns [(branch, arrays (windows, S, N, R, ...))] of a branch group."""
  windows, sizes = problem.windows, problem.sizes
  num_heads = problem.query.shape[2]
  found = []
  for sequences in windows_lib.plan_sequences(
    problem.settings.branches, group, windows, num_heads, sizes
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
  """Returns the phase of each head, (N,)."""
  num_heads, part = problem.query.shape[2], problem.part
  phases = dilation.phases(
    part.num_heads or num_heads,
    problem.settings.branches[branch][1],
    problem.settings.head_phase,
  )
  if part.num_heads is None:
    return phases
  return lax.dynamic_slice_in_dim(jnp.asarray(phases), part.head, num_heads)


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
  branch, window, start, segment, rate, head = (
    table[:, i, None] for i in range(table.shape[1])
  )
  phases = [_phase(problem, i) for i in range(len(settings.branches))]
  phase = jnp.stack([jnp.asarray(x, jnp.int32) for x in phases])[branch, head]
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
    seen = seen & (problem.part.position + position < ends)
  if ids is not None:
    key_ids = jnp.where(seen, ids, attention.HIDDEN_KEY)
    ids = jnp.where(inside, ids, attention.HIDDEN_QUERY)
  hashes = key_hashes = None
  if problem.seed is not None:
    part = problem.part
    if part.branches is not None:
      branch = jnp.asarray(part.branches)[branch]
    coordinates = (
      branch,
      part.example + example,
      part.head + head,
      part.position + position,
    )
    hashes, key_hashes = (
      attention.row_bits(problem.seed, *coordinates, side) for side in (0, 1)
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
    key_block=problem.sizes.key_block,
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
