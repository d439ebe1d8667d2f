"""The folder of a run: the config it belongs to, and what may change in it.

config.json     every setting of the run
tokenizer.json  what maps text to tokens
metrics.jsonl   one record a line
attempts.json   when it was started and what that changed, see attempts.py
owner.json      which process trains in it, see lease.py
loss.png        its curves
profile/        traces of steps, see profile.py
checkpoints/    see checkpoint.py
"""

from collections.abc import Sequence
import fnmatch
import json
import secrets

import numpy as np

from longnet_jax import checked, storage
from longnet_jax.data import tokenizers
from longnet_jax.parallel import hosts
from longnet_jax.training import checkpoint
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib

# Settings whose values may differ between hosts, too: where the text, which has
# a fingerprint, and its copies lie.
PLACES = ("data.folder", "data.data_dir", "data.cache_dir")
# The learning rate from here on.
SCHEDULE = (
  "optimizer.learning_rate",
  "optimizer.schedule",
  "optimizer.warmup_steps",
  "optimizer.decay_*",
  "optimizer.final_learning_rate",
)
# Settings that a later start may change, as they do not shape steps that are
# done: also how far to go, on which devices, how often to look, what is kept
# and when to worry.
_FREE = (
  "training.steps",
  "training.log_every",
  "training.eval_*",
  "training.checkpoint_*",
  "training.max_to_keep",
  "training.keep_every",
  "training.max_skipped",
  "training.watchdog_*",
  "mesh.*",
  *PLACES,
  *SCHEDULE,
)


def config_path(workdir) -> storage.Path:
  """The JSON file of a run's settings."""
  return storage.path(workdir) / "config.json"


def tokenizer_path(workdir) -> storage.Path:
  """The file of a run's tokenizer."""
  return storage.path(workdir) / "tokenizer.json"


def loss_picture_path(workdir) -> storage.Path:
  """The picture of a run's losses."""
  return storage.path(workdir) / "loss.png"


def read_config(
  workdir, *, step: int | str = "latest"
) -> config_lib.ExperimentConfig:
  """The settings that a workdir was trained with.

  They are those in its checkpoint of `step` where it has no config.json.
  """
  path = config_path(workdir)
  if storage.exists(path):
    return config_lib.build(_load(path))
  if not storage.is_dir(path.parent / "checkpoints"):
    raise checked.RefusedError(
      f"{workdir} holds no config.json; give the --workdir of a training run"
    )
  checkpoints = checkpoint.open_to_read(workdir)
  settings = checkpoints.restore_json(checkpoints.find(step), "config")
  if "data" not in settings:
    raise checked.RefusedError(
      f"{workdir} holds no language model; read an imported encoder with "
      "longnet_jax.load_checkpoint, one of slides with "
      "experiments.encode_slide"
    )
  return config_lib.build(settings)


def load_tokenizer(path, *, step: int | str = "latest") -> tokenizers.Tokenizer:
  """What maps text to tokens and back, from a workdir.

  That is its tokenizer.json, else the one in its checkpoint of `step`, as in
  `load_checkpoint`. Raises ValueError where it has neither.
  """
  file = tokenizer_path(path)
  folder = checkpoint.folder(path)
  if not storage.exists(file) and storage.is_dir(folder):
    checkpoints = checkpoint.open_to_read(path)
    step = checkpoints.find(step)
    if "tokenizer" in checkpoints.items(step):
      return tokenizers.from_record(checkpoints.restore_json(step, "tokenizer"))
  return tokenizers.load(file)


def check(workdir, settings: dict) -> None:
  """Raises unless a run with these settings may start or go on in `workdir`.

  ValueError names each key that differs with both values; OSError says why
  the folder cannot be written. Nothing is created.
  """
  _check_writable(storage.path(workdir))
  path = config_path(workdir)
  if not storage.exists(path):
    return
  changed = {
    key: values
    for key, values in config_lib.changes(_load(path), settings).items()
    if not is_among(key, _FREE)
  }
  if changed:
    listed = ", ".join(
      f"{key} was {checked.shown(old)} and is now {checked.shown(new)}"
      for key, (old, new) in changed.items()
    )
    raise checked.RefusedError(
      f"{workdir} belongs to a run with another config: {listed}; choose "
      "another --workdir or the old values, or start a new run from its "
      f"parameters with --config.training.init_from={workdir}"
    )


def is_among(key: str, patterns: Sequence[str]) -> bool:
  """Whether one of the patterns matches a dotted key."""
  return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)


def write_records(workdir, settings: dict, run: run_lib.Run) -> dict:
  """Records settings and tokenizer; returns a checkpoint's JSON items.

  The first process writes. Raises ValueError where another one has a folder
  of its own by that name.
  """
  path = tokenizer_path(workdir)
  if hosts.is_first():
    storage.make_dir(path.parent)
  _check_shared(path.parent)
  if hosts.is_first():
    text = json.dumps(settings, indent=2) + "\n"
    storage.write_whole(config_path(workdir), text)
    run.tokenizer.save(path)
  hosts.wait_for_all("records are written")
  tokenizer = storage.read_json(path)
  return {"config": settings, "tokenizer": tokenizer, "data": run.fingerprints}


def comparable(settings: dict) -> str:
  """A text that is the same on all hosts of a run."""
  flat = config_lib.flatten(settings)
  return json.dumps({k: v for k, v in flat.items() if k not in PLACES})


def _load(path) -> dict:
  advice = "restore it or choose another --workdir"
  try:
    settings = storage.read_json(path)
  except ValueError as error:
    raise checked.RefusedError(
      f"{path} is not JSON ({error}); {advice}"
    ) from error
  if not isinstance(settings, dict):
    raise checked.RefusedError(
      f"{path} does not hold settings by name; {advice}"
    )
  return settings


def _check_shared(folder):
  """Raises unless every process sees what the first one puts in the folder."""
  number = int(hosts.gather(np.int32(secrets.randbelow(2**31)))[0])
  probe = folder / f"probe-{number}"
  if hosts.is_first():
    storage.write_whole(probe, "")
  hosts.wait_for_all("a probe lies in the workdir")
  blind = np.flatnonzero(hosts.gather(np.int32(not storage.exists(probe))))
  if hosts.is_first():
    storage.remove(probe)
  if len(blind):
    raise checked.RefusedError(
      f"workdir {folder} is another folder on process {blind[0]} than on "
      "process 0; choose one that all hosts share, such as a network disk"
    )


def _check_writable(folder):
  try:
    storage.check_writable(folder)
  except (NotADirectoryError, FileExistsError) as error:
    where = error.filename or folder
    raise checked.RefusedError(
      f"workdir {where} is a file; choose a folder"
    ) from error
  except storage.StorageError:
    raise
  except OSError as error:
    failed = storage.failed(error)
    kind = storage.NoRoomError if failed else checked.RefusedError
    raise kind(
      f"cannot write into {folder} ({error.strerror}); choose a --workdir "
      "that can be written and has space"
    ) from error
