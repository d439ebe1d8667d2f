"""Exports weights: python -m experiments.export_weights --workdir=DIR.

Writes a folder that other tools read, by default WORKDIR/FORMAT:

  model.safetensors  the parameters
  config.json        the model's settings
  tokenizer.json     of a language model, as import_weights --tokenizer reads it

--format=safetensors has the names, axes and settings of this package, with "/"
between names, and takes any model. --format=torchscale has torchscale's, with
its keyword dictionary as the settings: what experiments.import_weights reads as
FOLDER/model.safetensors --kind=torchscale --config=FOLDER/config.json.
"""

import json

from absl import flags
from flax import traverse_util
import numpy as np
from safetensors import numpy as safetensors_numpy

from experiments import command
from longnet_jax import checked, interop, storage
from longnet_jax.interop import keywords
from longnet_jax.models import config as model_config
from longnet_jax.training import checkpoint
from longnet_jax.training import state as state_lib
from longnet_jax.training import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run or an import")
_FORMAT = flags.DEFINE_enum(
  "format", "safetensors", ["safetensors", "torchscale"], "whose names"
)
_OUT = flags.DEFINE_string(
  "out", None, "folder to write; WORKDIR/FORMAT if not"
)
_WHICH = command.define_checkpoint()


def main(_) -> None:
  """Reads a checkpoint and writes it as the flags say."""
  workdir = command.trained(_WORKDIR)
  out = workdir / _FORMAT.value
  if _OUT.value is not None:
    out = storage.path(_OUT.value)
  if storage.exists(out / "model.safetensors"):
    raise checked.RefusedError(
      f"{out} holds a model.safetensors already; choose another --out"
    )
  checkpoints = checkpoint.open_to_read(workdir)
  step = checkpoints.find(_WHICH())
  settings = checkpoints.restore_json(step, "config")
  config, params = checkpoint.load_checkpoint(workdir, step=step)
  (kind,) = checkpoint.MODEL_KEYS.keys() & settings.keys()
  if _FORMAT.value == "torchscale":
    # Of an imported encoder a checkpoint holds nothing but the model.
    state, written = _torchscale(config, params, decoder="data" in settings)
  else:
    flat = traverse_util.flatten_dict(params, sep="/")
    state = {name: np.asarray(array, order="C") for name, array in flat.items()}
    written = {kind: settings[kind]}
  files = {
    "config.json": json.dumps(written, indent=2) + "\n",
    # Other tools ask whose axes these are.
    "model.safetensors": safetensors_numpy.save(state, {"format": "pt"}),
  }
  tokenizer = workdir_lib.tokenizer_path(workdir)
  if storage.exists(tokenizer):
    files["tokenizer.json"] = storage.read(tokenizer)
  storage.make_dir(out)
  for name, content in files.items():
    storage.write_whole(out / name, content)
  count = state_lib.num_parameters(params)
  print(f"step {step}: {len(state)} tensors, {count:,} parameters in {out}")


def _torchscale(config, params, *, decoder: bool):
  """The state and the keyword dictionary; refuses what torchscale has not."""
  if type(config) is not model_config.LongNetConfig:
    raise checked.RefusedError(
      f"{_WORKDIR.value} holds a {type(config).__name__}, which torchscale has"
      " not; use --format=safetensors"
    )
  written = keywords.export(config, decoder=decoder, output="output" in params)
  state = interop.torchscale.export(config, params)
  if note := interop.torchscale.misplaced(config):
    print(f"note: {note}")
  return state, written


if __name__ == "__main__":
  command.run(main)
