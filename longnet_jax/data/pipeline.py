"""From a DataConfig to batches that depend on the step alone.

  tokenizer = pipeline.make_tokenizer(config)
  source = pipeline.make_source(config, tokenizer, "train")
  batch = source.batch(step, batch_size)

A batch is a dict of (B, T) arrays: `tokens` and `targets` int32, `weights`
float32 (1 where the target counts), `segment_ids` int32 (1, 2, ... for the
documents of a window, 0 at padding) and `positions` int32 (from 0 in each). A
corpus that is one stream of documents has no `segment_ids`.

A document is a separator and its tokens; the target of its last token is the
next separator. So bits per byte are, for any tokenizer, the summed loss in bits
over the sum of weights * tokenizer.byte_lengths[targets].
"""

from collections.abc import Iterator
import contextlib
import functools
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.data import config as config_lib
from longnet_jax.data import corpus, needle, tokenizers, windows


@runtime_checkable
class Source(Protocol):
  """Windows of one split, in a reproducible order."""

  window: int  # T
  num_windows: int  # of one epoch
  fingerprint: str  # hex; equal if and only if the windows are

  def batch(
    self,
    step: int,
    batch_size: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    shuffled: bool = True,
  ) -> dict[str, np.ndarray]:
    """This host's rows of batch `step`: host_index * b + 0..b-1.

    b is batch_size / host_count; the rows of all hosts make the same batch for
    any number of hosts. Hosts that share rows (a sequence split over hosts)
    give the same host_index.

    Shuffled: window number step * batch_size + row of an endless sequence that
    permutes the windows anew in each epoch; a stream keeps their order. Not
    shuffled: windows in order, each once; rows past the last window have
    weight 0.
    """
    ...

  def num_batches(self, batch_size: int) -> int:
    """Batches that hold every window once (for shuffled=False)."""
    ...


def abstract_batch(
  config: config_lib.DataConfig, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of the batches of a config, (batch_size, T) each."""
  types = dict.fromkeys(("tokens", "targets", "positions"), np.int32)
  types["weights"] = np.float32
  if config.dataset == "needle" or config.layout != "stream":
    types["segment_ids"] = np.int32
  shape = batch_size, config.window
  return {k: jax.ShapeDtypeStruct(shape, dtype) for k, dtype in types.items()}


def make_tokenizer(config: config_lib.DataConfig) -> tokenizers.Tokenizer:
  """The tokenizer that `config` asks for; BPE is trained once and then kept.

  tokenizer.save(path) stores it with a run; tokenizers.load(path) reads it.
  """
  if config.tokenizer == "bytes":
    return tokenizers.ByteTokenizer()
  return corpus.bpe_tokenizer(config)


def make_source(
  config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer, split: str
) -> Source:
  """The windows of a split: "train", "validation" or "test"."""
  if split not in config_lib.SPLITS:
    checked.refuse("split", split, f"one of {', '.join(config_lib.SPLITS)}")
  if config.dataset == "needle":
    return needle.Needle(config, split)
  return windows.Windows(
    corpus.open_corpus(config, tokenizer, split),
    window=config.window,
    layout=config.layout,
    seed=config.seed,
    separator_id=tokenizer.separator_id,
  )


def prefetched(
  source: Source,
  batch_size: int,
  *,
  start: int,
  stop: int,
  host_index: int = 0,
  host_count: int = 1,
  shuffled: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches start..stop-1, two of them made ahead by background threads.

  Use as `with contextlib.closing(pipeline.prefetched(...)) as batches`: the
  threads end with the block, also after an exception.
  """
  make = functools.partial(
    source.batch,
    batch_size=batch_size,
    host_index=host_index,
    host_count=host_count,
    shuffled=shuffled,
  )
  steps = grain.MapDataset.range(start, stop).map(make)
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
  with contextlib.closing(iter(steps.to_iter_dataset(options))) as batches:
    yield from batches
