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

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import attention, blockwise
from longnet_jax.ops import problem as problem_lib
from longnet_jax.ops import windows as windows_lib


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
  out, lse = forward(settings, inputs, problem_lib.Part())
  return (out, lse), (*inputs, out, lse)


def _backward(settings, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  *inputs, out, lse = residuals
  terms = backward_terms(settings, out, lse, *grads)
  with jax.default_matmul_precision(settings.precision):
    found = backward(settings, inputs, terms, problem_lib.Part())
  return *found, None, None, None


_attend.defvjp(_forward, _backward)


def forward(settings, inputs, part):
  """Returns out and lse of the mixture of `settings.branches`."""
  problem = problem_lib.make_problem(settings, part, *inputs)
  length, unshifted = inputs[0].shape[1], problem.sizes.unshifted
  if 0 < unshifted <= length and not problem.has_masks:
    scaled = problem.query.astype(problem.dtype) * settings.scale
    key = problem.key.astype(problem.dtype)
    # No gradient: a second derivative must not look into it.
    small = blockwise.all_small(*map(lax.stop_gradient, (scaled, key)))
    problem = problem._replace(small=small)
  return _over_windows(problem, functools.partial(_forward_step, problem))


def backward(settings, inputs, terms, part):
  """Returns dquery, dkey, dvalue; the mixture may be a part of a larger one.

  `terms` are `backward_terms` of the whole mixture.
  """
  problem = problem_lib.make_problem(settings, part, *inputs)
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


def _over_windows(problem, step):
  """Returns the arrays (B, T, ...) whose windows `step(index)` computes."""
  batch, length = problem.query.shape[:2]
  windows = problem.windows
  found = lax.map(step, jnp.arange(windows.steps, dtype=jnp.int32))

  def join(x):
    x = x.reshape(-1, *x.shape[3:])
    x = x[: batch * windows.per_example * windows.length]
    return x.reshape(batch, -1, *x.shape[1:])[:, :length]

  return jax.tree.map(join, found)


def _forward_step(problem, step):
  """Returns out and lse of one step's windows, (windows, W, N, ...)."""
  put_back = functools.partial(problem_lib.put_back, problem)

  def mix(group):
    found = _over_sequences(problem, step, group, _forward_sequences)
    lses = [put_back(i, lse, -jnp.inf) for i, (_, lse) in found]
    lse = functools.reduce(jnp.logaddexp, lses)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    out = sum(
      jnp.exp(branch_lse - finite)[..., None] * put_back(i, out, 0)
      for branch_lse, (i, (out, _)) in zip(lses, found, strict=True)
    )
    return out, lse

  join = lambda mixed, other: attention.merge(*mixed, *other)
  out, lse = _over_groups(problem, mix, join, (0, -jnp.inf))
  return out.astype(problem.part.dtype or problem.query.dtype), lse


def _backward_step(problem, grads, step):
  """Returns dquery, dkey, dvalue of one step's windows."""
  run = functools.partial(_backward_sequences, grads=grads)
  put_back = functools.partial(problem_lib.put_back, problem)

  def share(x):  # the query heads of one key head add up
    kv_heads = problem.key.shape[2]
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)

  def total(group):
    found = _over_sequences(problem, step, group, run)
    dquery, dkey, dvalue = (
      sum(put_back(i, parts[which], 0) for i, parts in found)
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

    def all_chunks(table, small, sequences=sequences):
      shape = _shape(problem, sequences, small)

      def one_chunk(rows):
        located = problem_lib.locate(problem, step, sequences, rows)
        return run(problem, shape, located)

      return lax.map(one_chunk, table)

    packed = _if(problem.small, all_chunks, jnp.asarray(table))
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


def _if(condition, run, table):
  """Returns `run(table, condition)`, the condition static; None is False.

  Loops belong into `run`, not around it: XLA computes what stands in a `cond`
  itself, outside of a loop, in one thread on CPU.
  """
  if condition is None:
    return run(table, False)
  sides = (functools.partial(run, small=x) for x in (True, False))
  return lax.cond(condition, *sides, table)


def _forward_sequences(problem, shape, located):
  """Returns out (G, R, H) and lse (G, R) of G sequences."""
  query, key, value = problem_lib.take_inputs(problem, located)
  rows = located.query_rows
  if problem.small is not None and not shape.small:
    small = functools.partial(blockwise.small_queries, is_causal=shape.causal)
    rows = rows._replace(small=jax.vmap(small)(query, key))
  attend = functools.partial(blockwise.forward, shape=shape)
  return _each(attend, query, key, value, rows, located.key_rows)


def _backward_sequences(problem, shape, located, *, grads):
  """Returns dquery, dkey, dvalue (G, R, H) of G sequences."""
  query, key, value = problem_lib.take_inputs(problem, located)

  def take(x, fill=0):
    return problem_lib.take(x, located.query, located.valid, fill)

  dout, lse, delta = grads
  dout = take(dout).astype(problem.dtype)
  lse = take(lse[..., None], jnp.inf)[..., 0]
  delta = take(delta[..., None])[..., 0]
  masks = located.query_rows, located.key_rows
  if not problem.settings.mixing_gradient:
    attend = functools.partial(blockwise.forward, shape=shape)
    out, _ = _each(attend, query, key, value, *masks)
    delta += (dout.astype(out.dtype) * out).sum(-1)
  attend = functools.partial(blockwise.backward, shape=shape)
  return _each(attend, query, key, value, dout, lse, delta, *masks)


def _shape(problem, sequences, small):
  return blockwise.Shape(
    causal=problem.settings.is_causal,
    tile=sequences.tile,
    block=problem.sizes.block,
    key_block=problem.sizes.key_block,
    dropout_rate=problem.settings.dropout_rate,
    small=small,
  )


def _each(attend, *args):
  """Maps over the first axis; a single sequence stays a plain matrix.

  Batched products of one are slower than products on CPU.
  """
  if args[0].shape[0] > 1:
    return jax.vmap(attend)(*args)
  found = attend(*jax.tree.map(lambda x: x[0], args))
  return jax.tree.map(lambda x: x[None], found)
