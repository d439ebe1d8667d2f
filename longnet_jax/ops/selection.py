"""Which rows a head keeps, and where they go back to: two reshapes.

A branch (w, r) cuts T positions into S segments of w rows; of every r rows a
head keeps the one at its phase (eqs. 4-6 and section 2.3 of arXiv 2307.02486).
With w filled up to R r rows,

    select:    (B, T, K, ...) -> (B, S, R, r, K, ...) -> (B, S, R, N, ...)
    put_back:  (B, S, R, N, ...) -> (B, S, R, r, N, ...) -> (B, T, N, ...)

and each is the other's transpose. Batch and heads stay axes of their own from
end to end, so arrays that are split over devices along them stay so.
"""

from typing import Literal, NamedTuple

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped
import numpy as np

_BLOCK = 128  # the most rows among which one matrix selects
_BLOCKS = 8  # the fewest of a segment that is filled up to whole blocks
_Either = Array | np.ndarray  # NumPy where known before tracing


class Cut(NamedTuple):
  """How rows are cut: segments of `length` rows, of which one in `rate` stays.

  phases: (P, K, G), the row of every `rate` that is kept, for each of the G
    selections from each of K heads; for each segment, or P = 1 for all.
  way: "index" takes only what is kept. "sum" and "product" pass over all rows
    without an index, as suits TPUs: a masked sum over each r, or where it can
    the product of a block of rows with zeros and ones, which is exact, and
    faster; but if one of them is not finite all are NaN.
  """

  length: int
  rate: int
  phases: Int[_Either, "P K G"]
  way: Literal["index", "sum", "product"] = "index"

  @property
  def kept(self) -> int:
    """R, the most rows that are kept of a segment."""
    return -(-self.length // self.rate)


def select(
  x: Shaped[Array, "B L K *rest"],
  cut: Cut,
  first: Array | int = 0,
  length: int | None = None,
) -> Shaped[Array, "B S R N *rest"]:
  """Returns the rows that are kept of a stretch of x; beyond its end, 0.

  Args:
    x: rows of K heads.
    cut: how the stretch is cut.
    first: the first row of the stretch; may be traced.
    length: its rows, T; by default all from `first` on.
  """
  length = x.shape[1] if length is None else length
  whole = cut.rate == 1 and cut.phases.shape[2] == 1
  if x.ndim == 4 and length == x.shape[1] and _in_blocks(cut):
    found = _product(x, cut)
  elif cut.way != "index" or (whole and isinstance(first, int)):
    if length < x.shape[1]:
      x = lax.dynamic_slice_in_dim(x, first, length, axis=1)
    x = _segments(x, cut)
    found = x[:, :, :, 0, :, None] if whole else _masked_sum(x, cut)
  else:
    found = _taken(x, cut, first, length)
  return found.reshape(*found.shape[:3], -1, *found.shape[5:])


def select_ids(
  ids: Int[Array, "B L"],
  cut: Cut,
  first: Array | int = 0,
  length: int | None = None,
) -> Int[Array, "B S R N"]:
  """Returns the ids of the rows that are kept; N is 1 where all heads agree."""
  phases = cut.phases.reshape(cut.phases.shape[0], 1, -1)
  if cut.rate == 1:
    phases = phases[..., :1]
  return select(ids[:, :, None], cut._replace(phases=phases), first, length)


def put_back(
  rows: Shaped[Array, "B S R N *rest"], cut: Cut, length: int, fill: float = 0
) -> Shaped[Array, "B T N *rest"]:
  """Returns `length` rows, `fill` where a head has kept none.

  A broadcast over the r phases and a mask, which compilers fuse with what
  follows, where a scatter would run row by row.
  """
  batch, segments, kept, heads, *rest = rows.shape
  if rows.ndim == 5 and not fill and _in_blocks(cut):
    return _product_back(rows, cut, length)
  if cut.rate > 1:
    is_kept = _is_kept(cut).reshape(-1, cut.rate, heads)
    is_kept = is_kept.reshape(1, -1, 1, cut.rate, heads, *[1] * len(rest))
    fill = jnp.asarray(fill, rows.dtype)
    rows = jnp.where(is_kept, rows[:, :, :, None], fill)
  rows = rows.reshape(batch, segments, kept * cut.rate, heads, *rest)
  rows = rows[:, :, : cut.length]
  return rows.reshape(batch, -1, heads, *rest)[:, :length]


def positions(
  cut: Cut, segments: int
) -> tuple[Int[Array, "S R K G"], Bool[Array, "S R K G"]]:
  """Returns where the rows that are kept lie, and whether in their segment."""
  shape = segments, cut.kept, *cut.phases.shape[1:]
  row = cut.rate * lax.broadcasted_iota(jnp.int32, shape, 1)
  row += jnp.asarray(cut.phases, jnp.int32)[:, None]
  start = cut.length * lax.broadcasted_iota(jnp.int32, shape, 0)
  return start + row, row < cut.length


def count(cut: Cut, rows: Int[_Either, "B S"]) -> Int[Array, "B S N"]:
  """Returns how many rows are kept of each segment's first `rows`."""
  rows = jnp.clip(rows, 0, cut.length)[:, :, None]
  return (rows - _of_heads(cut)[None] + (cut.rate - 1)) // cut.rate


def _segments(x, cut):
  """Returns (B, S, R, r, K, ...), zeros behind each segment and the end."""
  x = _filled_segments(x, cut, cut.rate)
  return x.reshape(*x.shape[:2], cut.kept, cut.rate, *x.shape[3:])


def _filled_segments(x, cut, multiple):
  """Returns (B, S, w, K, ...), w filled up with zeros to a whole multiple."""
  batch, length, *rest = x.shape
  segments = -(-length // cut.length)
  x = _fill(x, 1, segments * cut.length)
  x = x.reshape(batch, segments, cut.length, *rest)
  return _fill(x, 2, -(-cut.length // multiple) * multiple)


def _fill(x, axis, size):
  if x.shape[axis] == size:
    return x
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding)


def _is_kept(cut):
  """Returns (P, r, K, G), whether a row of r is kept."""
  row = np.arange(cut.rate, dtype=np.int32)[None, :, None, None]
  return row == cut.phases[:, None]


def _of_heads(cut):
  """Returns the phases (P, N)."""
  return cut.phases.reshape(cut.phases.shape[0], -1)


def _masked_sum(x, cut):
  """Returns (B, S, R, K, G, ...) from (B, S, R, r, K, ...)."""
  rest = x.ndim - 5
  is_kept = _is_kept(cut)
  is_kept = is_kept.reshape(
    1, is_kept.shape[0], 1, *is_kept.shape[1:], *[1] * rest
  )
  x = jnp.expand_dims(x, 5)
  return jnp.where(is_kept, x, jnp.zeros((), x.dtype)).sum(3, dtype=x.dtype)


def _in_blocks(cut):
  """Returns whether blocks of rows may be selected by one matrix a head."""
  if cut.way != "product" or not 1 < cut.rate <= _BLOCK:
    return False
  count, rest = divmod(cut.length, _block(cut))
  return cut.phases.shape[0] == 1 and (not rest or count >= _BLOCKS)


def _block(cut):
  """Returns the rows of a block: r times a power of two, at most `_BLOCK`."""
  return cut.rate << (_BLOCK // cut.rate).bit_length() - 1


def _picks(cut, dtype):
  """Returns (K, G, block / r, block), 1 where a row is kept."""
  row = np.arange(_block(cut), dtype=np.int32)
  first = np.arange(0, _block(cut), cut.rate, dtype=np.int32)
  kept = first[None, None, :, None] + cut.phases[0][:, :, None, None]
  return (row[None, None, None] == kept).astype(dtype)


def _product(x, cut):
  """As `_masked_sum` of all rows, (B, S, R, K, G, H)."""
  x = _filled_segments(x, cut, _block(cut))
  batch, segments, _, heads, width = x.shape
  found = jnp.einsum(
    "bstkh,kgmt->bsmkgh",
    x.reshape(batch, -1, _block(cut), heads, width),
    _picks(cut, x.dtype),
    precision=lax.Precision.HIGHEST,
  )
  shape = batch, segments, -1, *cut.phases.shape[1:], width
  return found.reshape(shape)[:, :, : cut.kept]


def _product_back(rows, cut, length):
  """As `put_back` with zeros."""
  kept = _block(cut) // cut.rate
  rows = _fill(rows, 2, -(-cut.kept // kept) * kept)
  batch, segments, _, heads, width = rows.shape
  picks = _picks(cut, rows.dtype)
  found = jnp.einsum(
    "bsmnh,nmt->bstnh",
    rows.reshape(batch, -1, kept, heads, width),
    picks.reshape(heads, *picks.shape[2:]),
    precision=lax.Precision.HIGHEST,
  )
  found = found.reshape(batch, segments, -1, heads, width)[:, :, : cut.length]
  return found.reshape(batch, -1, heads, width)[:, :length]


def _taken(x, cut, first, length):
  """As `_masked_sum`, reading only what is kept; K stays a batch axis."""
  rest = x.ndim - 3
  position, real = positions(cut, -(-length // cut.length))
  real &= position < length
  sizes = [x.shape[0], 1, 1, *x.shape[3:]]
  found = lax.gather(
    x,
    (first + jnp.minimum(position, length - 1))[..., None],
    lax.GatherDimensionNumbers(
      offset_dims=(0, *range(5, 5 + rest)),
      collapsed_slice_dims=(1,),
      start_index_map=(1,),
      operand_batching_dims=(2,),
      start_indices_batching_dims=(2,),
    ),
    slice_sizes=sizes,
    mode="promise_in_bounds",
  )
  real = real.reshape(1, *real.shape, *[1] * rest)
  return jnp.where(real, found, jnp.zeros((), x.dtype))
