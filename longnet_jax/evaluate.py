"""What a trained model has learned, and what context is worth to it.

Each length scores the same tokens. Those far into a long window are better
predicted whether or not the model looks back, as long documents are other text
than short ones; so by position each token is scored twice, in the longest
windows and in the shortest, and the difference is what context is worth.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import numpy as np

from longnet_jax import checked, pattern, scores
from longnet_jax.data import config as data_config
from longnet_jax.data import corpus, ngram, pipeline, tokenizers
from longnet_jax.models import attention, transformer
from longnet_jax.models import config as model_config
from longnet_jax.ops import blockwise
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding
from longnet_jax.training import step as step_lib


def evaluate(
  config: model_config.LongNetConfig,
  params,
  data: data_config.DataConfig,
  tokenizer: tokenizers.Tokenizer,
  lengths: Sequence[int],
  *,
  split: str = "test",
  max_tokens: int = 1_000_000,
  batch_tokens: int = 8192,
  loss_chunk: int = 2048,
  mesh: jax.sharding.Mesh | None = None,
  stop: Callable[[int, float], bool] = lambda length, share: False,
  trained_window: int | None = None,
) -> scores.Evaluation:
  """Scores the same text of a split cut into windows of each length.

  A token sees only its own document and window, or of a stream its window. Its
  position is its distance from the start of what it sees in the longest
  window. A longer text than `max_tokens` is sampled evenly. Over a `mesh` of
  `parallel.mesh` windows, positions and heads are split as in training;
  parameters are then given as they lie over it. `stop(length, share)` is asked
  after each batch, with the share of the length that is done; once it says so,
  what was read so far is scored by length alone. Windows longer than a
  `trained_window` are read block by block, see `ops.blockwise`; without one the
  core reads them as it is.

  Raises ValueError for a length that the positions cannot number or the mesh
  cannot split, and for numbers of tokens below 1.
  """
  for name, value in (
    ("max_tokens", max_tokens),
    ("batch_tokens", batch_tokens),
    ("loss_chunk", loss_chunk),
  ):
    pattern.as_int(name, value)
  lengths = _checked_lengths(config, lengths)
  mesh = mesh or mesh_lib.make_mesh()
  attend = attention.make_attention_fn(config, mesh)
  if trained_window:
    attend = blockwise.over_blocks(attend, trained_window)
  model = transformer.LongNetLM(config, attend)
  score = step_lib.jit_on_batch(
    step_lib.make_score(model, loss_chunk=loss_chunk), mesh, params
  )
  layout = "stream" if data.layout == "stream" else "packed"
  source = lambda length: pipeline.make_source(
    dataclasses.replace(data, window=length, layout=layout), tokenizer, split
  )
  places = None
  if data.dataset != "needle":  # whose windows are other text at each length
    places = _Places(source(lengths[-1]), max_tokens)
  edges = position_edges(lengths[-1])
  sums, stopped = {}, False
  for length in lengths:
    windows = source(length)
    rows = _batch_size(config, mesh, length, batch_tokens)
    numbers = _windows(windows, length, lengths[-1], max_tokens)
    sums[length] = np.zeros((3, len(edges) - 1))
    for share, batch, found in _batches(windows, numbers, rows, places):
      placed = sharding.place_batch(batch, mesh, rows)
      losses = np.asarray(score(params, placed), np.float64)
      sums[length] += _histograms(
        losses, batch["targets"], found, tokenizer.byte_lengths, edges
      )
      if stopped := stop(length, share):
        break
    if stopped:
      break
  by_length = {n: _score(found.sum(axis=1)) for n, found in sums.items()}
  if stopped:  # By position the lengths would have read other tokens.
    return scores.Evaluation(by_length, {}, {}, None, split)
  is_cut = places is not None and len(lengths) > 1
  return scores.Evaluation(
    by_length=by_length,
    by_position=_by_position(sums[lengths[-1]], edges),
    by_position_cut=_by_position(sums[lengths[0]], edges) if is_cut else {},
    trigram_bits_per_byte=trigram(data, split),
    split=split,
  )


def _batch_size(config, mesh, length: int, batch_tokens: int) -> int:
  """Windows of a length at a time, or RefusedError if the mesh cannot split."""
  rows = max(1, batch_tokens // length)
  rows += -rows % mesh.shape["data"]
  sharding.check_mesh(
    mesh,
    batch_size=rows,
    length=length,
    num_heads=config.num_heads,
    kv_heads=config.kv_heads,
    ffn_dim=config.ffn_dim,
  )
  return rows


def _checked_lengths(config, lengths: Sequence[int]) -> list[int]:
  """The distinct lengths, shortest first, or RefusedError."""
  if not lengths:
    raise checked.RefusedError(
      "lengths is empty; give at least one context length"
    )
  for length in lengths:
    if not 1 <= length <= config.position_limit:
      raise checked.RefusedError(
        f"length is {length}; position={config.position!r} of this model "
        f"numbers 1 to {config.position_limit} positions"
      )
  return sorted(set(lengths))


def trigram(data: data_config.DataConfig, split: str) -> float | None:
  """Bits per byte of a byte trigram of the training text on a split."""
  if data.dataset == "needle":
    return None
  read = lambda part: corpus.open_corpus(
    dataclasses.replace(data, tokenizer="bytes"),
    tokenizers.ByteTokenizer(),
    part,
  )
  return ngram.bits_per_byte(read("train").tokens, read(split).tokens)


def position_edges(length: int) -> np.ndarray:
  """0, 64, 128, 256, ... length: buckets that double."""
  edges = [0]
  edge = min(64, length)
  while edge < length:
    edges.append(edge)
    edge *= 2
  return np.array([*edges, length])


def _windows(source, length: int, longest: int, max_tokens: int) -> list[int]:
  """Numbers of the windows that cover the same text at each length.

  Evenly spaced spans of the longest length, max_tokens in all. Windows whose
  length does not divide it may begin before and end behind a span.
  """
  spans = -(-source.num_windows * length // longest)
  count = min(spans, max(1, max_tokens // longest))
  starts = np.linspace(0, spans, count, endpoint=False).astype(int) * longest
  numbers = set()
  for start in starts.tolist():
    numbers.update(range(start // length, -(-(start + longest) // length)))
  return sorted(n for n in numbers if n < source.num_windows)


def _batches(source, numbers, rows: int, places):
  """Yields batches of windows, and the share that is done after each.

  With them the position of each token, that of `places` if there are any; -1
  where it does not count.
  """
  for start in range(0, len(numbers), rows):
    chosen = numbers[start : start + rows]
    batch = _rows(source, chosen, rows)
    found = batch["positions"]
    if places:
      found = places.find(chosen, rows, source.window)
    share = min(1, (start + rows) / len(numbers))
    yield share, batch, np.where(batch["weights"] > 0, found, -1)


def _rows(source, numbers, rows: int) -> dict[str, np.ndarray]:
  """One batch of the windows with these numbers, padded to `rows`."""
  parts = [source.batch(n, 1, shuffled=False) for n in numbers]
  batch = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  missing = [(0, rows - len(parts)), (0, 0)]
  return {k: np.pad(array, missing) for k, array in batch.items()}


class _Places:
  """Where tokens of a text stand in the chosen windows of its longest cut."""

  def __init__(self, source: pipeline.Source, max_tokens: int):
    self._window = source.window
    numbers = _windows(source, source.window, source.window, max_tokens)
    self._numbers = np.array(numbers)
    self._positions = np.full((len(numbers), source.window), -1, np.int32)
    for row, number in zip(self._positions, numbers, strict=True):
      batch = source.batch(number, 1, shuffled=False)
      np.copyto(row, batch["positions"][0], where=batch["weights"][0] > 0)

  def find(self, numbers, rows: int, length: int) -> np.ndarray:
    """(rows, length): positions of the tokens of these windows; -1 of others.

    Windows of each length are cut from the start of the same text.
    """
    first = np.full(rows, -length)
    first[: len(numbers)] = np.array(numbers) * length
    token = first[:, None] + np.arange(length)
    number, place = np.divmod(token, self._window)
    row = np.searchsorted(self._numbers, number)
    row = np.minimum(row, len(self._numbers) - 1)
    known = self._numbers[row] == number
    return np.where(known, self._positions[row, place], -1)


def _histograms(losses, targets, positions, byte_lengths, edges) -> np.ndarray:
  """(3, buckets): nats, tokens and bytes by position; below 0 none count."""
  counted = positions >= 0
  targets = targets[counted]
  weighted = (
    losses[counted],
    np.ones(len(targets)),
    byte_lengths[targets].astype(np.float64),
  )
  return np.stack(
    [np.histogram(positions[counted], edges, weights=w)[0] for w in weighted]
  )


def _by_position(sums, edges) -> dict[tuple[int, int], scores.Score]:
  """Scores of the buckets that hold a token."""
  spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
  columns = zip(spans, sums.T, strict=True)
  return {span: _score(column) for span, column in columns if column[1]}


def _score(sums: np.ndarray) -> scores.Score:
  nats, tokens, count = sums.tolist()
  return scores.Score(nats=nats, tokens=int(tokens), bytes=int(count))
