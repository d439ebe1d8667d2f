"""Runs of a study: named by their settings, trained and scored once."""

from collections.abc import Callable, Sequence
import dataclasses
import json
from typing import NamedTuple

from experiments import baselines
from longnet_jax import checked, storage
from longnet_jax.analysis import costs
from longnet_jax.models import sizes
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop


class Study(NamedTuple):
  """What a study does.

  plan: (config, seeds) -> what to measure, the most telling first; each has a
    `name`, of its folder.
  measure: (config, one of these, its folder) -> what is found, JSON-ready.
  table: record -> [(head, rows)], cells text.
  draw: (record, path) writes the picture.
  """

  plan: Callable[[config_lib.ExperimentConfig, int], Sequence]
  measure: Callable[
    [config_lib.ExperimentConfig, NamedTuple, storage.Path], dict
  ]
  table: Callable[[dict], list[tuple]]
  draw: Callable[[dict, storage.Path], None]


class Run(NamedTuple):
  """A model to train.

  core: its attention.
  context: positions of the windows it is trained on.
  variant: what else sets it apart, "" for nothing.
  seed: which of several that differ in nothing else.
  config: all its settings.
  """

  core: str
  context: int
  variant: str
  seed: int
  config: config_lib.ExperimentConfig

  @property
  def name(self) -> str:
    """Of its folder: studies that ask for the same run share it."""
    parts = (self.core, self.context, self.variant, f"seed{self.seed}")
    return "_".join(str(part) for part in parts if part)


class Stopped(Exception):
  """A signal asked a run to stop; it has saved. The argument is its number."""


def contexts(config: config_lib.ExperimentConfig) -> list[int]:
  """The paper's 2K, 8K, 16K and 32K as parts of the window."""
  window = config.data.window
  if window % 64:
    checked.refuse(
      "data.window",
      window,
      "a multiple of 64, of which a study reads 1/16, 1/4, 1/2 and all",
    )
  return [window // 16, window // 4, window // 2, window]


def make_run(
  config: config_lib.ExperimentConfig,
  core: str,
  context: int,
  seed: int,
  variant: str = "",
  **model,
) -> Run:
  """A run of `config` with another core, context, seed and model settings.

  Batches hold as many tokens at each context. The seed is that of the initial
  parameters and of the order of windows, and stands for "{seed}" in
  training.init_from. A sparse model has the FLOPs of LongNet at its context.
  """
  tokens = config.training.batch_size * config.data.window
  settings = dataclasses.replace(config.model, attention=core, **model)
  if core == "sparse":
    settings = sizes.sparse_twin(settings, context)
  data = dataclasses.replace(
    config.data, window=context, seed=config.data.seed + seed
  )
  training = dataclasses.replace(
    config.training,
    batch_size=tokens // context,
    init_from=config.training.init_from.replace("{seed}", str(seed)),
  )
  changed = dataclasses.replace(
    config,
    seed=config.seed + seed,
    model=settings,
    data=data,
    training=training,
  )
  return Run(core, context, variant, seed, changed)


def train(run: Run, workdir: storage.Path) -> None:
  """Trains a run to its end, from where it was; Stopped by a signal."""
  result = loop.train(run.config, workdir)
  if result.signal:
    raise Stopped(int(result.signal))


def describe(run: Run) -> dict:
  """What a run is and costs, JSON-ready."""
  model, training = run.config.model, run.config.training
  windows = training.steps * training.batch_size
  pairs = costs.attention_pairs(model, run.context)
  return {
    "core": run.core,
    "context": run.context,
    "variant": run.variant,
    "seed": run.seed,
    "layers": model.num_layers,
    "width": model.model_dim,
    "parameters": baselines.num_parameters(run.config),
    "tokens": windows * run.context,
    "train_flops": windows * costs.train_flops(model, run.context),
    "attention_flops": windows * 12 * model.head_dim * model.num_layers * pairs,
    "attention_pairs": pairs,
  }


def known(
  config: config_lib.ExperimentConfig, name: str, folder: storage.Path
) -> dict | None:
  """What was measured with these settings, or None."""
  path = _path(folder, name)
  if not storage.exists(path):
    return None
  made = storage.read_json(path)
  stored, settings = made.pop("settings"), dataclasses.asdict(config)
  return None if config_lib.changes(stored, settings) else made


def keep(
  config: config_lib.ExperimentConfig,
  name: str,
  folder: storage.Path,
  made: dict,
) -> None:
  """Writes what was measured, for `known`."""
  settings = dataclasses.asdict(config)
  text = json.dumps({**made, "name": name, "settings": settings})
  storage.make_dir(folder / name)
  storage.write_whole(_path(folder, name), text + "\n")


def _path(folder, name):
  return folder / name / "measured.json"
