"""One branch on one stretch of rows: select, attend, put back.

A stretch is some segments of a branch (w, r) that lie on one device. The rows
that a head keeps of a segment are in order, so that what a row may see is a
prefix of them: causality, ragged ends and lengths need no more than that.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int, UInt32
import numpy as np

from longnet_jax import pattern
from longnet_jax.ops import arguments, attention, kernels, selection


class Place(NamedTuple):
  """Where a device's part lies in the whole; by default it is the whole.

  example, start, head: the first of its examples, positions and heads.
  parts: how many the heads are split into.
  """

  example: Array | int = 0
  start: Array | int = 0
  head: Array | int = 0
  parts: int = 1


class Call(NamedTuple):
  """What all branches of one call share."""

  settings: arguments.Settings
  kernel: kernels.Kernel
  inputs: arguments.Inputs
  place: Place

  @property
  def wide(self) -> jnp.dtype:
    """The type of sums and logsumexps."""
    return attention.accumulator(self.inputs.query.dtype)

  @property
  def product(self) -> jnp.dtype:
    """The type that rows are multiplied in."""
    # On CPU bf16 products are slower than float32 ones; float16 overflows.
    dtype = self.inputs.query.dtype
    if dtype == jnp.bfloat16 and self.settings.platform != "cpu":
      return dtype
    return self.wide

  @property
  def dense(self) -> bool:
    """Whether rows are selected in passes over all, as suits TPU."""
    return self.settings.platform == "tpu"

  @property
  def way(self) -> str:
    """How rows are selected, see `selection.Cut`."""
    # Behind the end of an example there may be NaN.
    passing = "product" if self.inputs.lengths is None else "sum"
    return passing if self.dense else "index"

  def all_phases(self, rate: int) -> np.ndarray:
    """Returns the phases (parts, N) of all heads, also of other devices."""
    parts, heads = self.place.parts, self.inputs.query.shape[2]
    name = self.settings.head_phase
    phases = pattern.phases(parts * heads, rate, name).astype(np.int32)
    return phases.reshape(parts, heads)

  def local(self, of_parts: np.ndarray) -> np.ndarray | Array:
    """Returns the line of (parts, ...) that is this device's."""
    if self.place.parts == 1:
      return of_parts[0]
    part = lax.div(self.place.head, np.int32(self.inputs.query.shape[2]))
    return jnp.asarray(of_parts)[part]

  def bits(
    self, branch: int, positions: Int[Array, "S R N"], side: int
  ) -> UInt32[Array, "B S R N"] | None:
    """Returns the bits (B, S, R, N) that decide on dropout, or None."""
    if self.inputs.seed is None:
      return None
    batch, _, heads, _ = self.inputs.query.shape
    example = self.place.example + jnp.arange(batch)[:, None, None, None]
    head = self.place.head + jnp.arange(heads)[None, None, None]
    return attention.row_bits(
      self.inputs.seed, branch, example, head, positions[None], side
    )


class Branch(NamedTuple):
  """A branch (w, r) inside a device's part.

  index: its place among all.
  children: branches whose rows are among its own (`nested`).
  far: where its segments lie on several devices, the kernel over these and
    how queries and keys are cut (`far.make_branch`); w is a piece of them.
  """

  index: int
  w: int
  r: int
  children: tuple["Branch", ...] = ()
  far: tuple[kernels.Kernel, tuple[selection.Cut, selection.Cut]] | None = None


class Rows(NamedTuple):
  """What a branch selects from: a stretch of the inputs, or a parent's rows.

  tensors: query, key, value, (B, L, N or K, H).
  terms: out, lse, dout, dlse (or None) of the mixture, backward.
  first, length: of the stretch in the device's part; first may be traced.
  cuts: how a parent cut queries and keys; None where this is the inputs.
  """

  tensors: tuple
  terms: tuple
  first: Array | int
  length: int
  cuts: tuple[selection.Cut, selection.Cut] | None = None


def forward(call: Call, branch: Branch, rows: Rows):
  """Returns out (B, T, N, H) and lse (B, T, N) of a branch and its children."""
  selected = _select(call, branch, rows)
  found = _attend_selected(call, branch, selected)
  for child in branch.children:
    more = forward(call, child, _as_rows(selected, (), rows))
    more = (x.reshape(y.shape) for x, y in zip(more, found, strict=True))
    found = attention.merge(*found, *more)
  out, lse = found
  length = _length(rows)
  return (
    selection.put_back(out, selected.row_cuts[0], length),
    selection.put_back(lse, selected.row_cuts[0], length, -jnp.inf),
  )


def backward(call: Call, branch: Branch, rows: Rows):
  """Returns dquery (B, T, N, H) and dkey, dvalue (B, T, K, H), as `forward`."""
  selected = _select(call, branch, rows)
  cut, key_cut = selected.row_cuts
  take = functools.partial(_take, rows=rows, cut=cut)
  terms = tuple(None if x is None else take(x) for x in rows.terms)
  out, lse, dout, dlse = terms
  if not call.settings.mixing_gradient:
    out, _ = _attend_selected(call, branch, selected)
  scale = call.settings.scale
  grads = _kernel(call, branch).backward(
    *selected.tensors, selected.mask, out, lse, dout, dlse, scale=scale
  )
  for child in branch.children:
    more = backward(call, child, _as_rows(selected, terms, rows))
    more = (x.reshape(y.shape) for x, y in zip(more, grads, strict=True))
    grads = tuple(map(jnp.add, grads, more))
  length, heads = _length(rows), rows.tensors[1].shape[2]

  def shared(x):  # what was selected of one key head adds up
    x = selection.put_back(x, key_cut, length)
    return x.reshape(*x.shape[:2], heads, -1, x.shape[-1]).sum(3)

  dquery, *dkeys = grads
  return selection.put_back(dquery, cut, length), *map(shared, dkeys)


def nested(call: Call, branches: list[Branch], length: int) -> list[Branch]:
  """Returns the branches as trees, each below the last whose rows hold its own.

  Those are the same rows where a rate is a multiple of the parent's and its
  segments are whole segments of the parent, so that all levels together read
  and write 1 + 1/4 + 1/16 + ... of the rows, for rates 1, 4, 16, ..., and not
  all of them for each. By index only what is kept is read: there, no trees.
  """
  if not call.dense:
    return branches
  roots, parents = [], []
  for branch in branches:
    for parent in reversed(parents):
      if _holds(call, parent[0], branch, length):
        break
    else:
      parent = None
    node = (branch, [])
    (roots if parent is None else parent[1]).append(node)
    parents.append(node)

  def grown(node):
    branch, children = node
    return branch._replace(children=tuple(map(grown, children)))

  return [grown(node) for node in roots]


def _holds(call, parent, child, length):
  """Returns whether the rows of a branch are among those of another."""
  heads, kv_heads = (x.shape[2] for x in call.inputs[:2])
  if child.far and (child.w % child.r or heads != kv_heads):
    return False  # its phases differ from device to device, or keys are lanes
  phases = call.all_phases(child.r) - call.all_phases(parent.r)
  divided = parent.w % parent.r, child.r % parent.r, child.w % parent.w
  return not any((*divided, length % parent.w, (phases % parent.r).any()))


class _Selected(NamedTuple):
  """What a kernel gets of a stretch, and how queries and keys were cut.

  cuts: of the positions. row_cuts: of the rows that they were selected from.
  """

  tensors: tuple  # query, key, value
  mask: kernels.Mask
  zero_keys: Array | None  # how many a row meets, (B, S, N or 1)
  cuts: tuple[selection.Cut, selection.Cut]
  row_cuts: tuple[selection.Cut, selection.Cut]


def _as_rows(selected, terms, rows):
  """Returns selected rows as what children select from."""
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  tensors, terms = jax.tree.map(flat, (selected.tensors, terms))
  return rows._replace(tensors=tensors, terms=terms, cuts=selected.cuts)


def _length(rows):
  """Returns how many rows there are to select from."""
  return rows.length if rows.cuts is None else rows.tensors[0].shape[1]


def _take(x, rows, cut):
  """Returns the rows of x that a cut of `rows` keeps."""
  if rows.cuts is None:
    return selection.select(x, cut, rows.first, rows.length)
  return selection.select(x, cut)


def _kernel(call, branch):
  return branch.far[0] if branch.far else call.kernel


def _attend_selected(call, branch, selected):
  """Returns out and lse of the selected rows."""
  out, lse = _kernel(call, branch).forward(
    *selected.tensors, selected.mask, scale=call.settings.scale
  )
  if selected.zero_keys is None:
    return out, lse
  # A zero key has score 0 and value 0: m of them are one key of score log m.
  zero_lse = jnp.log(selected.zero_keys.astype(lse.dtype))[:, :, None]
  zero_lse = jnp.broadcast_to(zero_lse, lse.shape)
  return attention.merge(out, lse, jnp.zeros_like(out), zero_lse)


def _select(call, branch, rows):
  """Returns the `_Selected` of a branch."""
  inputs, (first, length) = call.inputs, (rows.first, rows.length)
  cuts = cut, key_cut = _cuts(call, branch, rows)
  row_cuts = cuts
  if rows.cuts is not None:
    row_cuts = tuple(map(_relative, cuts, rows.cuts))
  # What is sent keeps its type.
  dtype = inputs.query.dtype if branch.far else call.product
  tensors = [
    _take(x, rows, c).astype(dtype)
    for x, c in zip(rows.tensors, (*row_cuts, row_cuts[1]), strict=True)
  ]
  start = call.place.start + first
  ends = None
  if inputs.lengths is not None:
    ends = jnp.clip(inputs.lengths - start, 0, length)
    tensors[1:] = (_zeroed(x, key_cut, ends) for x in tensors[1:])
  if branch.far:
    mask = kernels.Mask(call.settings.is_causal)  # the rest is its kernel's
    return _Selected(tuple(tensors), mask, None, cuts, row_cuts)
  lengths, zero_keys = _key_counts(call, cut, length, ends)
  bits = None
  if inputs.seed is not None:
    positions, _ = selection.positions(cut, -(-length // branch.w))
    positions = start + positions[..., 0]
    bits = tuple(call.bits(branch.index, positions, side) for side in (0, 1))
  ids = tuple(
    tuple(selection.select_ids(x, c, first, length) for c in cuts)
    for x in inputs.documents
  )
  rate = call.settings.dropout_rate
  mask = kernels.Mask(call.settings.is_causal, lengths, ids, bits, rate)
  return _Selected(tuple(tensors), mask, zero_keys, cuts, row_cuts)


def _cuts(call, branch, rows):
  """Returns how query heads and key heads are cut, by their positions.

  A key head is selected once if all of its query heads have the same phase,
  else for each of them.
  """
  if branch.far:
    return branch.far[1]
  w, r = branch.w, branch.r
  kv_heads = call.inputs.key.shape[2]
  by_head = call.all_phases(r).reshape(call.place.parts, 1, kv_heads, -1)
  phases = call.local(by_head)
  cut = selection.Cut(w, r, phases.reshape(1, -1, 1), call.way)
  alike = (by_head == by_head[..., :1]).all()
  if alike and rows.tensors[1].shape[2] == kv_heads:
    phases = phases[..., :1]
  return cut, cut._replace(phases=phases)


def _relative(cut, parent):
  """Returns the cut of a parent's rows that keeps what `cut` does."""
  rate = parent.rate
  phases = parent.phases.reshape(1, -1, 1)
  phases = cut.phases.reshape(1, phases.shape[1], -1) - phases
  return selection.Cut(
    cut.length // rate, cut.rate // rate, phases // rate, cut.way
  )


def _zeroed(rows, cut, ends):
  """Returns keys (B, S, R, N, H), zeros from position `ends` (B,) on.

  Nobody looks there, but there may be NaN, and 0 * NaN is NaN.
  """
  position, _ = selection.positions(cut, rows.shape[1])
  position = position.reshape(1, *position.shape[:2], -1, 1)
  seen = position < ends.reshape(-1, 1, 1, 1, 1)
  return jnp.where(seen, rows, jnp.zeros((), rows.dtype))


def _key_counts(call, cut, length, ends):
  """Returns how many keys and zero keys a row sees, (B, S, N); N is 1 at r = 1.

  None where it sees all of its segment, or all up to itself; and None where
  there are no zero keys. With padding="zeros" every segment, of w or of the
  whole sequence if that is shorter, is filled up to whole multiples of r.
  """
  w, r = cut.length, cut.rate
  causal, zeros = call.settings.is_causal, call.settings.padding == "zeros"
  ragged = length % w or w % r
  if ends is None and (causal or not ragged):
    return None, None
  whole = call.inputs.lengths
  if ends is None:
    ends = np.full((1,), length, np.int32)
    whole = np.full((1,), call.inputs.query.shape[1], np.int32)
  starts = w * np.arange(-(-length // w), dtype=np.int32)
  if r == 1:
    cut = cut._replace(phases=cut.phases[:, :1, :1])
  counts = selection.count(cut, ends[:, None] - starts[None])
  if causal or not zeros:
    return counts, None
  slots = -(-jnp.minimum(whole, w) // r)
  return counts, jnp.maximum(slots[:, None, None] - counts, 0)
