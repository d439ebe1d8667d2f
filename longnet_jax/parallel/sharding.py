"""Where each parameter and batch lives on the mesh: one table of paths."""

import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from longnet_jax import checked
from longnet_jax.ops import kernels

# Parameters and moments are split over these axes together: each device keeps
# a share and gathers a layer's matrices when it needs them.
_FSDP = ("data", "seq")
# The least share by platform. A TPU moves 16 rows of bfloat16 at a time: for
# smaller shares XLA adds up whole matrices that are zero elsewhere.
_LEAST_SHARE = {"tpu": 16}
# But a parameter of as many numbers takes more memory whole than it saves time.
_LARGE = 2**26

# (pattern searched in a parameter's path, spec of its trailing axes). Leading
# axes, such as the layers that nn.scan stacks, are not split. First match wins.
RULES = (
  (r"attention/(query|key|value)/kernel$", P(_FSDP, "model", None)),
  (r"attention/out/kernel$", P("model", None, _FSDP)),
  (r"ffn/fc1/kernel$", P(_FSDP, "model")),
  (r"ffn/fc2/kernel$", P("model", _FSDP)),
  # Split along D, a lookup would make whole (B, T, D) arrays on each device.
  (r"(^|/)embedding$", P("model", None)),
  (r"(^|/)output$", P(_FSDP, "model")),
)

BATCH = P("data", "seq")
# Axes of a decoding cache: examples, layers, streams (a head and a phase).
_CACHE = ("data", None, "model")


def spec_for(path: str, shape: tuple[int, ...], mesh) -> P:
  """The PartitionSpec of a parameter; an axis that does not divide is whole."""
  for pattern, spec in RULES:
    if re.search(pattern, path) and len(spec) <= len(shape):
      is_large = math.prod(shape) >= _LARGE
      least = 1 if is_large else _LEAST_SHARE.get(kernels.platform(), 1)
      spec = (None,) * (len(shape) - len(spec)) + tuple(spec)
      return fit(spec, shape, mesh, least)
  return P()


def shardings_for(abstract, mesh):
  """NamedShardings for a tree of arrays or shapes, found by their paths.

  They suit the platform that is compiled for (`kernels.platform`).

  Optimizer moments lie under the same names as their parameters and so land
  beside them; counters and everything without a rule are on every device.
  """

  def place(path, leaf):
    return NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, abstract)


def place_for_reading(params, mesh):
  """Puts parameters that do not lie over the mesh where decoding wants them.

  That is split over `model` and otherwise whole: each token reads them all, so
  that gathering shares of them would cost more than the token. Parameters on
  all of the mesh's devices stay as they are.
  """
  devices = set(mesh.devices.flat)

  def place(path, leaf):
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
      return leaf
    spec = spec_for(path_name(path), leaf.shape, mesh)
    whole = P(*(axes if axes == "model" else None for axes in spec))
    return jax.device_put(leaf, NamedSharding(mesh, whole))

  return jax.tree_util.tree_map_with_path(place, params)


def cache_shardings(cache, mesh):
  """NamedShardings of a decoding cache: examples over data, heads over model.

  Every device along seq holds the same, as one token has no positions to split.
  """
  return jax.tree.map(
    lambda x: NamedSharding(mesh, fit(_CACHE[: x.ndim], x.shape, mesh)), cache
  )


def fit(spec, shape: tuple[int, ...], mesh, least: int = 1) -> P:
  """`spec` for an array of `shape`; an axis that does not divide is whole.

  What is split over several axes of the mesh together is split over one of
  them where a share would be less than `least`, or whole.
  """
  pairs = zip(shape, spec, strict=False)
  return P(*(_fit(size, names, mesh, least) for size, names in pairs))


def path_name(path) -> str:
  """A key path of jax.tree_util as "layers/attention/query"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh) -> NamedSharding:
  """Rows of a batch over data, positions over seq."""
  return NamedSharding(mesh, BATCH)


def host_rows(mesh, batch_size: int) -> tuple[int, int]:
  """(index, count): which of `count` equal parts of the rows this host needs.

  Hosts that share their rows and differ in positions get the same index.
  """
  shape = (batch_size, mesh.shape["seq"])
  slices = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
  first = min(rows.indices(batch_size)[0] for rows, _ in slices)
  last = max(rows.indices(batch_size)[1] for rows, _ in slices) - 1
  # The smallest part that holds them all; its rows need not all be needed.
  for size in range(last - first + 1, batch_size + 1):
    if batch_size % size == 0 and first // size == last // size:
      return first // size, batch_size // size
  raise AssertionError("the whole batch holds every row")


def place_batch(batch: dict[str, np.ndarray], mesh, batch_size: int) -> dict:
  """Global arrays (batch_size, T) from the rows that `host_rows` names."""
  sharding = batch_sharding(mesh)
  index, count = host_rows(mesh, batch_size)
  first = index * (batch_size // count)

  def place(local: np.ndarray):
    shape = (batch_size, *local.shape[1:])

    def part(where):
      start, stop, _ = where[0].indices(batch_size)
      return local[start - first : stop - first, where[1]]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(array) for name, array in batch.items()}


def check_mesh(
  mesh,
  *,
  batch_size: int,
  length: int,
  num_heads: int,
  kv_heads: int,
  ffn_dim: int,
) -> None:
  """Raises ValueError where the batch or the model does not divide."""
  for axis, numbers in (
    ("data", {"rows computed at a time": batch_size}),
    ("seq", {"positions of a window": length}),
    (
      "model",
      {
        "heads": num_heads,
        "key/value heads": kv_heads,
        "columns of ffn_dim": ffn_dim,
      },
    ),
  ):
    size = mesh.shape[axis]
    legal = checked.divisors(math.gcd(*numbers.values()))
    for what, number in numbers.items():
      if number % size:
        near = [n for n in legal if n <= size][-3:]
        near += [n for n in legal if n > size][:1]
        raise checked.RefusedError(
          f"mesh.{axis} is {size} and must divide the {number} {what}; "
          f"choose {' or '.join(map(str, near))}"
        )


def _fit(size: int, axes, mesh, least):
  """`axes` if their devices divide `size`, fewer of them, or None."""
  if not isinstance(axes, tuple):
    return axes if axes is None or size % mesh.shape[axes] == 0 else None
  whole, *parts = sorted((axes, *axes), key=lambda x: -_count(x, mesh))
  for names in (whole, *(x for x in parts if _count(x, mesh) > 1)):
    share, rest = divmod(size, _count(names, mesh))
    if not rest and share >= least:
      return names
  return None


def _count(axes, mesh):
  names = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(mesh.shape[name] for name in names)
