"""Pictures of how runs went, from their records."""

from collections.abc import Mapping, Sequence
import io

from matplotlib import figure, ticker
import numpy as np

from longnet_jax import storage

# Okabe and Ito's colours, told apart by every kind of eye.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# So few records are drawn one by one.
_FEW = 20


def draw_losses(runs: Mapping[str, Sequence[dict]], path) -> None:
  """Training and validation loss of each labelled run, in one picture.

  A run is the records of its metrics file, or what of them has "step" with
  "bits_per_byte" or "validation_bits_per_byte". Where no run has the former,
  as when records had none, the training loss is in nats a token.
  """
  has_bits = any("bits_per_byte" in r for run in runs.values() for r in run)
  name = "bits_per_byte" if has_bits else "loss"
  picture = figure.Figure(figsize=(10, 4), layout="constrained")
  train, validation = picture.subplots(1, 2)
  last = max((r["step"] for run in runs.values() for r in run), default=1)
  for (label, records), colour in zip(
    runs.items(), colours(len(runs)), strict=True
  ):
    steps, losses = _series(records, name)
    few = len(steps) <= _FEW
    dots = dict(color=colour, marker="o", markersize=3)
    if len(runs) == 1 and not few:
      train.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
    style = dots if few else dict(color=colour)
    train.plot(steps, smooth(losses), **style, label=label)
    found = _series(records, "validation_bits_per_byte")
    validation.plot(*found, **dots, label=label)
  unit = "bits a byte" if has_bits else "nats a token"
  train.set(title="training loss", xlabel="step", ylabel=unit)
  validation.set(title="validation loss", xlabel="step", ylabel="bits a byte")
  for axes, kind in ((train, "record"), (validation, "validation")):
    axes.grid(alpha=0.3)
    axes.set_xlim(0, 1.03 * last)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if len(runs) > 1:
      axes.legend()
    if not any(len(line.get_xdata()) for line in axes.lines):
      where = dict(ha="center", transform=axes.transAxes)
      axes.text(0.5, 0.5, f"no {kind} yet", **where)
      axes.set_yticks([])
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
