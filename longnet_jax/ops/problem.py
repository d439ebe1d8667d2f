"""One call of the "xla" implementation: its arrays, and where rows lie.

A *sequence* of `windows.py` is found in the inputs by index arithmetic, taken
by a gather, and put back by `dilation.undilate`.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax import pattern
from longnet_jax.ops import attention, dilation
from longnet_jax.ops import windows as windows_lib
from longnet_jax.ops.attention import Rows


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


class Problem(NamedTuple):
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
  small: jax.Array | None = None  # whether `blockwise.all_small`; None: unknown

  @property
  def has_masks(self) -> bool:
    """Whether queries are told apart by lengths or documents."""
    return self.lengths is not None or self.segment_ids is not None


def make_problem(settings, part, query, *rest) -> Problem:
  """Returns the problem of some branches; `rest` as in `mixture.attend`."""
  sizes = windows_lib.device_sizes()
  windows = windows_lib.plan_windows(settings.branches, query.shape, sizes)
  dtype = product_dtype(query.dtype)
  return Problem(settings, part, query, *rest, sizes, windows, dtype)


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the type that inputs of `dtype` are multiplied in."""
  # On CPU bf16 products are slower than float32 ones; float16 overflows.
  if dtype == jnp.bfloat16 and windows_lib.platform() != "cpu":
    return dtype
  return attention.accumulator(dtype)


def _phase(problem, branch):
  """Returns the phase of each head, (N,)."""
  num_heads, part = problem.query.shape[2], problem.part
  phases = pattern.phases(
    part.num_heads or num_heads,
    problem.settings.branches[branch][1],
    problem.settings.head_phase,
  )
  if part.num_heads is None:
    return phases
  return lax.dynamic_slice_in_dim(jnp.asarray(phases), part.head, num_heads)


class Located(NamedTuple):
  """Where the rows of G sequences lie, (G, R), and what they may see."""

  query: jax.Array  # index into (B T N, H)
  key: jax.Array  # index into (B T K, H)
  valid: jax.Array  # whether there is such a row
  key_valid: jax.Array  # and whether its length lets queries see it
  query_rows: Rows
  key_rows: Rows


def locate(problem, step, sequences, table):
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
  return Located(
    row * num_heads + head,
    row * problem.key.shape[2] + head // group,
    valid,
    valid & seen,
    Rows(ids=ids, hashes=hashes),
    Rows(ids=key_ids, hashes=key_hashes),
  )


def take_inputs(problem, located):
  """Returns query (scaled), key and value rows (G, R, H)."""
  query = take(problem.query, located.query, located.valid)
  # Zeros where nobody looks: there may be NaN, and 0 * NaN is NaN.
  key, value = (
    take(x, located.key, located.key_valid)
    for x in (problem.key, problem.value)
  )
  query, key, value = (x.astype(problem.dtype) for x in (query, key, value))
  return query * problem.settings.scale, key, value


def take(x, index, valid, fill=0):
  """Returns rows (G, R, H) of x (B, T, heads, H); `fill` where not valid."""
  rows = x.reshape(-1, x.shape[-1]).at[index].get(mode="promise_in_bounds")
  return jnp.where(valid[..., None], rows, jnp.asarray(fill, x.dtype))


def put_back(problem, branch, packed, fill):
  """Returns (windows, W, N, ...) from (windows, S, N, R, ...)."""
  undilate = functools.partial(
    dilation.undilate,
    branch=problem.settings.branches[branch],
    phase=_phase(problem, branch),
    length=problem.windows.length,
    fill=fill,
  )
  return jax.vmap(undilate)(packed)
