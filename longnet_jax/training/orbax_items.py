"""The items of a checkpoint as orbax stores them, and which steps it keeps."""

from collections.abc import Iterator
import contextlib
import logging
from typing import Any

import orbax.checkpoint as ocp

from longnet_jax import storage
from longnet_jax.training import checksums

# The result of validation by which a step is the best.
BEST_BY = "loss"
_MANAGERS = ocp.checkpoint_managers
_STATE_ITEMS = ("params", "opt_state", "train")
_JSON_ITEMS = ("config", "tokenizer", "data", "checksums")


def open_manager(
  folder: storage.Path, *, max_to_keep: int, keep_every: int, read_only: bool
) -> ocp.CheckpointManager:
  """Orbax's manager of a series of checkpoints.

  Beside the latest `max_to_keep` it keeps the best by validation and, for ever,
  the multiples of `keep_every` unless that is 0.
  """
  keep = _MANAGERS.AnyPreservationPolicy(
    [
      _MANAGERS.LatestN(max_to_keep),
      _MANAGERS.BestN(
        get_metric_fn=lambda metrics: metrics[BEST_BY],
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
      *([_MANAGERS.EveryNSteps(keep_every)] if keep_every else []),
    ]
  )
  handlers = ocp.DefaultCheckpointHandlerRegistry()
  for item in _STATE_ITEMS:
    handlers.add(item, ocp.args.StandardSave, ocp.StandardCheckpointHandler())
    handlers.add(
      item, ocp.args.StandardRestore, ocp.StandardCheckpointHandler()
    )
  for item in _JSON_ITEMS:
    handlers.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    handlers.add(item, ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
  with _quiet():
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keep,
      best_fn=lambda metrics: metrics[BEST_BY],
      best_mode="min",
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      # Else damaged results of one step would keep all from being opened.
      lightweight_initialize=True,
    )
    return ocp.CheckpointManager(
      folder, options=options, handler_registry=handlers
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides warnings that a folder opened for reading is only read."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def to_save(
  step: int,
  arrays: dict[str, Any],
  records: dict[str, dict],
  validation: dict[str, float] | None,
) -> dict[str, ocp.args.CheckpointArgs]:
  """What orbax is to write: the arrays, the records and their checksums."""
  sums = {
    "step": step,
    **checksums.of_arrays(**arrays),
    **checksums.of_json(**records, metrics=validation),
  }
  return {
    **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
    **{name: ocp.args.JsonSave(value) for name, value in records.items()},
    "checksums": ocp.args.JsonSave(sums),
  }


def plain(validation: dict | None) -> dict[str, float] | None:
  """Validation results as JSON gives them back."""
  if validation is None:
    return None
  return {name: float(value) for name, value in validation.items()}
