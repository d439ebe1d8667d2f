"""The folder of a run: the config it belongs to, and what may change in it.

config.json     every setting of the run
tokenizer.json  what maps text to tokens
metrics.jsonl   one record a line
attempts.json   when it was started, see attempts.py
owner.json      which process trains in it, see lease.py
loss.png        its curves
profile/        traces of steps, see profile.py
checkpoints/    see checkpoint.py
"""

import fnmatch
import json
import secrets

import numpy as np

from longnet_jax import checked, storage
from longnet_jax.parallel import hosts
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib

# Settings whose values may differ between hosts, too: where their copies lie.
_PLACES = ("data.data_dir", "data.cache_dir")
# Settings that a later start may change: how far to go, on which devices, where
# copies of the data lie, what is kept and when to worry. All others shape the
# parameters or their record.
_FREE = (
  "training.steps",
  "training.checkpoint_minutes",
  "training.max_to_keep",
  "training.keep_every",
  "training.max_skipped",
  "training.watchdog_*",
  "mesh.*",
  *_PLACES,
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


def read_config(workdir) -> config_lib.ExperimentConfig:
  """The settings that a workdir was trained with."""
  path = config_path(workdir)
  if not storage.exists(path):
    if storage.is_dir(path.parent / "checkpoints"):
      raise checked.RefusedError(
        f"{workdir} holds no language model; read an imported encoder with "
        "longnet_jax.load_checkpoint, one of slides with "
        "experiments.encode_slide"
      )
    raise checked.RefusedError(
      f"{workdir} holds no config.json; give the --workdir of a training run"
    )
  return config_lib.build(_load(path))


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
    for key, values in config_lib.differences(_load(path), settings).items()
    if not any(fnmatch.fnmatch(key, free) for free in _FREE)
  }
  if changed:
    listed = ", ".join(
      f"{key} was {checked.shown(old)} and is now {checked.shown(new)}"
      for key, (old, new) in changed.items()
    )
    advice = "choose another --workdir or the old values"
    if set(changed) == {"optimizer.decay_steps"}:
      old, _ = changed["optimizer.decay_steps"]
      advice += (
        f"; to train on at the final rate: --config.optimizer.decay_steps={old}"
      )
    raise checked.RefusedError(
      f"{workdir} belongs to a run with another config: {listed}; {advice}"
    )


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
  return json.dumps({k: v for k, v in flat.items() if k not in _PLACES})


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
    raise checked.RefusedError(
      f"cannot write into {folder} ({error.strerror}); choose a --workdir "
      "that can be written and has space"
    ) from error
