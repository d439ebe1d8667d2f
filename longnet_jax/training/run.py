"""Everything a run is made of before its first step."""

from collections.abc import Callable
import dataclasses
import os
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from longnet_jax import checked, storage
from longnet_jax.analysis import costs
from longnet_jax.analysis import report as analysis_report
from longnet_jax.data import pipeline, tokenizers
from longnet_jax.models import attention, transformer
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding
from longnet_jax.training import config as config_lib
from longnet_jax.training import optimizer as optimizer_lib
from longnet_jax.training import state as state_lib
from longnet_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """Data, mesh and compiled functions; all of it follows from the config."""

  config: config_lib.ExperimentConfig
  tokenizer: tokenizers.Tokenizer
  train_source: pipeline.Source
  validation_source: pipeline.Source
  mesh: jax.sharding.Mesh
  schedule: optax.Schedule
  abstract_state: state_lib.TrainState  # shapes, types and shardings
  init: Callable[[], state_lib.TrainState]
  train_step: Callable  # (state, batch) -> (state, metrics); takes the state
  eval_step: Callable  # (params, batch) -> sums of nats, tokens, bytes
  mixing_step: Callable | None  # (params, batch) -> weight of each branch

  @property
  def fingerprints(self) -> dict[str, str]:
    """What a run needs unchanged, beside its config, to go on exactly."""
    return {
      "tokenizer": self.tokenizer.fingerprint,
      "train": self.train_source.fingerprint,
      "validation": self.validation_source.fingerprint,
    }

  def place(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """A host's rows of a batch as global arrays on the mesh."""
    return sharding.place_batch(
      batch, self.mesh, self.config.training.batch_size
    )

  def describe(self) -> str:
    """One line on what is trained, on what."""
    config = self.config
    count = state_lib.num_parameters(self.abstract_state.params)
    tokens = config.training.batch_size * self.train_source.window
    devices = "device" if self.mesh.size == 1 else "devices"
    hosts = jax.process_count()
    spread = f" of {hosts} processes" if hosts > 1 else ""
    return (
      f"{config.model.attention} model with {count:,} parameters on "
      f"{self.mesh.size} {jax.default_backend()} {devices}{spread}; "
      f"{tokens:,} tokens "
      f"a step in windows of {self.train_source.window}, "
      f"{self.train_source.num_windows:,} windows an epoch{self._idle()}"
    )

  def describe_kernel(self) -> str | None:
    """One line where documents keep a GPU from its fastest kernel."""
    batch = pipeline.abstract_batch(self.config.data, 1)
    sparse = self.config.model.attention == "sparse"
    if kernels.platform() != "gpu" or "segment_ids" not in batch or sparse:
      return None
    return (
      "documents of a window are told apart by segment_ids, which cuDNN cannot "
      "see: the portable kernel attends; data.layout='stream' trains on cuDNN"
    )

  def describe_reach(self) -> str:
    """One line on what of a window reaches a position."""
    return analysis_report.model_reach_line(
      self.config.model, self.train_source.window
    )

  def _idle(self) -> str:
    """What to say of devices that the mesh leaves out."""
    count = jax.device_count()
    if self.mesh.size == count:
      return ""
    return (
      f"; {count - self.mesh.size} of {count} devices are idle: the product of "
      "mesh.data, mesh.seq and mesh.model is what is used"
    )


class Update(NamedTuple):
  """What a run computes, which needs no data to be made.

  model: what is trained, with the core for the mesh.
  abstract_state: shapes, types and shardings.
  init: () -> state.
  train_step: (state, batch) -> (state, metrics).
  """

  model: transformer.LongNetLM
  abstract_state: state_lib.TrainState
  init: Callable
  train_step: Callable


def make_update(
  config: config_lib.ExperimentConfig, mesh, byte_lengths: Array | None = None
) -> Update:
  """Builds the model and its compiled train step for a mesh.

  Its metrics have bytes where `byte_lengths` says what a token stands for.
  """
  training = config.training
  model = transformer.LongNetLM(
    config.model, attention.make_attention_fn(config.model, mesh)
  )
  optimizer = optimizer_lib.make_optimizer(config.optimizer)

  def init():
    return state_lib.init_state(model, optimizer, config.seed)

  abstract = with_shardings(jax.eval_shape(init), mesh)
  train_step = step_lib.make_train_step(
    model,
    optimizer,
    loss_chunk=training.loss_chunk,
    accumulation_steps=training.accumulation_steps,
    may_skip=training.max_skipped > 0,
    byte_lengths=byte_lengths,
  )
  return Update(
    model,
    abstract,
    jax.jit(init, out_shardings=_shardings(abstract)),
    step_lib.jit_train_step(train_step, mesh, abstract),
  )


def make_run(
  config: config_lib.ExperimentConfig,
  tokenizer_path,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> Run:
  """Builds the data, the model and its steps, or raises ValueError.

  A tokenizer already at `tokenizer_path` is used again, so that a run never
  depends on training one twice; where none is, one may be given.
  """
  if tokenizer is None or storage.exists(storage.path(tokenizer_path)):
    tokenizer = make_tokenizer(config, tokenizer_path)
  mesh = mesh_lib.make_mesh(
    config.mesh.data, config.mesh.seq, config.mesh.model
  )
  _check_sizes(config, tokenizer, mesh)
  byte_lengths = jnp.asarray(tokenizer.byte_lengths, jnp.float32)
  model, abstract, init, train_step = make_update(config, mesh, byte_lengths)
  eval_step = step_lib.make_eval_step(
    model, byte_lengths, loss_chunk=config.training.loss_chunk
  )
  mixing_step = None
  if config.model.attention == "dilated":
    mixing_step = step_lib.jit_on_batch(
      step_lib.make_mixing_step(model, mesh.shape["data"]),
      mesh,
      abstract.params,
    )
  return Run(
    config=config,
    tokenizer=tokenizer,
    train_source=_make_source(config, tokenizer, "train"),
    validation_source=_make_source(config, tokenizer, "validation"),
    mesh=mesh,
    schedule=optimizer_lib.make_schedule(config.optimizer),
    abstract_state=abstract,
    init=init,
    train_step=train_step,
    eval_step=step_lib.jit_on_batch(eval_step, mesh, abstract.params),
    mixing_step=mixing_step,
  )


def make_tokenizer(
  config: config_lib.ExperimentConfig, path
) -> tokenizers.Tokenizer:
  """The tokenizer kept at `path`, else the one the data settings ask for."""
  if storage.exists(storage.path(path)):
    return tokenizers.load(path)
  return pipeline.make_tokenizer(config.data)


def flops_per_token(run: Run) -> int:
  """Model FLOPs of one token of a training step, on average."""
  window = run.train_source.window
  return costs.train_flops(run.config.model, window) // window


def _make_source(config, tokenizer, split):
  source = pipeline.make_source(config.data, tokenizer, split)
  if not source.num_windows:
    raise checked.RefusedError(
      f"the {split} split of {config.data.dataset} has no window; choose more "
      f"text or a larger data.{split}_fraction"
    )
  return source


def _check_sizes(config, tokenizer, mesh):
  if config.model.vocab_size < tokenizer.vocab_size:
    raise checked.RefusedError(
      f"model.vocab_size is {config.model.vocab_size} and the "
      f"{config.data.tokenizer} tokenizer has {tokenizer.vocab_size} ids; "
      f"choose {tokenizer.vocab_size} or more"
    )
  if config.data.window > config.model.position_limit:
    raise checked.RefusedError(
      f"data.window is {config.data.window} and position="
      f"{config.model.position!r} numbers {config.model.position_limit} "
      "positions; choose a shorter window or model.position='rope'"
    )
  check_mesh(config, mesh)
  _check_memory(config, mesh)


def _check_memory(config, mesh):
  """Raises where two batches, which are made ahead, exceed this host's memory.

  Allocating them may succeed, and using them end the process without a word.
  """
  training, data = config.training, config.data
  row = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in pipeline.abstract_batch(data, 1).values()
  )
  _, hosts = sharding.host_rows(mesh, training.batch_size)
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  most = hosts * memory // (2 * row)
  if training.batch_size > most:
    raise checked.RefusedError(
      f"training.batch_size is {training.batch_size} windows of {data.window}; "
      f"the memory of this host holds two batches of {most} or less"
    )


def check_mesh(config: config_lib.ExperimentConfig, mesh) -> None:
  """Raises ValueError, with legal choices, where a mesh does not fit a run."""
  training, model = config.training, config.model
  sharding.check_mesh(
    mesh,
    batch_size=training.batch_size // training.accumulation_steps,
    length=config.data.window,
    num_heads=model.num_heads,
    kv_heads=model.kv_heads,
    ffn_dim=model.ffn_dim,
  )


def with_shardings(abstract, mesh):
  """Returns shapes and types, and where they lie on a mesh."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract,
    sharding.shardings_for(abstract, mesh),
  )


def _shardings(abstract) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
