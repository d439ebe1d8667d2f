"""How long a training step takes, by what it multiplies, moves and sends.

Nothing is taken to run beside anything else, and kernels to reach the share of
the peak that `plan.py` gives them.
"""

from longnet_jax import plan
from longnet_jax.analysis import chips, costs
from longnet_jax.estimate import memory
from longnet_jax.estimate import rows as rows_lib
from longnet_jax.estimate.rows import WIDE

# Share of the matrix units' rate that products reach, with what is fused.
PRODUCT_SHARE = 0.7
# How often an array goes through memory, from being written to its last use: a
# LayerNorm and a softmax read their rows several times.
VISITS = 3.2
# What a block keeps is copied out of an array of all blocks.
_COPIES = 2
# How wide a tile is on TPU.
_LANES = 128
# How often filling up segments and cutting them again moves their rows.
_FILLINGS = 13


def of_step(
  config, chip: chips.Chip, platform: str, mesh, rows: rows_lib.Rows, received
) -> dict[str, float]:
  """Returns name -> seconds, "step" being all together.

  Args:
    config: an `ExperimentConfig`.
    chip: a device by its data sheet.
    platform: "tpu" or "gpu".
    mesh: of `parallel.mesh`, or its sizes alone.
    rows: those of a device.
    received: what `links.received` returned.
  """
  model, window = config.model, config.data.window
  windows = config.training.batch_size / mesh.size
  kernels = windows * costs.score_flops(model, window)
  products = windows * costs.computed_flops(model, window, platform) - kernels
  entered = rows.width * rows.itemsize
  block = VISITS * _made(model, rows, platform)
  block += _COPIES * max(memory.kept(model, rows, platform), entered)
  block += _selected(rows, platform, model.head_dim)
  logits = VISITS * _logits(rows, platform)
  moved = rows.parts * rows.count * (model.num_layers * block + logits)
  seconds = {
    "products": products / (PRODUCT_SHARE * chip.peak_flops),
    "memory": moved / chip.bandwidth,
    "kernels": kernels / (plan.KERNEL_SHARE * chip.peak_flops),
    "links": sum(received.values()) / chip.links,
  }
  return {**seconds, "step": sum(seconds.values())}


def _logits(rows, platform):
  """Returns the bytes of what is made of a row's logits.

  On TPU that is the softmax alone, in the type of the features.
  """
  if platform == "tpu" and rows.itemsize < WIDE:
    return rows.vocabulary * rows.itemsize
  return rows.vocabulary * (2 * WIDE + rows.itemsize)


def _made(model, rows, platform):
  """Returns the bytes of a row's arrays in a block, forward and backward."""
  # q, k, v, attended, its projection, sum.
  attention = 2 * rows.width + 2 * rows.queries + 2 * rows.keys
  # Product, GELU, second product, sum.
  feed_forward = 2 * rows.width + 2 * rows.hidden
  again = 0
  if model.remat == "dots":
    again = rows.hidden
    if platform == "tpu":
      again += rows.keys
    # One pass less: the product before it ends with the LayerNorm.
    again -= rows.hidden * memory.keeps_update(model, rows, platform)
  elif rows.again:
    again = attention + feed_forward
  if rows.itemsize == WIDE:  # else linear maps take over the norms
    attention += rows.width + rows.queries
    feed_forward += rows.width + rows.hidden
    again += 2 * rows.width + rows.queries + rows.hidden
  # Backward makes a gradient of each, and reads each.
  return (3 * (attention + feed_forward) + again) * rows.itemsize


def _selected(rows, platform, head_dim):
  """Returns the bytes that selecting rows and putting them back moves.

  A GPU reads what is kept, and puts back by writing all rows. On TPU a branch
  reads the rows of its parent (`ops/near.py`) and writes its own, or the other
  way round. At a rate by which blocks or segments do not divide, segments are
  filled up and cut again, in tiles that they do not fill.
  """
  taken = (1 + rows.again) * (rows.queries + 2 * rows.keys)
  taken += 3 * rows.queries + 2 * rows.keys
  added = (1 + rows.again) * rows.queries + rows.queries + 2 * rows.keys
  sizes = (taken, rows.itemsize), (added, WIDE)
  total, parents = 0, [(1, 1)]
  for w, r in (x for x in rows.branches if x[1] > 1):
    if platform != "tpu":
      total += taken * rows.itemsize * 2 / r + added * WIDE * (1 + 1 / r)
      continue
    rate = max(b for a, b in parents if not (r % b or w % a))
    step = r // rate
    if not w % r:
      parents.append((w, r))
    for values, size in sizes:
      if _LANES % step or w % r:
        lanes = -(-head_dim // _LANES) * _LANES
        total += _FILLINGS * values * size / rate * lanes / head_dim
      else:
        total += values * size * (1 / rate + 1 / r)
  return total
