"""The kernel for TPU: one Pallas program forward, one fused backward.

What they compute is in `pallas_programs.py`; here is what lies where. Rows lie
as (B, N, S M, H) where 128 divides H: as a selection that sums over r leaves
them, if that lays heads out before rows, so that r are sublanes of the same
lanes. Narrower heads would leave lanes empty there, and lie as (B, N, H, S M).
Vectors lie as (B, N, 1, S M). XLA gives (B, S, M, N, H) such a layout where we
ask for it, so that none of this is a copy, and nothing is in memory but
arguments and results.

Each step of a grid takes a tile of queries and one of keys. A sequence of a
branch is one tile, as a rule; of a longer one, what is above the diagonal or
past a length is neither fetched nor computed. Where there is no TPU the same
programs are interpreted, slowly.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import numpy as np

from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import pallas_programs as programs

WIDEST = 256


class Sizes(NamedTuple):
  """Sizes that the compiler's schedule chose; results do not depend on them.

  lanes: rows of a block, and of half a block, are a multiple of it.
  block: rows that meet at once, of queries and of keys.
  tile: rows of either that lie in VMEM at once.
  resident: elements of dquery that do, of all query heads of a key head.
  vmem: bytes of it that a program may take.
  """

  lanes: int = 128
  block: int = 512
  tile: int = 2048
  resident: int = 2**21
  vmem: int = 48 * 2**20


SIZES = Sizes()


def make_kernel(platform: str) -> kernels.Kernel:
  """Returns the kernel; lowering decides whether it is interpreted."""
  return kernels.Kernel(
    _forward, _backward, functools.partial(_supports, platform=platform)
  )


def _supports(query, key, mask, dlse=None, *, platform):
  """Returns None, or why not."""
  del key, dlse
  if platform == "gpu":
    return "runs on TPUs, not on gpu"
  if mask.dropout_rate:
    return f"drops nothing out, and dropout_rate is {mask.dropout_rate}"
  if query.dtype == jnp.float64:
    return "attends in float32 or bfloat16, not float64"
  if query.shape[-1] > WIDEST:
    return f"takes head widths to {WIDEST}, not {query.shape[-1]}"
  if not isinstance(query.shape[0], int):
    return f"needs to know the batch size, which is {query.shape[0]}"
  # Before rows are selected, this is not yet inside the shard_map it may need.
  return _placing(query, platform) if query.ndim == 5 else None


def _placing(query, platform):
  """Returns None, or why not where arrays are split over devices."""
  axes = jax.sharding.get_abstract_mesh().axis_types
  compiled = platform == "tpu"
  explicit = jax.sharding.AxisType.Explicit in axes
  if explicit or (compiled and not kernels.is_local()):
    return (
      "cannot be split over devices by the compiler; call it inside "
      "jax.shard_map, or longnet_jax.sequence_parallel_attention"
    )
  if not compiled and jax.typeof(query).manual_axis_type.varying:
    return f"is interpreted on {platform}, and that on one device alone"
  return None


class _Side(NamedTuple):
  """Queries or keys: how they are cut, and which tile is next.

  where: (*indices of a grid, scalars) -> example, head, tile of all sequences.
  """

  cut: programs.Cut
  where: Callable


def _forward(query, key, value, mask, *, scale):
  """Returns out (B, S, M, N, H) and lse (B, S, M, N)."""
  plan = _plan(query, key, mask, scale)

  def of_rows(b, n, s, i, j, scalars):
    return b, n, s * plan.queries.tiles + i

  def of_keys(b, n, s, i, j, scalars):
    if plan.keys.tiles > 1:
      seen = (i + 1) * plan.queries.tile if plan.is_causal else plan.keys.rows
      if plan.has_length:
        seen = jnp.minimum(seen, plan.length(scalars, b, n, s))
      j = jnp.minimum(j, _div(jnp.maximum(seen - 1, 0), plan.keys.tile))
    return b, _div(n, plan.group), s * plan.keys.tiles + j

  rows = _Side(plan.queries, of_rows)
  keys = _Side(plan.keys, of_keys)
  shapes = query.shape, query.shape[:4]
  return _run(
    plan,
    "longnet_forward",
    programs.forward,
    grid=(
      plan.batch,
      plan.heads,
      plan.segments,
      plan.queries.tiles,
      plan.keys.tiles,
    ),
    scalars=_scalars(plan, key, mask),
    given=[(query, rows), (key, keys), (value, keys), *_ids(mask, rows, keys)],
    results=[(shape, rows, _spec(plan, shape, rows)) for shape in shapes],
    scratch=[
      (1, plan.queries.tile),
      (1, plan.queries.tile),
      (plan.width, plan.queries.tile),
    ],
  )


def _backward(query, key, value, mask, out, lse, dout, dlse, *, scale):
  """Returns dquery (B, S, M, N, H) and dkey, dvalue (B, S, n, K, H).

  Queries come in parts where their gradient is more than VMEM should hold.
  """
  _, _, length, heads, width = query.shape
  run = functools.partial(_backward_part, key, value, mask, scale)
  parts = query, out, lse, dout, dlse, tuple(x for x, _ in mask.ids)
  most = SIZES.resident * key.shape[3] // (heads * width)
  size = max(most // SIZES.block, 1) * SIZES.block
  if length <= size:
    return run(parts, 0)
  count = -(-length // size)
  parts = jax.tree.map(lambda x: _pad(x, 2, count * size), parts)

  def add(total, first):
    cut = lambda x: lax.dynamic_slice_in_dim(x, first, size, axis=2)
    dquery, *dkeys = run(jax.tree.map(cut, parts), first)
    return list(map(jnp.add, total, dkeys)), dquery

  total = [jnp.zeros_like(x, jnp.float32) for x in (key, value)]
  starts = size * jnp.arange(count, dtype=jnp.int32)
  dkeys, dquery = lax.scan(add, total, starts)
  dquery = jnp.moveaxis(dquery, 0, 2)
  dquery = dquery.reshape(*query.shape[:2], -1, heads, width)
  return dquery[:, :, :length], *dkeys


def _backward_part(key, value, mask, scale, part, first):
  """As `_backward`, of queries from row `first` on, which may be traced."""
  query, out, lse, dout, dlse, ids = part
  ids = zip(ids, (x for _, x in mask.ids), strict=True)
  mask = mask._replace(ids=tuple(ids))
  plan = _plan(query, key, mask, scale)

  def of_rows(b, n, s, j, g, i, scalars):
    if plan.is_causal and plan.keys.tiles > 1:
      below = jnp.maximum(j * plan.keys.tile - scalars[0], 0)
      i = jnp.maximum(
        i, jnp.minimum(_div(below, plan.queries.tile), plan.queries.tiles - 1)
      )
    return b, n * plan.group + g, s * plan.queries.tiles + i

  def of_keys(b, n, s, j, g, i, scalars):
    return b, n, s * plan.keys.tiles + j

  def of_group(b, n, s, j, g, i, scalars):
    return (b, n, 0, s) if plan.down else (b, n, s, 0)

  rows = _Side(plan.queries, of_rows)
  keys = _Side(plan.keys, of_keys)
  whole = pl.BlockSpec(
    (None, plan.group, *plan.shape(plan.queries.rows)), of_group
  )
  dkey = key.shape, keys, _spec(plan, key.shape, keys)
  terms = [x for x in (out, lse, dout, dlse) if x is not None]
  given = [(query, rows), (key, keys), (value, keys)]
  return _run(
    plan,
    "longnet_backward",
    functools.partial(programs.backward, has_dlse=dlse is not None),
    grid=(
      *(plan.batch, plan.heads // plan.group, plan.segments),
      *(plan.keys.tiles, plan.group, plan.queries.tiles),
    ),
    scalars=_scalars(plan, key, mask, first),
    given=[*given, *((x, rows) for x in terms), *_ids(mask, rows, keys)],
    results=[(query.shape, rows, whole), dkey, dkey],
  )


def _run(plan, name, program, grid, scalars, given, results, scratch=()):
  """Returns what a program computes, float32.

  Args:
    plan: the `programs.Plan`.
    name: what profiles call it.
    program: takes references to all that follows, in this order, and `plan`.
    grid: how often it runs; the first three axes in any order.
    scalars: ints that are known before anything else is fetched.
    given: (array, `_Side`) each.
    results: (shape, `_Side`, block) each.
    scratch: shapes.
  """
  arrays = [_lay(plan, x, side) for x, side in given]
  specs = [_spec(plan, x.shape, side) for x, side in given]
  # Results differ from device to device where queries do.
  manual = jax.typeof(given[0][0]).manual_axis_type
  shapes = [
    jax.ShapeDtypeStruct(
      _lying(plan, *x[:2]), jnp.float32, manual_axis_type=manual
    )
    for x in results
  ]
  products = len(results) + len(results) // 3 * 2  # 2 forward, 5 backward
  pairs = (
    plan.batch * plan.heads * plan.segments * plan.queries.rows * plan.keys.rows
  )
  pairs //= 1 + plan.is_causal
  make = functools.partial(
    pl.pallas_call,
    functools.partial(program, plan=plan),
    name=name,
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=specs,
      out_specs=[spec for _, _, spec in results],
      scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=["parallel"] * 3 + ["arbitrary"] * (len(grid) - 3),
      vmem_limit_bytes=SIZES.vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * pairs * plan.width,
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
    ),
  )
  found = lax.platform_dependent(
    scalars, *arrays, tpu=make(), default=make(interpret=True)
  )
  return tuple(
    _as_given(plan, x, shape)
    for x, (shape, _, _) in zip(found, results, strict=True)
  )


def _plan(query, key, mask, scale):
  batch, segments, rows, heads, width = query.shape
  size, kv_heads = key.shape[2:4]
  keys = _cut(size)
  return programs.Plan(
    batch=batch,
    segments=segments,
    heads=heads,
    group=heads // kv_heads,
    width=_filled(width, 16),
    queries=_cut(rows),
    keys=keys,
    down=width % 128 != 0,
    is_causal=mask.is_causal,
    has_length=mask.lengths is not None
    or (keys.rows > size and not mask.is_causal),
    scale=scale,
  )


def _cut(rows):
  block = min(SIZES.block, _filled(rows, SIZES.lanes))
  tiles = -(-rows // SIZES.tile)
  tile = _filled(-(-rows // tiles), block)
  half = block % (2 * SIZES.lanes) == 0
  return programs.Cut(tiles * tile, tile, block, half)


def _scalars(plan, key, mask, first=0):
  """Returns the first row, and lengths of (B, N, S) or one for all."""
  lengths, count = mask.lengths, key.shape[2]
  if lengths is None:
    lengths = jnp.full((1,), count, jnp.int32)
  elif lengths.ndim:
    shape = plan.batch, plan.segments, plan.heads
    lengths = jnp.broadcast_to(lengths, shape).transpose(0, 2, 1)
  lengths = jnp.minimum(lengths.astype(jnp.int32), count).reshape(-1)
  return jnp.concatenate([jnp.asarray(first, jnp.int32).reshape(1), lengths])


def _ids(mask, rows, keys):
  """Returns the ids, query and key in turn, each with its `_Side`."""
  return [found for x, y in mask.ids for found in ((x, rows), (y, keys))]


def _lying(plan, shape, side):
  """Returns the shape that an array (B, S, M, N, ...) lies in."""
  batch, segments, _, heads = shape[:4]
  rows = segments * side.cut.rows
  return batch, heads, *((1, rows) if len(shape) == 4 else plan.shape(rows))


def _lay(plan, x, side):
  """Returns an array (B, S, M, N, ...) as it lies, filled up with zeros."""
  batch, segments, _, heads = x.shape[:4]
  x = _pad(x, 2, side.cut.rows)
  # Joined first: this undoes how segments were cut, and no copy is left.
  rows = batch, segments * side.cut.rows, heads
  if x.ndim == 4:
    return x.reshape(rows).transpose(0, 2, 1)[:, :, None]
  x = _pad(x, 4, plan.width).reshape(*rows, plan.width)
  return x.transpose((0, 2, 3, 1) if plan.down else (0, 2, 1, 3))


def _as_given(plan, x, shape):
  """Returns an array (B, S, M, N, ...) from how it lies."""
  if len(shape) == 4:
    x = x[:, :, 0].transpose(0, 2, 1)
  else:
    x = x.transpose((0, 3, 1, 2) if plan.down else (0, 2, 1, 3))
  x = x.reshape(*shape[:2], -1, *x.shape[2:])
  return x[tuple(slice(n) for n in shape)]


def _spec(plan, shape, side):
  """Returns which block of an array (B, S, M, N, ...) a step takes."""
  examples, heads, is_vector = shape[0], shape[3], len(shape) == 4

  def index(*at):
    b, n, tile = side.where(*at)
    b, n = b if examples > 1 else 0, n if heads > 1 else 0
    return (b, n, 0, tile) if is_vector or plan.down else (b, n, tile, 0)

  block = (1, side.cut.tile) if is_vector else plan.shape(side.cut.tile)
  return pl.BlockSpec((None, None, *block), index)


def _pad(x, axis, size):
  if x.shape[axis] == size:
    return x
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding)


def _filled(number, to):
  return -(-number // to) * to


def _div(number, by):
  """Returns number // by, of what is not negative, as Pallas likes it."""
  return lax.div(number, np.int32(by))
