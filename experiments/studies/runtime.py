"""Forward time of attention against length, at equal tokens: Figure 5.

LongNet has up to three branches, as in the paper: 2,048 tokens, the whole
sequence and one between them, with rates that keep as many rows of each
segment. Dense attention stands beside it as far as it fits. Heads are those of
the config; of its settings nothing else is used.
"""

from typing import NamedTuple

from matplotlib import figure, ticker

from experiments import attention_speed
from experiments.studies import runs, text
from longnet_jax.training import curves

_SEGMENT = 2048
_TOKENS = 2**17
_DENSE = "dense, blockwise"
_LONGEST_DENSE = 2**15
_REPEATS = 3


class _Length(NamedTuple):
  """One length to measure."""

  length: int

  @property
  def name(self) -> str:
    """Of its folder."""
    return f"runtime_{self.length}"


def _plan(config, seeds):
  del config, seeds
  lengths = []
  while not lengths or lengths[-1] < _TOKENS:
    lengths.append(2 * lengths[-1] if lengths else _SEGMENT)
  return [_Length(length) for length in lengths]


def _measure(config, each, folder):
  del folder
  length, model = each.length, config.model
  rates = sorted(
    {1, 1 << (length // _SEGMENT).bit_length() // 2, length // _SEGMENT}
  )
  setting = attention_speed.Setting(
    num_heads=model.num_heads,
    head_dim=model.head_dim,
    segment_lengths=tuple(_SEGMENT * rate for rate in rates),
    dilation_rates=tuple(rates),
    dtype=model.dtype,
    batch=_TOKENS // length,
  )
  names = ["LongNet"] + [_DENSE] * (length <= _LONGEST_DENSE)
  found = attention_speed.measure(
    setting, length, names=names, mode="forward", repeats=_REPEATS
  )
  return {
    "length": length,
    "batch": setting.batch,
    "branches": list(zip(setting.segment_lengths, rates, strict=True)),
    "seconds": {r["core"]: r["seconds"] for r in found if "seconds" in r},
  }


def _table(record):
  rows = []
  for made in record["measured"]:
    branches = ", ".join(f"({w:,}, {r:,})" for w, r in made["branches"])
    times = (
      f"{made['seconds'][core]:.2f}" if core in made["seconds"] else ""
      for core in ("LongNet", _DENSE)
    )
    rows.append((f"{made['length']:,}", f"{made['batch']:,}", branches, *times))
  head = ("length", "sequences", "branches (w, r)", "LongNet, seconds")
  return [((*head, "dense, seconds"), rows)]


def _draw(record, path):
  picture = figure.Figure(figsize=(6, 4), layout="constrained")
  axes = picture.subplots()
  for core, colour in zip((_DENSE, "LongNet"), curves.COLOURS, strict=False):
    points = [
      (made["length"], made["seconds"][core])
      for made in record["measured"]
      if core in made["seconds"]
    ]
    if points:
      style = dict(color=colour, marker="o", label=core)
      axes.plot(*zip(*points, strict=True), **style)
  axes.set(
    xlabel="length, tokens", ylabel=f"forward, seconds of {_TOKENS:,} tokens"
  )
  text.number_lengths(axes, [made["length"] for made in record["measured"]])
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_minor_formatter("")
  axes.grid(alpha=0.3)
  axes.legend(loc="center right")
  curves.save(picture, path)


STUDY = runs.Study(_plan, _measure, _table, _draw)
