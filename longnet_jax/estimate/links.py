"""What a device receives from others in a training step.

Of attention, what `ops/sharded.py` counts: keys and values once forward and
once backward, and their gradients in float32. Of parameters that are split, one
gather each way, and one sum of gradients. Of a model axis, sums of the residual
stream.
"""

import collections
import math

import jax

from longnet_jax.estimate import rows as rows_lib
from longnet_jax.estimate.rows import WIDE
from longnet_jax.ops import arguments, sharded
from longnet_jax.parallel import sharding

_DTYPES = {2: "bf16", WIDE: "f32"}
_TILE = 16  # rows of bfloat16 that lie together on TPU


def received(
  config, platform: str, mesh, rows: rows_lib.Rows, params
) -> dict[tuple[str, str, int], int]:
  """Returns (kind, type, group) -> bytes.

  Args:
    config: an `ExperimentConfig`.
    platform: "tpu" or "gpu".
    mesh: of `parallel.mesh`, or its sizes alone.
    rows: those of a device.
    params: abstract, as they lie on the mesh.
  """
  total = collections.Counter()
  found = (
    *_of_attention(config, mesh, rows),
    *_of_parameters(config, platform, mesh, rows, params),
    *_of_heads(config, mesh, rows),
  )
  for kind, itemsize, group, share, size in found:
    is_small = kind == "reduce-scatter" or share <= _TILE
    if platform == "tpu" and group == mesh.size and is_small:
      # Of what all devices share the compiler for TPUs makes a sum of all, and
      # of a gather too, where a device's share is no more than a tile.
      size *= 1 if kind == "all-reduce" else 2
      kind = "all-reduce"
    total[kind, _DTYPES[itemsize], group] += round(size * rows.parts)
  return dict(total)


def _of_attention(config, mesh, rows):
  """Yields (kind, itemsize, devices, rows of a share, bytes), as all below."""
  model, split = config.model, mesh.shape["model"]
  lengths, rates = zip(*rows.branches, strict=True)
  length = config.data.window // mesh.shape["seq"]
  _, far = sharded.near_and_far(
    arguments.make_settings(
      model.head_dim,
      segment_lengths=lengths,
      dilation_rates=rates,
      is_causal=True,
      head_phase=model.head_phase,
      padding=model.padding,
    ),
    length=length,
    num_heads=model.num_heads // split,
    kv_heads=model.kv_heads // split,
    parts=split,
    shards=mesh.shape["seq"],
    axis_name="seq",
  )
  for branch in far:
    size = model.num_layers * sharded.received_bytes(
      branch,
      batch=rows.windows,
      length=length,
      head_width=model.head_dim,
      itemsize=rows.itemsize,
    )
    where = branch.exchange.slots, branch.rows(length)
    yield "all-gather", rows.itemsize, *where, 2 * size
    yield "reduce-scatter", WIDE, *where, size * WIDE // rows.itemsize


def _of_parameters(config, platform, mesh, rows, params):
  """Yields what gathers of parameters and sums of gradients bring."""
  devices = mesh.shape["data"] * mesh.shape["seq"]
  if devices == 1:
    return
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = sharding.path_name(path)
    local = leaf.sharding.shard_shape(leaf.shape)
    parts = _parts(leaf.sharding.spec, mesh)
    shared = math.prod(local)
    in_block = name.startswith("layers/")
    # The loss, lookups and chunks add up in float32, and on TPU all does.
    is_chunked = config.model.ffn_chunk and "/ffn/" in name
    is_exact = platform == "tpu" or not in_block or is_chunked
    itemsize = WIDE if is_exact else rows.itemsize
    if parts > 1:
      pairs = zip(local, leaf.sharding.spec, strict=False)
      share = next(n for n, axes in pairs if _parts((axes,), mesh) > 1)
      others = shared * (parts - 1)
      gathered = 2 * others * rows.itemsize
      yield "all-gather", rows.itemsize, parts, share, gathered
      yield "reduce-scatter", itemsize, parts, share, others * itemsize
    if same := devices // parts - 1:
      times = 1 + (config.model.tie_embeddings and name == "embedding")
      size = 2 * times * shared * itemsize * same / (same + 1)
      yield "all-reduce", itemsize, same + 1, 0, size


def _parts(spec, mesh):
  """Returns over how many devices a parameter is split but for the model's."""
  found = 1
  for axes in spec:
    for name in axes if isinstance(axes, tuple) else (axes,):
      found *= mesh.shape[name] if name in ("data", "seq") else 1
  return found


def _of_heads(config, mesh, rows):
  """Yields what the sums over a model axis bring."""
  split = mesh.shape["model"]
  if split > 1:
    # Of each half of a block, forward and backward; again; lookup and loss.
    sums = config.model.num_layers * (4 + rows.again) + 2
    size = 2 * (split - 1) / split * rows.count * rows.width * rows.itemsize
    yield "all-reduce", rows.itemsize, split, 0, sums * size
