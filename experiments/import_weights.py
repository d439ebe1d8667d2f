"""Imports weights: python -m experiments.import_weights SRC --kind=KIND.

SRC is a torch .pth, .pt or .bin file, a .safetensors file, the .index.json file
of either in shards, or a golden .npz.
Writes WORKDIR/checkpoints, which load_checkpoint reads, and for decoders what
experiments.evaluate and experiments.generate need. --config is the model's
keyword dictionary in torchscale's or upstream's names, as JSON or as the path
of a JSON file. With --check=FILE.npz the outputs are compared with those in the
file, and an error above --tolerance is a failure.
"""

import contextlib
import dataclasses
import json

from absl import flags

from configs import base
from experiments import command
from longnet_jax import checked, interop, storage
from longnet_jax.data import tokenizers
from longnet_jax.interop import golden, keywords
from longnet_jax.models import config as model_config
from longnet_jax.models import longvit
from longnet_jax.training import checkpoint
from longnet_jax.training import config as config_lib
from longnet_jax.training import state as state_lib
from longnet_jax.training import workdir as workdir_lib

_CONVERT = {
  "gigapath": interop.gigapath.convert,
  "longvit": interop.longvit.convert,
  "torchscale": interop.torchscale.convert,
}
_SYNTAX = (
  "give the model's keyword dictionary, such as"
  """ --config='{"decoder_attention_heads": 12, "segment_length": "[2048]"}',"""
  " or --config=FILE.json"
)
_KIND = flags.DEFINE_enum("kind", None, sorted(_CONVERT), "whose weights")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder to write into")
_CONFIG = flags.DEFINE_string("config", None, "JSON or the path of a JSON file")
_KEY = flags.DEFINE_string("key", None, "where a .pth file has the state")
_CHECK = flags.DEFINE_string("check", None, "golden .npz to compare with")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "of --check, relative")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "tokenizer.json of a decoder; bytes if it has 264 ids"
)


def main(arguments) -> None:
  """Converts, checks and writes as the flags say."""
  if len(arguments) != 2:
    raise checked.RefusedError(
      f"give one file of weights, got {arguments[1:] or 'none'}: python -m"
      " experiments.import_weights SRC --kind=gigapath --workdir=DIR"
    )
  for flag in (_KIND, _WORKDIR):
    if not flag.value:
      raise checked.RefusedError(f"--{flag.name} is missing")
  workdir = storage.path(_WORKDIR.value)
  if _is_held(workdir):
    raise checked.RefusedError(
      f"{workdir} holds a run already; choose another --workdir"
    )
  state, keyword_config = _read(storage.path(arguments[1]))
  config, params = _convert(state, keyword_config)
  count = state_lib.num_parameters(params)
  print(f"{_KIND.value}: {len(state)} tensors, {count:,} parameters")
  length = None
  if isinstance(config, longvit.LongViTConfig):
    length = config.num_patches
  if note := interop.torchscale.misplaced(config, length):
    print(f"note: {note}")
  if _CHECK.value:
    _check(config, params)
  is_decoder = _KIND.value == "torchscale" and keywords.is_decoder(
    keyword_config
  )
  checkpoint.check_space(workdir, params)
  try:
    records = _records(config, workdir) if is_decoder else _model_record(config)
    with checkpoint.Checkpoints(workdir) as checkpoints:
      checkpoints.save_params(params, records)
  except BaseException:
    _remove(workdir)
    raise
  print(f"wrote {workdir}")


def _is_held(workdir: storage.Path) -> bool:
  """Whether there is more than an import leaves that was killed."""
  folder = checkpoint.folder(workdir)
  if storage.exists(workdir_lib.config_path(workdir)):
    return True
  return storage.is_dir(folder) and not all(
    path.name.endswith(".orbax-checkpoint-tmp") for path in folder.iterdir()
  )


def _remove(workdir: storage.Path) -> None:
  """Removes what an import has begun, or the next would find a run here."""
  for path in (workdir_lib.config_path(workdir), checkpoint.folder(workdir)):
    with contextlib.suppress(OSError, storage.StorageError):
      storage.remove(path)


def _read(source: storage.Path):
  """Returns the state and the keyword dictionary, or None."""
  config = _parse_config(_CONFIG.value)
  if source.name.endswith(".index.json"):
    return interop.read_sharded(source, key=_KEY.value), config
  with storage.on_this_machine(source) as file:
    if file.suffix == ".npz":
      state, stored, _ = golden.read(file)
      return state, config or stored
    if file.suffix == ".safetensors":
      return interop.read_safetensors(file), config
    return interop.read_pth(file, key=_KEY.value), config


def _parse_config(text: str | None):
  if text is None:
    return None
  try:
    if not text.lstrip().startswith("{"):
      config = storage.read_json(storage.path(text))
    else:
      config = storage.parse_json(text)
  except checked.RefusedError:
    raise
  except FileNotFoundError as error:
    raise checked.RefusedError(
      f"--config names no file, {checked.shown(text)}; {_SYNTAX}"
    ) from error
  except ValueError as error:
    raise checked.RefusedError(
      f"--config is no JSON: {error}; {_SYNTAX}"
    ) from error
  if not isinstance(config, dict):
    raise checked.RefusedError(
      f"--config must be a dictionary, got {checked.shown(config)}; {_SYNTAX}"
    )
  return config


def _convert(state, config):
  if _KIND.value == "torchscale" and config is None:
    raise checked.RefusedError(
      "--config is missing: tensors of torchscale do not tell the number of"
      f" heads nor the branches; {_SYNTAX}"
    )
  return _CONVERT[_KIND.value](state, config)


def _check(config, params):
  """Prints the error of each output; ValueError if one is too large."""
  with storage.on_this_machine(storage.path(_CHECK.value)) as source:
    _, _, arrays = golden.read(source)
  errors = golden.compare(config, params, arrays)
  for name, error in errors.items():
    print(f"{name}: largest error {error:.2e} relative to the largest entry")
  worst = max(errors, key=errors.get)
  if not errors[worst] <= _TOLERANCE.value:
    raise checked.RefusedError(
      f"{worst} is off by {errors[worst]:.2e}, more than --tolerance="
      f"{_TOLERANCE.value:g}; nothing was written"
    )


def _model_record(config):
  """The JSON item of an encoder, under the key of its class."""
  keys = {cls: key for key, cls in checkpoint.MODEL_KEYS.items()}
  return {"config": {keys[type(config)]: dataclasses.asdict(config)}}


def _records(config: model_config.LongNetConfig, workdir: storage.Path):
  """Writes and returns what makes the workdir look like that of a run."""
  settings = base.get_config()
  settings.model = dataclasses.asdict(config)
  window = min(config.max_positions, config.position_limit)
  settings.data.window = window
  settings = settings.to_dict()
  config_lib.build(settings)
  storage.make_dir(workdir)
  text = json.dumps(settings, indent=2) + "\n"
  storage.write_whole(workdir_lib.config_path(workdir), text)
  records = {"config": settings}
  tokenizer = _tokenizer(config.vocab_size)
  if tokenizer is None:
    print(
      f"no --tokenizer with up to {config.vocab_size} ids: evaluate and"
      " generate will ask for tokenizer.json"
    )
    return records
  path = workdir_lib.tokenizer_path(workdir)
  tokenizer.save(path)
  return records | {"tokenizer": storage.read_json(path)}


def _tokenizer(vocab_size: int):
  if _TOKENIZER.value is None:
    tokenizer = tokenizers.ByteTokenizer()
    return tokenizer if tokenizer.vocab_size == vocab_size else None
  tokenizer = tokenizers.load(_TOKENIZER.value)
  if tokenizer.vocab_size > vocab_size:
    raise checked.RefusedError(
      f"the tokenizer has {tokenizer.vocab_size} ids, the model"
      f" {vocab_size}; choose the one it was trained with"
    )
  return tokenizer


if __name__ == "__main__":
  command.run(main)
