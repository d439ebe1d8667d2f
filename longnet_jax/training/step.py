"""The train and evaluation steps: pure functions, jitted once for a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from longnet_jax.models import transformer
from longnet_jax.ops import kernels
from longnet_jax.parallel import sharding
from longnet_jax.training import loss as loss_lib
from longnet_jax.training import state as state_lib

# A layer's matrices are small beside its activations: gather them whole, and do
# not multiply share by share, which reads and writes all rows for each. Nor
# gather while the product before runs: the matrix would then lie in HBM, and
# its own product would take longer by more than the gathering does.
_TPU_OPTIONS = {
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_train_step(
  model: transformer.LongNetLM,
  optimizer: optax.GradientTransformation,
  *,
  loss_chunk: int,
  accumulation_steps: int = 1,
  may_skip: bool = False,
  byte_lengths: Array | None = None,
) -> Callable[
  [state_lib.TrainState, Batch], tuple[state_lib.TrainState, Metrics]
]:
  """(state, batch) -> (state, metrics), one update of all parameters.

  The loss is the mean over every counted token of the batch. In parts, sums of
  losses, weights and gradients are added and divided once at the end, so the
  update does not depend on how the batch was cut. With `may_skip` an update
  that is not finite is left out, and the metric "skipped" is 1. With
  `byte_lengths` (V,), the text each token stands for, "bytes" are counted.
  """

  def loss_sum(params, batch, key):
    features = model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch.get("segment_ids"),
      deterministic=False,
      rngs={"dropout": key},
      method="hidden",
    )
    matrix = transformer.output_matrix(params)
    return loss_lib.cross_entropy(
      features, matrix, batch["targets"], batch["weights"], chunk=loss_chunk
    )

  gradient = jax.value_and_grad(loss_sum, has_aux=True)

  def add_part(params, key, total, numbered):
    index, part = numbered
    sums = gradient(params, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, sums), None

  def train_step(state, batch):
    key = state_lib.dropout_key(state)
    if accumulation_steps == 1:
      sums = gradient(state.params, batch, key)
    else:
      zero = jnp.zeros((), jnp.float32)
      total = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
      parts = jax.tree.map(lambda x: _parts(x, accumulation_steps), batch)
      sums, _ = jax.lax.scan(
        lambda total, part: add_part(state.params, key, total, part),
        total,
        (jnp.arange(accumulation_steps), parts),
      )
    (loss, weight), gradients = sums
    scale = 1 / jnp.maximum(weight, 1)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    metrics = {
      "loss": loss * scale,
      "tokens": weight,
      "gradient_norm": optax.tree.norm(gradients),
    }
    if byte_lengths is not None:
      metrics["bytes"] = _count_bytes(byte_lengths, batch)
    params = optax.apply_updates(state.params, updates)
    if may_skip:
      total = metrics["loss"] + metrics["gradient_norm"]
      finite = jnp.isfinite(total)
      metrics["skipped"] = 1 - finite.astype(jnp.float32)
      params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
      )
    return state._replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), metrics

  return train_step


def make_score(
  model: transformer.LongNetLM, *, loss_chunk: int
) -> Callable[[Any, Batch], Array]:
  """(params, batch) -> loss of each token in nats (B, T), without dropout."""

  def score(params, batch):
    features = model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch.get("segment_ids"),
      method="hidden",
    )
    matrix = transformer.output_matrix(params)
    return loss_lib.token_losses(
      features, matrix, batch["targets"], chunk=loss_chunk
    )

  return score


def make_eval_step(
  model: transformer.LongNetLM, byte_lengths: Array, *, loss_chunk: int
) -> Callable[[Any, Batch], Metrics]:
  """(params, batch) -> sums of nats, tokens and bytes over the batch.

  `byte_lengths` (V,) is the text each token stands for, in bytes.
  """
  score = make_score(model, loss_chunk=loss_chunk)

  def eval_step(params, batch):
    weights = batch["weights"]
    return {
      "nats": jnp.sum(score(params, batch) * weights),
      "tokens": jnp.sum(weights),
      "bytes": _count_bytes(byte_lengths, batch),
    }

  return eval_step


def make_mixing_step(
  model: transformer.LongNetLM, rows: int
) -> Callable[[Any, Batch], Array]:
  """(params, batch) -> mean mixing weight of each branch, (branches,).

  Averaged over layers, heads and the positions of the first `rows` windows.
  """

  def mixing_step(params, batch):
    batch = jax.tree.map(lambda x: x[:rows], batch)
    _, variables = model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch.get("segment_ids"),
      method="hidden",
      mutable=["intermediates"],
    )
    (weights,) = jax.tree.leaves(variables["intermediates"])
    return weights.reshape(-1, weights.shape[-1]).mean(axis=0)

  return mixing_step


def jit_train_step(train_step, mesh, abstract_state: state_lib.TrainState):
  """The step with explicit shardings; the state's buffers are reused."""
  states = sharding.shardings_for(abstract_state, mesh)
  options = _TPU_OPTIONS if kernels.platform() == "tpu" else None
  return jax.jit(
    train_step,
    in_shardings=(states, sharding.batch_sharding(mesh)),
    out_shardings=(states, NamedSharding(mesh, P())),
    donate_argnames=("state",),
    compiler_options=options,
  )


def jit_on_batch(function, mesh, abstract_params):
  """A function of (params, batch) whose small result is on every device."""
  return jax.jit(
    function,
    in_shardings=(
      sharding.shardings_for(abstract_params, mesh),
      sharding.batch_sharding(mesh),
    ),
    out_shardings=NamedSharding(mesh, P()),
  )


def _count_bytes(byte_lengths: Array, batch: Batch) -> Array:
  """Bytes of the text that the counted targets stand for."""
  return jnp.sum(byte_lengths[batch["targets"]] * batch["weights"])


def _parts(array: Array, count: int) -> Array:
  """(B, T) -> (count, B / count, T), part i being rows i, i + count, ...

  Interleaved, so that each device of a data axis has its share of every part.
  """
  rows, length = array.shape
  return jnp.moveaxis(array.reshape(rows // count, count, length), 1, 0)
