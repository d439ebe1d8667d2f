"""LongNet, dense and sparse Transformers trained alike, side by side."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from longnet_jax import checked, storage
from longnet_jax.models import sizes, transformer
from longnet_jax.training import checkpoint, curves, loop, metrics
from longnet_jax.training import config as config_lib
from longnet_jax.training import state as state_lib

LABELS = {"dilated": "LongNet", "dense": "dense", "sparse": "sparse"}
_CURVES = ("step", "bits_per_byte", "validation_bits_per_byte")


def variants(
  config: config_lib.ExperimentConfig,
) -> dict[str, config_lib.ExperimentConfig]:
  """The same experiment with each attention core, and nothing else changed.

  The sparse model's summary columns are those that give it the FLOPs of
  LongNet, see `sizes.sparse_twin`. Raises ValueError where none do, or where
  the models differ in their number of parameters.
  """
  models = {
    "dilated": dataclasses.replace(config.model, attention="dilated"),
    "dense": dataclasses.replace(config.model, attention="dense"),
    "sparse": sizes.sparse_twin(config.model, config.data.window),
  }
  configs = {
    core: dataclasses.replace(config, model=model)
    for core, model in models.items()
  }
  counts = {core: num_parameters(each) for core, each in configs.items()}
  if len(set(counts.values())) != 1:
    raise checked.RefusedError(
      f"the models differ in their parameters: {counts}"
    )
  return configs


def num_parameters(config: config_lib.ExperimentConfig) -> int:
  """Parameters of an experiment's model; nothing is computed."""
  model = transformer.LongNetLM(config.model)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return state_lib.num_parameters(shapes)


def record(workdir, result: loop.Result) -> dict:
  """What a finished run adds to the comparison, JSON-ready.

  `data` holds the fingerprints of the windows it read, in their order.
  """
  with checkpoint.open_to_read(workdir) as checkpoints:
    params = checkpoints.restore_params(result.step)
    data = checkpoints.restore_json(result.step, "data")
  return {
    "parameters": state_lib.num_parameters(params),
    "validation_bits_per_byte": result.validation["bits_per_byte"],
    "data": data,
    "curves": [
      {name: r[name] for name in _CURVES if name in r}
      for r in metrics.read_metrics(workdir)
    ],
  }


def write(folder: storage.Path, models: dict[str, dict], **more) -> dict:
  """Writes comparison.json, with `more` entries, and its picture.

  Raises ValueError where the runs have not read the same windows.
  """
  data = {core: model["data"] for core, model in models.items()}
  if any(each != data["dilated"] for each in data.values()):
    raise checked.RefusedError(f"the runs have read different data: {data}")
  comparison = {**more, "models": models}
  text = json.dumps(comparison) + "\n"
  storage.write_whole(folder / "comparison.json", text)
  draw(comparison, folder / "comparison.png")
  return comparison


def draw(comparison: dict, path) -> None:
  """The loss curves of a comparison, side by side."""
  models = comparison["models"]
  curves.draw_losses(
    {LABELS[core]: model["curves"] for core, model in models.items()}, path
  )


def table(comparison: dict) -> str:
  """The result of each model as text, a line each."""
  lines = ["     model   parameters   validation bits/byte"]
  for core, model in comparison["models"].items():
    bits = model["validation_bits_per_byte"]
    lines.append(f"{LABELS[core]:>10}   {model['parameters']:10,}   {bits:.4f}")
  return "\n".join(lines)
