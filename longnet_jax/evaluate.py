"""Perplexity and bits per byte by context length and by position."""

from collections.abc import Sequence
import dataclasses
import json
import math

from matplotlib import figure
import numpy as np

from longnet_jax import checked, pattern, storage
from longnet_jax.data import config as data_config
from longnet_jax.data import corpus, ngram, pipeline, tokenizers
from longnet_jax.models import config as model_config
from longnet_jax.models import transformer
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.training import curves
from longnet_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Score:
  """Losses summed over tokens; ratios follow."""

  nats: float
  tokens: int
  bytes: int

  @property
  def perplexity(self) -> float:
    """exp of the mean loss of a token."""
    return math.exp(min(self.nats / max(self.tokens, 1), 700.0))

  @property
  def bits_per_byte(self) -> float:
    """Loss in bits over the bytes of the text."""
    return self.nats / math.log(2) / max(self.bytes, 1)

  def to_dict(self) -> dict[str, float]:
    """The ratios and the counts behind them."""
    return {
      "perplexity": self.perplexity,
      "bits_per_byte": self.bits_per_byte,
      "tokens": self.tokens,
      "bytes": self.bytes,
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of one model on one text."""

  by_length: dict[int, Score]  # context length -> all positions
  by_position: dict[tuple[int, int], Score]  # [from, to) in the longest
  trigram_bits_per_byte: float | None  # of a byte trigram; None for needle
  split: str

  def to_dict(self) -> dict:
    """A JSON-ready record."""
    return {
      "split": self.split,
      "trigram_bits_per_byte": self.trigram_bits_per_byte,
      "lengths": [
        {"length": length, **score.to_dict()}
        for length, score in self.by_length.items()
      ],
      "positions": [
        {"from": first, "to": end, **score.to_dict()}
        for (first, end), score in self.by_position.items()
      ],
    }


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
) -> Evaluation:
  """Scores the same text of a split cut into windows of each length.

  A token sees only its own document and window, or of a stream its window. Its
  position is its distance from the start of what it sees, so the scores by
  position say what context is worth. A longer text than `max_tokens` is sampled
  evenly.

  Raises ValueError for a length that the positions cannot number, and for
  numbers of tokens below 1.
  """
  for name, value in (
    ("max_tokens", max_tokens),
    ("batch_tokens", batch_tokens),
    ("loss_chunk", loss_chunk),
  ):
    pattern.as_int(name, value)
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
  model = transformer.LongNetLM(config)
  longest = max(lengths)
  score = step_lib.jit_on_batch(
    step_lib.make_score(model, loss_chunk=loss_chunk),
    mesh_lib.make_mesh(),
    params,
  )
  by_length, by_position = {}, {}
  layout = "stream" if data.layout == "stream" else "packed"
  for length in sorted(set(lengths)):
    source = pipeline.make_source(
      dataclasses.replace(data, window=length, layout=layout),
      tokenizer,
      split,
    )
    rows = max(1, batch_tokens // length)
    numbers = _windows(source, length, longest, max_tokens)
    edges = position_edges(length)
    sums = np.zeros((3, len(edges) - 1))
    for start in range(0, len(numbers), rows):
      batch = _rows(source, numbers[start : start + rows], rows)
      losses = np.asarray(score(params, batch), np.float64)
      sums += _histograms(losses, batch, tokenizer.byte_lengths, edges)
    by_length[length] = _score(sums.sum(axis=1))
    if length == longest:
      spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
      by_position = {
        span: _score(column)
        for span, column in zip(spans, sums.T, strict=True)
        if column[1]
      }
  return Evaluation(
    by_length=by_length,
    by_position=by_position,
    trigram_bits_per_byte=trigram(data, split),
    split=split,
  )


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


def table(evaluation: Evaluation) -> str:
  """The scores as text, a line each."""
  lines = ["   context   perplexity   bits/byte      tokens"]
  for length, score in evaluation.by_length.items():
    lines.append(_line(f"{length:,}", score))
  lines.append("  position")
  for (first, end), score in evaluation.by_position.items():
    lines.append(_line(f"{first:,}-{end - 1:,}", score))
  if evaluation.trigram_bits_per_byte is not None:
    lines.append(
      f"a byte trigram reaches {evaluation.trigram_bits_per_byte:.3f} "
      f"bits/byte on the {evaluation.split} split"
    )
  return "\n".join(lines)


def draw(records: dict[str, dict], path) -> None:
  """Bits per byte by length and by position of labelled records."""
  picture = figure.Figure(figsize=(10, 4), layout="constrained")
  by_length, by_position = picture.subplots(1, 2, sharey=True)
  for (label, record), colour in zip(
    records.items(), curves.colours(len(records)), strict=True
  ):
    style = dict(color=colour, marker="o", label=label)
    rows = record["lengths"]
    by_length.plot(
      [r["length"] for r in rows], [r["bits_per_byte"] for r in rows], **style
    )
    rows = record["positions"]
    by_position.plot(
      [r["to"] for r in rows], [r["bits_per_byte"] for r in rows], **style
    )
  trigram_bits = next(iter(records.values()))["trigram_bits_per_byte"]
  for axes in (by_length, by_position):
    if trigram_bits is not None:
      axes.axhline(trigram_bits, color="grey", ls="--", label="byte trigram")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
  by_length.set(xlabel="context length, tokens", ylabel="bits a byte")
  by_position.set(xlabel="end of the position bucket, tokens")
  curves.save(picture, path)


def write(evaluation: Evaluation, path, **more) -> dict:
  """Writes the JSON record with `more` entries and returns it."""
  record = {**more, **evaluation.to_dict()}
  text = json.dumps(record, indent=2) + "\n"
  storage.write_whole(storage.path(path), text)
  return record


def _line(name: str, score: Score) -> str:
  return (
    f"{name:>10}   {score.perplexity:10.3f}   {score.bits_per_byte:9.4f}"
    f"   {score.tokens:9,}"
  )


def _windows(source, length: int, longest: int, max_tokens: int) -> list[int]:
  """Numbers of the windows that cover the same text at each length.

  Evenly spaced spans of the longest length, max_tokens in all.
  """
  spans = -(-source.num_windows * length // longest)
  count = min(spans, max(1, max_tokens // longest))
  starts = np.linspace(0, spans, count, endpoint=False).astype(int) * longest
  numbers = set()
  for start in starts.tolist():
    numbers.update(range(-(-start // length), -(-(start + longest) // length)))
  return sorted(n for n in numbers if n < source.num_windows)


def _rows(source, numbers, rows: int) -> dict[str, np.ndarray]:
  """One batch of the windows with these numbers, padded to `rows`."""
  parts = [source.batch(n, 1, shuffled=False) for n in numbers]
  batch = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  missing = [(0, rows - len(parts)), (0, 0)]
  return {k: np.pad(array, missing) for k, array in batch.items()}


def _histograms(losses, batch, byte_lengths, edges) -> np.ndarray:
  """(3, buckets): nats, tokens and bytes by position."""
  counted = batch["weights"] > 0
  positions = batch["positions"][counted]
  targets = batch["targets"][counted]
  weighted = (
    losses[counted],
    np.ones(len(targets)),
    byte_lengths[targets].astype(np.float64),
  )
  return np.stack(
    [np.histogram(positions, edges, weights=w)[0] for w in weighted]
  )


def _score(sums: np.ndarray) -> Score:
  nats, tokens, count = sums.tolist()
  return Score(nats=nats, tokens=int(tokens), bytes=int(count))
