"""Parameters that a new run starts from: those of another checkpoint."""

import dataclasses
from typing import Any

import jax

from longnet_jax import checked, storage
from longnet_jax.data import tokenizers
from longnet_jax.parallel import sharding
from longnet_jax.training import checkpoint
from longnet_jax.training import config as config_lib
from longnet_jax.training import workdir as workdir_lib

# Settings that say nothing of what is trained.
_UNSAID = ("mesh.*", "training.init_from", "data.data_dir", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint of a language model, own or imported."""

  checkpoints: checkpoint.Checkpoints
  workdir: storage.Path
  step: int
  tokenizer: tokenizers.Tokenizer | None  # None where there is none with it
  differences: dict[str, tuple]  # dotted key -> (value there, value here)

  def __str__(self):
    return f"{self.workdir}, step {self.step}"

  def describe(self) -> list[str]:
    """Lines that say what is taken, and which settings differ."""
    head = f"parameters of {self}; every setting is the same"
    if self.differences:
      head = f"parameters of {self}; settings that differ, there -> here:"
    width = max(map(len, self.differences), default=0)
    return [
      head,
      *(
        f"  {key:<{width}}  {checked.shown(old)} -> {checked.shown(new)}"
        for key, (old, new) in self.differences.items()
      ),
    ]

  def check(self, wanted) -> None:
    """Raises RefusedError unless the parameters are those `wanted`, by shape.

    It names the first that is not, with both shapes.
    """
    found, wanted = map(_shapes, (self._abstract(), wanted))
    for name in [*wanted, *(found.keys() - wanted.keys())]:
      there, here = (shapes.get(name) for shapes in (found, wanted))
      if there != here:
        settings = [k for k in self.differences if k.startswith("model.")]
        raise checked.RefusedError(
          f"training.init_from: parameter {name} is {_said(there)} in {self} "
          f"and {_said(here)} here; settings of the model that differ: "
          f"{', '.join(settings) or 'none'}"
        )

  def load(self, mesh) -> dict[str, Any]:
    """The parameters, on the mesh as in training."""
    return self.checkpoints.restore_params(self.step, mesh)

  def _abstract(self):
    return self.checkpoints.abstract_params(self.step)


def find(config: config_lib.ExperimentConfig) -> Origin:
  """What `training.init_from` names.

  Raises RefusedError where it holds no language model, or one of other tokens.
  """
  name = config.training.init_from
  where, step = storage.path(name), "latest"
  if where.parent.name == "checkpoints" and where.name.isdigit():
    where, step = where.parent.parent, int(where.name)
  try:
    checkpoints = checkpoint.open_to_read(where)
    step = checkpoints.find(step)
  except checkpoint.CheckpointError as error:
    raise checked.RefusedError(f"training.init_from: {error}") from error
  settings = checkpoints.restore_json(step, "config")
  if "model" not in settings:
    raise checked.RefusedError(
      f"training.init_from is {checked.shown(name)}, which holds no language "
      "model; give the workdir of a training run or of an imported decoder"
    )
  items = checkpoints.items(step)
  tokenizer = None
  if "tokenizer" in items or storage.exists(workdir_lib.tokenizer_path(where)):
    tokenizer = workdir_lib.load_tokenizer(where, step=step)
    _check_kind(config, tokenizer, where)
  # Of what an imported model was trained on and how, nothing is known.
  of_a_run = "data" in items
  here = dataclasses.asdict(config)
  differences = {
    key: values
    for key, values in config_lib.changes(settings, here).items()
    if (of_a_run or key.startswith("model."))
    and not workdir_lib.is_among(key, _UNSAID)
  }
  return Origin(checkpoints, where, step, tokenizer, differences)


def _check_kind(config, tokenizer, where):
  """Raises where the settings ask for other tokens than the embeddings are."""
  is_bytes = isinstance(tokenizer, tokenizers.ByteTokenizer)
  kind = "bytes" if is_bytes else "bpe"
  if config.data.tokenizer != kind:
    raise checked.RefusedError(
      f"data.tokenizer is {config.data.tokenizer!r} and the parameters of "
      f"{where} are of {kind!r}; give --config.data.tokenizer={kind}"
    )


def _shapes(params) -> dict[str, tuple]:
  return {
    sharding.path_name(path): (leaf.shape, str(leaf.dtype))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _said(leaf: tuple | None) -> str:
  return f"{leaf[1]} {leaf[0]}" if leaf else "absent"
