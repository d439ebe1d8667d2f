"""What one device computes at a time, in rows: one for each position."""

from typing import NamedTuple

from longnet_jax import pattern as pattern_lib

WIDE = 4  # bytes of float32


class Rows(NamedTuple):
  """The rows of a part of the batch on one device, and what they are made of.

  count: positions of all its windows.
  windows: how many these are.
  parts: computed one after another in a step.
  width, queries, keys, hidden, vocabulary: values of a row in the residual
    stream, as queries, as keys, inside the feed-forward layer, as logits.
  itemsize: bytes of a value.
  again: whether backward computes a block a second time.
  branches: (w, r) of the attention.
  """

  count: int
  windows: int
  parts: int
  width: int
  queries: int
  keys: int
  hidden: int
  vocabulary: int
  itemsize: int
  again: bool
  branches: tuple[tuple[int, int], ...]


def of_device(config, mesh) -> Rows:
  """Returns the rows of a device.

  Args:
    config: an `ExperimentConfig`.
    mesh: of `parallel.mesh`, or its sizes alone.
  """
  model, split = config.model, mesh.shape["model"]
  parts = config.training.accumulation_steps
  windows = config.training.batch_size // parts // mesh.shape["data"]
  vocabulary = model.vocab_size
  return Rows(
    count=windows * config.data.window // mesh.shape["seq"],
    windows=windows,
    parts=parts,
    width=model.model_dim,
    queries=model.model_dim // split,
    keys=model.kv_heads * model.head_dim // split,
    hidden=model.ffn_dim // split,
    vocabulary=vocabulary if vocabulary % split else vocabulary // split,
    itemsize=2 if model.dtype == "bfloat16" else WIDE,
    again=model.remat in ("full", "offload"),
    branches=pattern_lib.from_config(model, config.data.window).branches,
  )
