"""Checkpoints of a run, with orbax behind this one module.

A checkpoint is a folder WORKDIR/checkpoints/STEP of separate items, so that
parameters can be read without the rest:

  params      the parameter tree
  opt_state   the optimizer's moments and counters
  train       step and random key; the data follows from the step
  config      every setting of the run, as JSON
  tokenizer   what maps text to tokens, as JSON
  data        fingerprints of the windows, as JSON
  checksums   the step and a digest of each other item, see checksums.py
  metrics     validation results at this step, where there are any

Of several processes each writes its part of the arrays and all of them call
the same methods in the same order.
"""

from collections.abc import Iterable
import contextlib
import secrets
import shutil
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

from longnet_jax import checked, storage
from longnet_jax.models import config as model_config
from longnet_jax.models import longvit, slide_encoder
from longnet_jax.parallel import hosts
from longnet_jax.parallel import sharding as sharding_lib
from longnet_jax.training import checkpoint_error, checksums, orbax_items
from longnet_jax.training import state as state_lib

# The key of the item "config" that holds the model's settings, and their class.
MODEL_KEYS = {
  "model": model_config.LongNetConfig,
  "slide_encoder": slide_encoder.SlideEncoderConfig,
  "longvit": longvit.LongViTConfig,
}
# Seconds that what is left of a failed save gets to end.
_PATIENCE = 5

CheckpointError = checkpoint_error.CheckpointError
WriteError = checkpoint_error.WriteError


class Checkpoints:
  """The series of checkpoints of one workdir; writes happen in background."""

  def __init__(
    self, workdir, *, max_to_keep: int = 1, keep_every: int = 0, read_only=False
  ):
    self.folder = folder(workdir)
    self._read_only = read_only
    self._knows_results = False  # by which a save keeps the best
    with checkpoint_error.explained(f"cannot open {self.folder}"):
      self._manager = orbax_items.open_manager(
        self.folder,
        max_to_keep=max_to_keep,
        keep_every=keep_every,
        read_only=read_only,
      )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if kind is not None and jax.process_count() > 1:
      return  # The others may never come to where closing waits for them.
    try:
      if kind is None:
        self.wait()
    finally:
      # After a failed save threads of orbax wait minutes for one another.
      closing = threading.Thread(target=self._close, daemon=True)
      closing.start()
      closing.join(None if kind is None else _PATIENCE)
      self._remove_unfinished()

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def find(self, which: int | str = "latest") -> int:
    """A step by number, "latest" or "best"; CheckpointError if none."""
    steps = self.steps()
    if not steps:
      raise CheckpointError(
        f"{self.folder} holds no complete checkpoint; train into its workdir "
        "first"
      )
    if which == "latest":
      return steps[-1]
    if which == "best":
      scored = [
        (m[orbax_items.BEST_BY], s) for s in steps if (m := self.metrics(s))
      ]
      return min(scored)[1] if scored else steps[-1]
    if which not in steps:
      raise CheckpointError(
        f"{self.folder} has no step {which}; it has "
        f"{', '.join(map(str, steps))}"
      )
    return which

  def metrics(self, step: int) -> dict[str, float] | None:
    """Validation results saved with a step; CheckpointError if changed."""
    with self._reading(step, "validation results of"):
      found = self._manager.metrics(step)
      checksums.check(
        self._recorded(step),
        checksums.of_json(metrics=orbax_items.plain(found)),
      )
    return found

  def set_aside(self, steps: Iterable[int]) -> dict[int, storage.Path]:
    """Moves steps out of the series; returns where to."""
    places = {
      step: self.folder.parent / f"damaged-{step}-{secrets.token_hex(2)}"
      for step in steps
    }
    with self._writing():
      for step, place in places.items():
        (self.folder / str(step)).rename(place)
      self._manager.reload()
    return places

  def save(
    self,
    step: int,
    state: state_lib.TrainState,
    records: dict[str, dict],
    validation: dict[str, float] | None = None,
  ) -> None:
    """Starts writing; returns once the state may be overwritten.

    That is when it has been copied to this host, and not before the save before
    is on disk, so that there is one copy at a time. `records` are the JSON
    items; `validation` has at least a "loss".
    """
    validation = orbax_items.plain(validation)
    arrays = dict(
      params=state.params,
      opt_state=state.opt_state,
      train={"step": state.step, "rng": state.rng},
    )
    items = orbax_items.to_save(step, arrays, records, validation)
    with self._writing():
      self._manager.wait_until_finished()
      if not self._knows_results:
        self._manager.reload()
        self._knows_results = True
      _check_space(self.folder, state)
      self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=validation
      )

  def is_writing(self) -> bool:
    """Whether a save is still being written in the background."""
    return self._manager.is_saving_in_progress()

  def save_params(self, params, records: dict[str, dict]) -> None:
    """Writes parameters that were not trained here, as step 0."""
    items = orbax_items.to_save(0, {"params": params}, records, None)
    with self._writing():
      _check_space(self.folder, params)
      self._manager.save(0, args=ocp.args.Composite(**items))
    self.wait()

  def restore(
    self, step: int, abstract: state_lib.TrainState
  ) -> state_lib.TrainState:
    """The state at `step`, placed as the shardings in `abstract` say."""
    targets = dict(
      params=abstract.params,
      opt_state=abstract.opt_state,
      train={"step": abstract.step, "rng": abstract.rng},
    )
    arguments = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
    items = self._restore(step, arguments)
    self._verify(step, checksums.of_arrays(**{k: items[k] for k in targets}))
    with self._reading(step):
      checksums.check_step({"step": int(items["train"]["step"])}, step)
    return state_lib.TrainState(
      params=items["params"], opt_state=items["opt_state"], **items["train"]
    )

  def restore_json(self, step: int, item: str) -> dict:
    """The item "config", "tokenizer" or "data" of a step."""
    value = self._restore(step, {item: ocp.args.JsonRestore()})[item]
    self._verify(step, checksums.of_json(**{item: value}))
    return value

  def items(self, step: int) -> set[str]:
    """Names of what a step holds."""
    with self._reading(step):
      return set(self._manager.item_metadata(step).keys())

  def abstract_params(self, step: int) -> dict[str, Any]:
    """Shapes and types of the parameters; nothing else is read."""
    with self._reading(step):
      return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        self._manager.item_metadata(step)["params"].tree,
      )

  def restore_params(self, step: int, where=None) -> dict[str, Any]:
    """Parameters alone, on a device of this host unless told where.

    `where` is a sharding for all of them, or a mesh of `parallel.mesh`, over
    which they lie as in training.
    """
    target = self.abstract_params(step)
    if isinstance(where, jax.sharding.Mesh):
      shardings = sharding_lib.shardings_for(target, where)
    else:
      where = where or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: where, target)
    target = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      target,
      shardings,
    )
    arguments = {"params": ocp.args.StandardRestore(target)}
    params = self._restore(step, arguments)["params"]
    self._verify(step, checksums.of_arrays(params=params))
    return params

  def wait(self) -> None:
    """Returns when everything is on disk; raises what went wrong."""
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def _close(self):
    with contextlib.suppress(Exception):  # said before, or by wait
      self._manager.close()

  def _verify(self, step, found: dict[str, str]):
    """Raises CheckpointError where restored items are not those saved."""
    with self._reading(step):
      checksums.check(self._recorded(step), found)

  def _recorded(self, step) -> dict:
    """The item "checksums" of a step, once it is known to be this step's."""
    arguments = ocp.args.Composite(checksums=ocp.args.JsonRestore())
    saved = self._manager.restore(step, args=arguments)["checksums"]
    checksums.check_step(saved, step)
    return saved

  def _remove_unfinished(self):
    """Removes what a failed write has left; a full disk gets its space back."""
    if self._read_only or storage.is_remote(self.folder):
      return  # of a bucket the next start removes it
    if hosts.is_first():
      for folder in self.folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(folder, ignore_errors=True)

  def _restore(self, step, arguments):
    with self._reading(step):
      return self._manager.restore(step, args=ocp.args.Composite(**arguments))

  def _writing(self):
    advice = "free some space or choose another workdir"
    if storage.is_remote(self.folder):
      advice = "check the bucket, the credentials and the network"
    return checkpoint_error.explained(
      f"cannot write a checkpoint into {self.folder}",
      f"{advice}, then start again: it resumes from the last complete "
      "checkpoint",
      kind=WriteError,
    )

  def _reading(self, step, what="checkpoint"):
    others = [s for s in self.steps() if s != step]
    before = [s for s in others if s < step] or others
    advice = "no other step is left: start in an empty workdir"
    if before:
      advice = "train with --fallback"
      if jax.process_count() > 1:
        advice = "move that folder out of the workdir"
      advice += (
        f" to go on from step {before[-1]}, or read with "
        f"--checkpoint={before[-1]}"
      )
    problem = f"cannot read {what} {self.folder / str(step)}"
    return checkpoint_error.explained(problem, advice)


def folder(workdir) -> storage.Path:
  """Where a workdir has its checkpoints; CheckpointError if it cannot."""
  path = storage.absolute(workdir)
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise CheckpointError(
      f"workdir {checked.shown(str(path))}: arrays go to folders whose names "
      "are UTF-8 only; rename it or choose another"
    ) from error
  if storage.is_remote(path) and not str(path).startswith("gs://"):
    raise CheckpointError(
      f"workdir {path}: arrays go to gs:// or to a file system only; use one "
      "of these, such as the bucket mounted as a folder"
    )
  found = path / "checkpoints"
  if not storage.is_remote(found) and found.is_file():
    raise CheckpointError(
      f"{found} is a file; move it away or choose another workdir"
    )
  return found


def exists(workdir) -> bool:
  """Whether a workdir has a complete checkpoint."""
  return storage.is_dir(folder(workdir)) and bool(open_to_read(workdir).steps())


def load_checkpoint(
  path, *, step: int | str = "latest", sharding=None
) -> tuple[model_config.LongNetConfig, dict[str, Any]]:
  """The model's config and parameters from a workdir.

  The config is that of a decoder or encoder, a slide encoder or a LongViT.
  `step` is a number, "latest", or "best" by validation loss. `sharding` may be
  a mesh of `parallel.mesh`, too: parameters then lie over it as in training.
  Raises CheckpointError if there is none or it cannot be read.
  """
  checkpoints = open_to_read(path)
  step = checkpoints.find(step)
  config = checkpoints.restore_json(step, "config")
  params = checkpoints.restore_params(step, sharding)
  (key,) = MODEL_KEYS.keys() & config.keys()
  return MODEL_KEYS[key].from_dict(config[key]), params


def check_space(workdir, tree) -> None:
  """Raises WriteError where the disk may not hold a checkpoint of a tree."""
  where = folder(workdir)
  with checkpoint_error.explained(
    f"cannot write into {where}",
    "make room or choose another workdir, then start again",
    kind=WriteError,
  ):
    _check_space(where, tree)


def _check_space(where: storage.Path, tree) -> None:
  """Raises OSError where the disk may not hold the arrays of a tree.

  Twice their bytes: orbax writes shares of a process and then joins them. A
  bucket has no end.
  """
  if storage.is_remote(where):
    return
  while not where.exists():
    where = where.parent
  leaves = jax.tree.leaves(tree)
  size = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  free = shutil.disk_usage(where).free
  if free < size:
    raise OSError(
      f"a checkpoint needs {size:,} bytes and the disk of {where} has "
      f"{free:,} left"
    )


def open_to_read(workdir) -> Checkpoints:
  """The checkpoints of an existing workdir, which is left unchanged."""
  if not storage.is_dir(folder(workdir)):
    raise CheckpointError(
      f"{workdir} holds no checkpoints; give the --workdir of a training run"
    )
  return Checkpoints(workdir, read_only=True)
