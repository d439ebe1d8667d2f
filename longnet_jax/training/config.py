"""Typed settings of an experiment, made once from a loose ConfigDict."""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import types
import typing

import ml_collections

from longnet_jax.data import config as data_config
from longnet_jax.models import config as model_config


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning-rate schedule; defaults are the paper's."""

  learning_rate: float = 6e-4  # peak, reached at the end of the warmup
  schedule: str = "polynomial"  # "polynomial", "cosine" or "constant"
  warmup_steps: int = 750  # linear from 0; 0 starts at the peak
  decay_steps: int = 300_000  # step at which the final rate is reached
  decay_power: float = 1.0  # of the polynomial; 1 is linear
  final_learning_rate: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-8
  weight_decay: float = 0.01  # decoupled; not on LayerNorm scales and biases
  clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off

  def __post_init__(self):
    schedules = ("polynomial", "cosine", "constant")
    _require(
      self.schedule in schedules,
      f"schedule is {self.schedule!r}; choose one of {', '.join(schedules)}",
    )
    for name in ("learning_rate", "epsilon", "decay_power"):
      value = getattr(self, name)
      _require(value > 0, f"{name} is {value}; it must be above 0")
    for name in ("final_learning_rate", "weight_decay", "clip_norm"):
      value = getattr(self, name)
      _require(value >= 0, f"{name} is {value}; it must be 0 or more")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"{name} is {value}; it must be in [0, 1)")
    _require(
      0 <= self.warmup_steps,
      f"warmup_steps is {self.warmup_steps}; it must be 0 or more",
    )
    _require(
      self.schedule == "constant" or self.decay_steps > self.warmup_steps,
      f"decay_steps is {self.decay_steps}; it must be above warmup_steps, "
      f"which is {self.warmup_steps}; lower warmup_steps, or raise "
      "training.steps, which decay_steps follows",
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long to train, on how much, and how often to look."""

  steps: int
  batch_size: int  # windows a step, over all devices
  accumulation_steps: int = 1  # parts the batch is computed in, one by one
  loss_chunk: int = 1024  # positions of a window whose logits exist at once
  log_every: int = 10
  eval_every: int = 500
  eval_batches: int = 16  # of the validation split, the same ones each time
  checkpoint_every: int = 500
  max_to_keep: int = 3  # latest checkpoints, beside the best by validation

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      _require(value >= 1, f"{field.name} is {value}; it must be 1 or more")
    _require(
      self.batch_size % self.accumulation_steps == 0,
      f"accumulation_steps is {self.accumulation_steps}; it must divide "
      f"batch_size, which is {self.batch_size}",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; the product is their number."""

  data: int = 1
  seq: int = 1
  model: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      _require(value >= 1, f"{field.name} is {value}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """Everything that defines a run."""

  seed: int
  model: model_config.LongNetConfig
  data: data_config.DataConfig
  optimizer: OptimizerConfig
  training: TrainingConfig
  mesh: MeshConfig = MeshConfig()


def build(settings: Mapping | ml_collections.ConfigDict) -> ExperimentConfig:
  """The experiment that a ConfigDict or a nested dict of settings describes.

  Raises ValueError naming the key: an unknown one with its nearest neighbour,
  a missing one, or a value of the wrong type or out of range.
  """
  if hasattr(settings, "to_dict"):
    settings = settings.to_dict()
  return from_mapping(ExperimentConfig, settings)


def from_mapping(cls, settings: Mapping, prefix: str = ""):
  """An instance of a dataclass from a mapping, checked key by key."""
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in settings:
    if key not in fields:
      raise ValueError(unknown_key(prefix + key, [prefix + k for k in fields]))
  values = {}
  for name, field in fields.items():
    path = prefix + name
    if name in settings:
      values[name] = _convert(hints[name], settings[name], path)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ValueError(f"the config has no {path}, which has no default")
  try:
    return cls(**values)
  except ValueError as error:
    place = prefix.rstrip(".") or "config"
    raise ValueError(f"{place}: {error}") from error


def unknown_key(key: str, known: Iterable[str]) -> str:
  """The message for a dotted key that does not exist, naming the nearest."""
  group, _, name = key.rpartition(".")
  siblings = {
    k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group
  }
  names = siblings or {k: k for k in known}
  near = difflib.get_close_matches(name if siblings else key, names, n=1)
  hint = (
    f"did you mean {names[near[0]]}?"
    if near
    else f"known: {', '.join(sorted(names.values()))}"
  )
  return f"the config has no key {key}; {hint}"


def differences(old: Mapping, new: Mapping) -> dict[str, tuple]:
  """Dotted key -> (old, new) of every setting that differs, in order."""
  flat_old, flat_new = flatten(old), flatten(new)
  missing = "(absent)"
  return {
    key: (flat_old.get(key, missing), flat_new.get(key, missing))
    for key in {**flat_old, **flat_new}
    if flat_old.get(key, missing) != flat_new.get(key, missing)
  }


def flatten(settings: Mapping, prefix: str = "") -> dict:
  """{"a": {"b": 1}} -> {"a.b": 1}; sequences become tuples."""
  flat = {}
  for key, value in settings.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = tuple(value) if isinstance(value, list) else value
  return flat


def _convert(hint, value, path: str):
  """`value` as the type that `hint` names, or ValueError."""
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ValueError(f"{path} is {value!r}; it must be a group of keys")
    return from_mapping(hint, value, f"{path}.")
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in arguments:
      return None
    (hint,) = (a for a in arguments if a is not type(None))
    return _convert(hint, value, path)
  if origin is tuple:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
      raise ValueError(f"{path} is {value!r}; it must be a tuple")
    return tuple(
      _convert(arguments[0], entry, f"{path}[{i}]")
      for i, entry in enumerate(value)
    )
  if origin is typing.Literal:
    hint = type(arguments[0])
  if hint is float and type(value) is int:
    return float(value)
  if hint in (int, float, str, bool) and type(value) is not hint:
    raise ValueError(f"{path} is {value!r}; it must be {_NAMES[hint]}")
  return value


_NAMES = {
  int: "a whole number such as 4",
  float: "a number such as 0.1",
  str: "a string",
  bool: "True or False",
}
