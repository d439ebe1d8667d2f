"""The mixture of all branches: the only custom derivative, and its loops.

With lse_i the logsumexp of branch i at a row and head (eqs. 9-10 of arXiv
2307.02486),

    out = sum_i exp(lse_i) out_i / sum_i exp(lse_i),

one softmax over the keys of all branches. Backward therefore keeps query, key,
value, out and lse alone: the backward of each branch is exact given the
mixture's out and lse, and nothing per branch is saved.

Branches inside a device (`near.py`) are computed stretch by stretch, in place.
The segments of all branches restart at each multiple of the least common
multiple of their lengths; such windows follow one another, so that memory does
not grow with the sequence. Branches whose segments lie on several devices
(`far.py`) join in the same way.
"""

import functools
import math

import jax
from jax import ad_checkpoint, lax
from jax import numpy as jnp

from longnet_jax.ops import arguments, attention, far, kernels, sharded
from longnet_jax.ops import near as near_lib

# By platform, sizes that bound memory and keep loops short, in elements of the
# query. Of a window, which is whole segments of all branches: as many as fit.
WINDOW = {"cpu": 2**23, "gpu": 2**26, "tpu": 2**26}
# Of the rows that a branch selects of a window at once: for caches. A platform
# without a number selects those of a whole window, for wide products.
STRETCH = {"cpu": 2**21}
# Names out and lse, for policies of jax.checkpoint that keep them.
ATTENDED = "longnet_attended"


@functools.partial(
  jax.jit, static_argnames=("settings", "layout", "return_residual")
)
def attend(settings, layout, inputs, *, return_residual):
  """Returns the mixture's out, and its lse or None.

  A program of its own also where the caller is not compiled.

  Args:
    settings: the `arguments.Settings`.
    layout: the `sharded.Layout` where the arrays are a device's part, or None.
    inputs: the `arguments.Inputs`.
    return_residual: whether to return lse.
  """
  query = inputs.query
  if 0 in query.shape:
    nothing = lax.full_like(query, -jnp.inf, jnp.float32, query.shape[:3])
    return query, nothing if return_residual else None
  out, lse = _mix(settings, layout, return_residual, inputs)
  return out, lse.astype(jnp.float32) if return_residual else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mix(settings, layout, return_residual, inputs):
  return _forward(settings, layout, return_residual, inputs)[0]


def _forward(settings, layout, return_residual, inputs):
  """Returns (out, lse) and what the backward pass needs."""
  del return_residual
  call, near, distant = _branches(settings, layout, inputs)

  def step(branch, first, size, total):
    rows = near_lib.Rows(inputs[:3], (), first, size)
    found = near_lib.forward(call, branch, rows)
    return attention.merge(*total, *found) if total else found

  dtype = call.wide if distant else inputs.query.dtype

  def nothing(rows):
    out = jnp.zeros_like(rows.query, call.wide)
    return out, jnp.full_like(out[..., 0], -jnp.inf)

  out, lse = _over_all(call, near, distant, step, nothing, dtype)
  out = out.astype(inputs.query.dtype)
  out, lse = (ad_checkpoint.checkpoint_name(x, ATTENDED) for x in (out, lse))
  # Finite, for jax_debug_infs; so large that rows without keys take no part.
  largest = jnp.asarray(jnp.finfo(lse.dtype).max, lse.dtype)
  return (out, lse), (inputs, out, jnp.where(jnp.isneginf(lse), largest, lse))


def _backward(settings, layout, return_residual, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  inputs, out, lse = residuals
  dout, dlse = grads
  terms = out, lse, dout, dlse if return_residual else None
  call, near, distant = _branches(settings, layout, inputs)

  def step(branch, first, size, total):
    rows = near_lib.Rows(inputs[:3], terms, first, size)
    found = near_lib.backward(call, branch, rows)
    return tuple(map(jnp.add, total, found)) if total else found

  dtype = call.wide if distant else inputs.query.dtype

  def nothing(rows):
    return tuple(jnp.zeros_like(x, call.wide) for x in rows[:3])

  with jax.default_matmul_precision(settings.precision):
    total = _over_all(call, near, distant, step, nothing, dtype)
  total = (x.astype(y.dtype) for x, y in zip(total, inputs[:3], strict=True))
  none = (None,) * len(inputs.documents)
  return (arguments.Inputs(*total, None, none, None),)


_mix.defvjp(_forward, _backward)


def _branches(settings, layout, inputs):
  """Returns the `near.Call`, and the near and the far branches."""
  kernel = kernels.load(settings.kernel, settings.platform)
  if layout is not None:
    place = sharded.find_place(layout, inputs.query)
    call = near_lib.Call(settings, kernel, inputs, place)
    near, distant = sharded.split(call, layout)
    return call, near, [far.make_branch(call, x) for x in distant]
  call = near_lib.Call(settings, kernel, inputs, near_lib.Place())
  length = inputs.query.shape[1]
  branches = enumerate(settings.branches)
  near = [near_lib.Branch(i, min(w, length), r) for i, (w, r) in branches]
  return call, near, []


def _over_all(call, near, distant, step, nothing, dtype):
  """Returns what all branches come to, near and far; see `_over_windows`."""
  length = call.inputs.query.shape[1]
  if call.dense and distant:
    # One tree for both, over all rows: those of far branches span windows.
    total, distant = None, near_lib.nested(call, [*near, *distant], length)
  else:
    total = _over_windows(call, near, step, nothing, dtype)
  for branch in distant:
    total = step(branch, 0, length, total)
  return total


def _over_windows(call, branches, step, nothing, dtype):
  """Returns what all near branches come to, a tuple of (B, T, ...), or None.

  Args:
    call: the `near.Call`.
    branches: the `near.Branch`es.
    step: (branch, first, size, total of these rows or None) -> new total.
    nothing: (rows of the inputs) -> arrays for the total of all branches.
    dtype: type of the results; the total of one window is wider.
  """
  if not branches:
    return None

  def one_stretch(branch, is_first, start, first, size, total):
    # What the first branch finds is not added to anything.
    part = None if is_first else _slice(total, first, size)
    return _update(total, step(branch, start + first, size, part), first)

  def one_window(start, size, found=None):
    total = found or nothing(_slice(call.inputs, start, size))
    for i, branch in enumerate(near_lib.nested(call, branches, size)):
      is_first = i == 0 and not found
      run = functools.partial(one_stretch, branch, is_first, start)
      total = _over_stretches(run, total, size, _together(call, branch, size))
    return total

  def in_place(start, size, whole):
    found = None
    if at_once:
      found = _cast(_slice(whole, start, size), call.wide)
    return _update(whole, _cast(one_window(start, size, found), dtype), start)

  length = call.inputs.query.shape[1]
  at_once, branches = _at_once(call, branches)
  found = step(at_once, 0, length, None) if at_once else None
  if not branches:
    return found
  window = _window(call, branches)
  # Segment by segment, a total that is the result itself needs no windows.
  is_result = call.settings.platform in STRETCH and dtype == call.wide
  if is_result or length <= window:
    return one_window(0, length, found)
  whole = _cast(found or nothing(call.inputs), dtype)
  return _over_stretches(in_place, whole, length, window)


def _cast(arrays, dtype):
  """Returns arrays with rows of heads, (B, T, N, H), in another type."""
  return tuple(x.astype(dtype) if x.ndim == 4 else x for x in arrays)


def _at_once(call, branches):
  """Returns the branch that needs no windows, or None, and the others."""
  inputs, kernel = call.inputs, call.kernel
  if math.prod(map(_known, inputs.query.shape)) <= kernel.at_once:
    if kernel.supports(*inputs[:2], inputs.mask(call.settings)) is None:
      for i, branch in enumerate(branches):
        if branch.r == 1:
          return branch, [*branches[:i], *branches[i + 1 :]]
  return None, branches


def _over_stretches(run, total, length, size):
  """Folds `run(first, size, total)` over `length` rows, `size` at a time."""
  count, rest = divmod(length, size)
  if count == 1:
    total = run(0, size, total)
  elif count:
    step = lambda i, total: run(i * size, size, total)
    total = lax.fori_loop(0, count, step, total)
  return run(count * size, rest, total) if rest else total


def _window(call, branches):
  """Returns the rows of a window: whole segments of all branches."""
  batch, length, heads, width = call.inputs.query.shape
  window = min(math.lcm(*(branch.w for branch in branches)), length)
  limit = WINDOW.get(call.settings.platform, WINDOW["gpu"])
  window *= max(1, limit // (window * _known(batch) * heads * width))
  if length % window and length < 4 * window:
    return length  # the ragged end would be compiled apart, and save little
  return window


def _together(call, branch, size):
  """Returns the rows whose segments are selected at once, of `size`."""
  batch, _, heads, width = call.inputs.query.shape
  selected = -(-branch.w // branch.r) * _known(batch) * heads * width
  limit = STRETCH.get(call.settings.platform)
  return branch.w * max(1, limit // selected) if limit else size


def _known(batch):
  """Returns the batch size, or 1 where only run time will tell."""
  return batch if isinstance(batch, int) else 1


def _slice(arrays, first, size):
  """Returns rows of arrays (B, T, ...)."""

  def cut(x):
    if x.ndim < 2 or x.shape[1] == size:
      return x
    if isinstance(first, int):
      return lax.slice_in_dim(x, first, first + size, axis=1)
    return lax.dynamic_slice_in_dim(x, first, size, axis=1)

  return jax.tree.map(cut, arrays)


def _update(arrays, parts, first):
  """Writes rows into arrays (B, T, ...)."""

  def put(x, part):
    if x.shape == part.shape:
      return part
    return lax.dynamic_update_slice_in_dim(x, part, first, axis=1)

  return jax.tree.map(put, arrays, parts)
