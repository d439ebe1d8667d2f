"""The item "checksums" of a checkpoint: what all its other items were.

Storage restores changed bytes and swapped folders without a word. So the item
holds the step, and for each other item a digest: of arrays a fingerprint that
devices compute, of JSON a hash of its text.
"""

from collections.abc import Mapping
import hashlib
import json

from longnet_jax.training import state as state_lib


def of_arrays(**trees) -> dict[str, str]:
  """Item -> digest of its arrays."""
  return {name: state_lib.fingerprint(tree) for name, tree in trees.items()}


def of_json(**values) -> dict[str, str]:
  """Item -> digest of its JSON; None is an item that is not there."""
  return {name: _digest(value) for name, value in values.items()}


def check(saved: Mapping, found: Mapping[str, str]) -> None:
  """Raises ValueError unless each item found is the one that was saved.

  The first checkpoints covered the parameters and the optimizer's state only
  and had no "step"; of them these two are compared.
  """
  for name, digest in found.items():
    if name not in saved and "step" not in saved:
      continue
    if saved.get(name) != digest:
      raise ValueError(f"the bytes of {name} have changed since the save")


def check_step(saved: Mapping, step: int) -> None:
  """Raises ValueError where the checkpoint of another step lies in a folder."""
  if saved.get("step", step) != step:
    raise ValueError(f"it is the checkpoint of step {saved['step']}")


def _digest(value) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
