"""Computing inside a mesh whose axes are explicit, JAX's default.

There the type of an array says where it lies, and every operation must say
where its result does. What is written here says so once, of the results, and
leaves all between to the compiler, as in a mesh of automatic axes.
"""

from collections.abc import Callable

import jax
from jax import typeof


def like_query(run: Callable, query: jax.Array, has_lse: bool) -> Callable:
  """Returns `run` for a caller's mesh, whose results lie where query does.

  Args:
    run: a function of any arrays to (out, lse).
    query: (B, T, N, H); out is such an array, lse (B, T, N).
    has_lse: whether lse is an array, not None.
  """
  where = typeof(query).sharding
  axes = zip(where.mesh.axis_names, where.mesh.axis_types, strict=True)
  kinds = jax.sharding.AxisType
  explicit = tuple(name for name, kind in axes if kind == kinds.Explicit)
  if not explicit:
    return run
  rows = jax.sharding.PartitionSpec(*where.spec[:3])
  of_lse = jax.sharding.NamedSharding(where.mesh, rows) if has_lse else None
  return jax.sharding.auto_axes(
    run, axes=explicit, out_sharding=(where, of_lse)
  )
