"""How much memory a training step takes of a device, at its peak.

That is the state, its gradients, what blocks keep for their backward passes,
and the most that is worked on at a time: the backward pass of a feed-forward
layer, that of an attention layer, or a chunk of logits.
"""

import math

from longnet_jax import plan
from longnet_jax.estimate import rows as rows_lib
from longnet_jax.estimate.rows import WIDE


def peak_and_host(
  config, platform: str, mesh, rows: rows_lib.Rows, state
) -> tuple[int, int]:
  """Returns the bytes of a device, and those in the memory of the host.

  Args:
    config: an `ExperimentConfig`.
    platform: "tpu" or "gpu".
    mesh: of `parallel.mesh`, or its sizes alone.
    rows: those of a device.
    state: the abstract `TrainState` as it lies on the mesh.
  """
  model = config.model
  entered = rows.width * rows.itemsize
  tables = 2 * model.head_dim * WIDE if model.position != "none" else 0
  blocks = model.num_layers * kept(model, rows, platform)
  size = rows.count * (blocks + tables)
  size += plan.device_bytes((state.params, state.opt_state))
  size += _gradients(config, rows, state.params)
  backward = max(_feed_forward(config, rows), _attention(rows))
  if rows.again:
    backward += _named(model, rows)
  size += max(rows.count * backward, _loss(config, mesh, rows))
  host = model.num_layers * entered * rows.count
  return math.ceil(size), host if model.remat == "offload" else 0


def kept(model, rows: rows_lib.Rows, platform: str) -> int:
  """Returns the bytes a row that a block keeps until its backward pass.

  In bfloat16 "dots" keeps what the two LayerNorms of the stream made, in the
  place of what entered and of the projection: as many bytes. A TPU does not
  keep the values, but the update of the feed-forward layer (`keeps_update`).
  """
  entered = rows.width * rows.itemsize
  dots = entered + _named(model, rows)
  if platform == "tpu":
    dots -= rows.keys * rows.itemsize
  if keeps_update(model, rows, platform):
    dots += rows.width * rows.itemsize
  return {
    "none": _everything(model, rows),
    "dots": dots,
    "full": entered,
    "offload": 0,
  }[model.remat]


def keeps_update(model, rows: rows_lib.Rows, platform: str) -> bool:
  """Returns whether "dots" keeps what a feed-forward layer adds."""
  on_tpu = platform == "tpu" and rows.itemsize < WIDE
  return on_tpu and model.sub_layernorm and not model.ffn_chunk


def _named(model, rows):
  """Returns bytes of q, k, v, out, its logsumexp, and the projection of it."""
  values = 2 * rows.queries + 2 * rows.keys + rows.width
  return values * rows.itemsize + rows.queries // model.head_dim * WIDE


def _everything(model, rows):
  """Returns bytes of what remat="none" keeps.

  Of each LayerNorm, and of GELU, three arrays in float32 and the result; and
  all that has a name but the projection, which is only added.
  """
  exact = 2 * rows.width + rows.queries + 2 * rows.hidden
  results = 2 * rows.width + rows.queries + rows.hidden
  named = _named(model, rows) - rows.width * rows.itemsize
  return 3 * exact * WIDE + results * rows.itemsize + named


def _gradients(config, rows, params):
  """Returns bytes of the gradients, and of their sum over parts."""
  size = plan.device_bytes(params) * (1 + (rows.parts > 1))
  # Lookup and loss make the gradient of a tied matrix apart.
  tied = rows.vocabulary * rows.width * WIDE
  return size + tied * config.model.tie_embeddings


def _feed_forward(config, rows):
  """Returns bytes a row: product and GELU of a chunk, and their gradients.

  And four of the stream.
  """
  chunk, window = config.model.ffn_chunk, config.data.window
  share = chunk / window if 0 < chunk < window else 1
  return (4 * share * rows.hidden + 4 * rows.width) * rows.itemsize


def _attention(rows):
  """Returns bytes a row: gradients of q, k, v add up in float32."""
  added = (rows.queries + 2 * rows.keys) * WIDE
  # The norm of x, and the gradients of x and of what was attended.
  stream = (2 * rows.width + rows.queries) * rows.itemsize
  # q, k, v, out and its gradient, of the rows that branches select.
  selected = (3 * rows.queries + 2 * rows.keys) * rows.itemsize + added
  share = sum(1 / r for _, r in rows.branches if r > 1)
  return stream + added + share * selected


def _loss(config, mesh, rows):
  """Returns bytes of a chunk's logits, their exponentials and gradients."""
  chunk = min(config.training.loss_chunk, config.data.window)
  logits = chunk // mesh.shape["seq"] * rows.windows * rows.vocabulary
  features = 3 * rows.count * rows.width * rows.itemsize
  return logits * (2 * WIDE + rows.itemsize) + features
