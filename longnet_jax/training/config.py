"""Typed settings of an experiment, made once from a loose ConfigDict."""

from collections.abc import Mapping
import dataclasses
from typing import Annotated, Any, Literal

import ml_collections

from longnet_jax import checked
from longnet_jax.data import config as data_config
from longnet_jax.models import config as model_config

# What float32 holds; a larger rate diverges before it overflows.
_Rate = Annotated[float, checked.Range(above=0, at_most=1e38)]
_RateOrZero = Annotated[float, checked.Range(at_least=0, at_most=1e38)]
_Minutes = Annotated[float, checked.Range(at_least=0, at_most=1e6)]
_Power = Annotated[float, checked.Range(above=0, at_most=100)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """How long to train, on how much, and how often to look.

  Attributes:
    init_from: workdir, or WORKDIR/checkpoints/STEP, whose parameters a new run
      starts from; "" draws them.
    steps: updates of the parameters.
    batch_size: windows a step, over all devices; 16 of 32,768 tokens are the
      paper's 0.5M.
    accumulation_steps: parts a batch is computed in, one by one.
    loss_chunk: positions of a window whose logits exist at once.
    log_every: steps from one record to the next.
    eval_every: steps from one validation to the next.
    eval_batches: batches of the validation split, the same ones each time.
    checkpoint_every: steps from one checkpoint to the next.
    checkpoint_minutes: minutes after which there is a checkpoint, too; 0 is
      never.
    max_to_keep: latest checkpoints, beside the best by validation.
    keep_every: steps whose multiples are kept for ever; 0 keeps none.
    max_skipped: updates in a row that may be left out because the loss or the
      gradient is not finite. The schedule does not count them.
    watchdog_minutes: minutes without an end of anything after which the stacks
      of all threads are shown; 0 is never.
    watchdog_ends: whether the process ends then.
  """

  init_from: str = ""
  steps: checked.Count = 300_000
  batch_size: checked.Count = 16
  accumulation_steps: checked.Count = 1
  loss_chunk: checked.Count = 2048
  log_every: checked.Count = 50
  eval_every: checked.Count = 1000
  eval_batches: checked.Count = 16
  checkpoint_every: checked.Count = 1000
  checkpoint_minutes: _Minutes = 0.0
  max_to_keep: checked.Count = 3
  keep_every: checked.CountOrZero = 0
  max_skipped: checked.CountOrZero = 0
  watchdog_minutes: _Minutes = 30.0
  watchdog_ends: bool = False

  def __post_init__(self):
    checked.check_fields(self)
    if self.batch_size % self.accumulation_steps:
      checked.refuse(
        "accumulation_steps",
        self.accumulation_steps,
        f"a divisor of batch_size={self.batch_size}",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its learning-rate schedule; defaults are the paper's.

  Attributes:
    learning_rate: peak, reached at the end of the warmup.
    schedule: "polynomial", "cosine" or "constant".
    warmup_steps: steps of linear growth from 0; 0 starts at the peak.
    decay_steps: step at which the final rate is reached; in configs/ it follows
      training.steps unless set.
    decay_power: of the polynomial; 1 is linear.
    final_learning_rate: what the rate decays to.
    beta1: decay of the mean of gradients.
    beta2: decay of the mean of their squares.
    epsilon: added to the root of the latter.
    weight_decay: decoupled; not on LayerNorm scales and biases.
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
  """

  learning_rate: _Rate = 6e-4
  schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
  warmup_steps: checked.CountOrZero = 750
  decay_steps: checked.Count = TrainingConfig.steps
  decay_power: _Power = 1.0
  final_learning_rate: _RateOrZero = 0.0
  beta1: checked.Share = 0.9
  beta2: checked.Share = 0.98
  epsilon: checked.Epsilon = 1e-8
  weight_decay: _RateOrZero = 0.01
  clip_norm: _RateOrZero = 1.0

  def __post_init__(self):
    checked.check_fields(self)
    if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
      checked.refuse(
        "decay_steps",
        self.decay_steps,
        f"above warmup_steps, which is {self.warmup_steps}; lower "
        "warmup_steps, or raise training.steps, which decay_steps follows",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; the product is their number.

  Attributes:
    data: devices that share the batch.
    seq: devices that share each sequence.
    model: devices that share heads and feed-forward width.
  """

  data: checked.Count = 1
  seq: checked.Count = 1
  model: checked.Count = 1

  def __post_init__(self):
    checked.check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  """Everything that defines a run.

  Attributes:
    seed: of initial parameters and dropout; data has its own.
    model: what is trained.
    data: on what.
    training: for how long.
    optimizer: by which rule.
    mesh: on which devices.
  """

  seed: checked.Seed = 0
  model: model_config.LongNetConfig
  data: data_config.DataConfig
  # Before the optimizer, whose decay_steps follow its steps: it is the one to
  # name where these are illegal.
  training: TrainingConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    checked.check_fields(self)


def build(
  settings: Mapping[str, Any] | ml_collections.ConfigDict,
) -> ExperimentConfig:
  """The experiment that a ConfigDict or a nested dict of settings describes.

  Raises RefusedError naming the key: an unknown one with its nearest neighbour,
  a missing one, or a value of the wrong type or out of range.
  """
  if hasattr(settings, "to_dict"):
    settings = settings.to_dict()
  return checked.from_mapping(ExperimentConfig, settings)


def differences(old: Mapping, new: Mapping) -> dict[str, tuple]:
  """Dotted key -> (old, new) of every setting that differs, in order."""
  flat_old, flat_new = flatten(old), flatten(new)
  missing = "(absent)"
  return {
    key: (flat_old.get(key, missing), flat_new.get(key, missing))
    for key in {**flat_old, **flat_new}
    if flat_old.get(key, missing) != flat_new.get(key, missing)
  }


def changes(stored: Mapping, settings: Mapping) -> dict[str, tuple]:
  """The differences of settings from those that a run has stored.

  A key that is younger than the run had its default then.
  """
  return differences(dataclasses.asdict(build(stored)), settings)


def flatten(settings: Mapping, prefix: str = "") -> dict:
  """{"a": {"b": 1}} -> {"a.b": 1}; sequences become tuples."""
  flat = {}
  for key, value in settings.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = tuple(value) if isinstance(value, list) else value
  return flat
