"""Scores of a trained model: their table, picture and JSON."""

from collections.abc import Iterator
import dataclasses
import json
import math

from matplotlib import figure

from longnet_jax import storage
from longnet_jax.training import curves


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
      "perplexity": _rounded(self.perplexity),
      "bits_per_byte": _rounded(self.bits_per_byte),
      "tokens": self.tokens,
      "bytes": self.bytes,
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of one model on one text."""

  by_length: dict[int, Score]  # context length -> all positions
  by_position: dict[tuple[int, int], Score]  # [from, to) in the longest
  # The same tokens in windows of the shortest; empty where none is shorter.
  by_position_cut: dict[tuple[int, int], Score]
  trigram_bits_per_byte: float | None  # of a byte trigram; None for needle
  split: str

  def to_dict(self) -> dict:
    """A JSON-ready record."""
    return {
      "split": self.split,
      "trigram_bits_per_byte": _rounded(self.trigram_bits_per_byte),
      "lengths": [
        {"length": length, **score.to_dict()}
        for length, score in self.by_length.items()
      ],
      "cut_to": min(self.by_length) if self.by_position_cut else None,
      "positions": [
        {"from": first, "to": end, **score.to_dict(), **self._cut(first, end)}
        for (first, end), score in self.by_position.items()
      ],
    }

  def _cut(self, first: int, end: int) -> dict[str, float]:
    """What the tokens of a bucket score with less context."""
    if not self.by_position_cut:
      return {}
    cut = _rounded(self.by_position_cut[first, end].bits_per_byte)
    full = _rounded(self.by_position[first, end].bits_per_byte)
    return {"cut_bits_per_byte": cut, "context_worth": _rounded(cut - full)}


def _rounded(value: float | None) -> float | None:
  """Five significant digits."""
  return value if value is None else float(f"{value:.5g}")


def table(evaluation: Evaluation) -> str:
  """The scores as text, a line each."""
  lines = ["   context   perplexity   bits/byte      tokens"]
  for length, score in evaluation.by_length.items():
    lines.append(
      f"{length:>10,}   {score.perplexity:10.3f}   {score.bits_per_byte:9.4f}"
      f"   {score.tokens:9,}"
    )
  lines += _position_lines(evaluation)
  if evaluation.trigram_bits_per_byte is not None:
    lines.append(
      f"a byte trigram reaches {evaluation.trigram_bits_per_byte:.4f} "
      f"bits/byte on the {evaluation.split} split"
    )
  return "\n".join(lines)


def _position_lines(evaluation: Evaluation) -> Iterator[str]:
  """The same tokens with more and with less context, where there is less."""
  if not evaluation.by_position:  # stopped before the end
    return
  if not evaluation.by_position_cut:
    yield "a second, shorter context would show what context is worth"
    return
  shortest, longest = min(evaluation.by_length), max(evaluation.by_length)
  yield "bits/byte of the same tokens, by their position in the longest windows"
  yield (
    f"{'position':>15}  {f'of {longest:,}':>10}  {f'of {shortest:,}':>10}"
    f"  {'worth':>8}  {'tokens':>10}"
  )
  for row in evaluation.to_dict()["positions"]:
    span = f"{row['from']:,}-{row['to'] - 1:,}"
    yield (
      f"{span:>15}  {row['bits_per_byte']:10.4f}"
      f"  {row['cut_bits_per_byte']:10.4f}  {row['context_worth']:8.4f}"
      f"  {row['tokens']:10,}"
    )


def draw(records: dict[str, dict], path) -> None:
  """Bits per byte by length and by position of labelled records.

  By position a dashed line is the same tokens with less context.
  """
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
    rows, longest = record["positions"], rows[-1]["length"]
    ends = [r["to"] for r in rows]
    style["label"] = f"{label}, windows of {longest:,}".removeprefix(", ")
    by_position.plot(ends, [r["bits_per_byte"] for r in rows], **style)
    if record["cut_to"]:
      style |= dict(
        label=f"the same tokens, windows of {record['cut_to']:,}",
        linestyle="--",
        markerfacecolor="white",
      )
      by_position.plot(ends, [r["cut_bits_per_byte"] for r in rows], **style)
  trigram_bits = next(iter(records.values()))["trigram_bits_per_byte"]
  for axes, part in ((by_length, "lengths"), (by_position, "positions")):
    if trigram_bits is not None:
      axes.axhline(trigram_bits, color="grey", ls=":", label="byte trigram")
    if any(record[part] for record in records.values()):
      axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  by_length.set(
    xlabel="context length, tokens",
    ylabel=f"bits a byte, {record['split']} split",
  )
  by_position.set(
    xlabel=f"end of the position bucket in windows of {longest:,}, tokens"
  )
  curves.save(picture, path)


def write(evaluation: Evaluation, path, **more) -> dict:
  """Writes the JSON record with `more` entries and returns it."""
  record = {**more, **evaluation.to_dict()}
  text = json.dumps(record, indent=2) + "\n"
  storage.write_whole(storage.path(path), text)
  return record
