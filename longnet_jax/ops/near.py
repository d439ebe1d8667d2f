"""One branch on one stretch of rows: select, attend, put back.

A stretch is some segments of a branch (w, r) that lie on one device. The rows
that a head keeps of a segment are in order, so that what a row may see is a
prefix of them: causality, ragged ends and lengths need no more than that.
"""

import functools
from typing import NamedTuple

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
    """Whether rows are selected by sums, as suits TPU, not by index."""
    return self.settings.platform == "tpu"

  def all_phases(self, rate: int) -> np.ndarray:
    """Returns the phases (parts, N) of all heads, also of other devices."""
    parts, heads = self.place.parts, self.inputs.query.shape[2]
    name = self.settings.head_phase
    phases = pattern.phases(parts * heads, rate, name).astype(np.int32)
    return phases.reshape(parts, heads)

  def own(self, of_parts: np.ndarray) -> np.ndarray | Array:
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


class Stretch(NamedTuple):
  """Some segments of a branch (w, r) inside a device's part.

  index: the branch's place among all.
  first: the first row; may be traced.
  length: rows, T.
  """

  index: int
  w: int
  r: int
  first: Array | int
  length: int


def forward(call: Call, stretch: Stretch):
  """Returns out (B, T, N, H) and lse (B, T, N) of a stretch."""
  selected = _select(call, stretch)
  out, lse = _attend(call, selected)
  put_back = functools.partial(
    selection.put_back, cut=selected.cut, length=stretch.length
  )
  return put_back(out), put_back(lse, fill=-jnp.inf)


def backward(call: Call, stretch: Stretch, terms: tuple):
  """Returns dquery (B, T, N, H) and dkey, dvalue (B, T, K, H) of a stretch.

  `terms` are out, lse, dout, dlse (or None) of the mixture, of all rows.
  """
  selected = _select(call, stretch)
  take = functools.partial(
    selection.select,
    cut=selected.cut,
    first=stretch.first,
    length=stretch.length,
  )
  out, lse, dout, dlse = (None if x is None else take(x) for x in terms)
  if not call.settings.mixing_gradient:
    out, _ = _attend(call, selected)
  dquery, *dkeys = call.kernel.backward(
    *selected.tensors,
    selected.mask,
    out,
    lse,
    dout,
    dlse,
    scale=call.settings.scale,
  )
  length, kv_heads = stretch.length, call.inputs.key.shape[2]

  def shared(x):  # the query heads of one key head add up
    x = selection.put_back(x, selected.key_cut, length)
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)

  dquery = selection.put_back(dquery, selected.cut, length)
  return dquery, *map(shared, dkeys)


class _Selected(NamedTuple):
  """What a kernel gets of a stretch, and how it was cut."""

  tensors: tuple  # query, key, value
  mask: kernels.Mask
  zero_keys: Array | None  # how many a row meets, (B, S, N)
  cut: selection.Cut
  key_cut: selection.Cut


def _attend(call, selected):
  """Returns out and lse of the selected rows."""
  out, lse = call.kernel.forward(
    *selected.tensors, selected.mask, scale=call.settings.scale
  )
  if selected.zero_keys is None:
    return out, lse
  # A zero key has score 0 and value 0: m of them are one key of score log m.
  zero_lse = jnp.log(selected.zero_keys.astype(lse.dtype))[:, :, None]
  zero_lse = jnp.broadcast_to(zero_lse, lse.shape)
  return attention.merge(out, lse, jnp.zeros_like(out), zero_lse)


def _select(call, stretch):
  """Returns the `_Selected` of a stretch."""
  inputs, (index, w, r, first, length) = call.inputs, stretch
  cut, key_cut = _cuts(call, w, r)
  where = {"first": first, "length": length}
  positions, _ = selection.positions(cut, -(-length // w))
  positions = call.place.start + first + positions[..., 0]
  tensors = [
    selection.select(x, c, **where).astype(call.product)
    for x, c in zip(inputs[:3], (cut, key_cut, key_cut), strict=True)
  ]
  ends = None
  if inputs.lengths is not None:
    ends = jnp.clip(inputs.lengths - (call.place.start + first), 0, length)
    tensors[1:] = (_hide(x, key_cut, ends) for x in tensors[1:])
  lengths, zero_keys = _key_counts(call, cut, length, ends)
  bits = tuple(call.bits(index, positions, side) for side in (0, 1))
  mask = kernels.Mask(
    is_causal=call.settings.is_causal,
    lengths=lengths,
    ids=tuple(
      tuple(selection.select_ids(x, c, **where) for c in (cut, key_cut))
      for x in inputs.documents
    ),
    bits=None if inputs.seed is None else bits,
    dropout_rate=call.settings.dropout_rate,
  )
  return _Selected(tuple(tensors), mask, zero_keys, cut, key_cut)


def _cuts(call, w, r):
  """Returns how query heads and key heads are cut.

  A key head is selected once if all of its query heads have the same phase,
  else for each of them.
  """
  kv_heads = call.inputs.key.shape[2]
  by_head = call.all_phases(r).reshape(call.place.parts, 1, kv_heads, -1)
  phases = call.own(by_head)
  cut = selection.Cut(w, r, phases.reshape(1, -1, 1), call.dense)
  if (by_head == by_head[..., :1]).all():
    phases = phases[..., :1]
  return cut, cut._replace(phases=phases)


def _hide(rows, cut, ends):
  """Returns keys (B, S, R, N, H), zeros from position `ends` (B,) on.

  Nobody looks there, but there may be NaN, and 0 * NaN is NaN.
  """
  position, _ = selection.positions(cut, rows.shape[1])
  position = position.reshape(1, *position.shape[:2], -1, 1)
  seen = position < ends.reshape(-1, 1, 1, 1, 1)
  return jnp.where(seen, rows, jnp.zeros((), rows.dtype))


def _key_counts(call, cut, length, ends):
  """Returns how many keys and how many zero keys a row sees, (B, S, N).

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
    ends = whole = np.full((1,), length, np.int32)
  starts = w * np.arange(-(-length // w), dtype=np.int32)
  counts = selection.count(cut, ends[:, None] - starts[None])
  if causal or not zeros:
    return counts, None
  slots = -(-jnp.minimum(whole, w) // r)
  return counts, jnp.maximum(slots[:, None, None] - counts, 0)
