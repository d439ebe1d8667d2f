"""Pictures of how runs went, from their records."""

from collections.abc import Mapping, Sequence
import io

from matplotlib import figure
import numpy as np

from longnet_jax import storage

# Okabe and Ito's colours, told apart by every kind of eye.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_losses(runs: Mapping[str, Sequence[dict]], path) -> None:
  """Training and validation loss of each labelled run, in one picture.

  A run is the records of its metrics file, or what of them has "step" with
  "loss" or "validation_bits_per_byte".
  """
  picture = figure.Figure(figsize=(10, 4), layout="constrained")
  train, validation = picture.subplots(1, 2)
  for (label, records), colour in zip(
    runs.items(), colours(len(runs)), strict=True
  ):
    steps, losses = _series(records, "loss")
    if len(runs) == 1:
      train.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
    train.plot(steps, smooth(losses), color=colour, label=label)
    validation.plot(
      *_series(records, "validation_bits_per_byte"),
      color=colour,
      marker="o",
      markersize=3,
      label=label,
    )
  train.set(title="training loss", xlabel="step", ylabel="nats a token")
  validation.set(title="validation loss", xlabel="step", ylabel="bits a byte")
  for axes in (train, validation):
    axes.grid(alpha=0.3)
    if len(runs) > 1:
      axes.legend()
  save(picture, path)


def save(picture: figure.Figure, path) -> None:
  """Writes a picture as PNG, on this machine or into a bucket."""
  image = io.BytesIO()
  picture.savefig(image, dpi=120, format="png")
  storage.write_whole(storage.path(path), image.getvalue())


def smooth(values: np.ndarray, *, share: float = 0.05) -> np.ndarray:
  """Mean of each value and its neighbours, `share` of the series in all."""
  if not len(values):
    return values
  half = int(len(values) * share / 2)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low = np.maximum(index - half, 0)
  high = np.minimum(index + half + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _series(
  records: Sequence[dict], name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the records that have `name`."""
  pairs = [(r["step"], r[name]) for r in records if name in r]
  steps, values = zip(*pairs, strict=True) if pairs else ((), ())
  return np.array(steps), np.array(values, float)


def colours(count: int) -> list[str]:
  """As many colours as there are lines."""
  return [COLOURS[i % len(COLOURS)] for i in range(count)]
