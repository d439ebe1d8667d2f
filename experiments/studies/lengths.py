"""Bits per byte by trained and by read context: the paper's Table 2.

Dense attention at the shortest context and, to know what context is worth, at
the longest; LongNet and Sparse Transformers with its FLOPs at three contexts.
Every model reads the same text at every length. Windows longer than the trained
context are read in blocks of half of it that see the block before (blockwise
causal attention, as in the paper): no row attends to more than in training,
whatever the core.
"""

from matplotlib import figure

from experiments import baselines
from experiments.studies import runs, text
from longnet_jax.training import curves

_COLOURS = dict(
  zip(("dense", "dilated", "sparse"), curves.COLOURS, strict=False)
)
_STYLES = (":", "-.", "--", "-")  # from the shortest trained context


def _plan(config, seeds):
  shortest, *others = runs.contexts(config)
  longest = others.pop()
  first = [("dense", shortest)]
  first += [(core, longest) for core in ("dilated", "dense", "sparse")]
  rest = [(core, n) for n in others for core in ("dilated", "sparse")]
  return [
    runs.make_run(config, core, context, seed)
    for part in (first, rest)
    for seed in range(seeds)
    for core, context in part
  ]


def _table(record):
  lengths = text.lengths(record)
  rows = []
  for (core, context), found in text.alike(record, "core", "context").items():
    scores = (text.cell(text.bits(m, n) for m in found) for n in lengths)
    rows.append((text.label(core, context), f"{len(found)}", *scores))
  head = ("bits per byte, test split", "seeds")
  by_length = head + tuple(f"read at {n:,}" for n in lengths), rows
  return [by_length, worth(record)]


def worth(record: dict) -> tuple:
  """Returns head and rows of what more context is worth, by position.

  Of models of the longest one.
  """
  shortest, *_, longest = text.lengths(record)
  found = {
    core: made
    for (core, context), made in text.alike(record, "core", "context").items()
    if context == longest
  }
  spans = [
    (row["from"], row["to"]) for row in record["measured"][0]["positions"]
  ]
  rows = []
  for place, (first, end) in enumerate(spans):
    worth = (
      text.cell(made["positions"][place]["context_worth"] for made in each)
      for each in found.values()
    )
    rows.append((f"{first:,} to {end - 1:,}", *worth))
  head = (
    f"position in windows of {longest:,}: fewer bits per byte than in windows "
    f"of {shortest:,}"
  )
  return (head, *(baselines.LABELS[core] for core in found)), rows


def _draw(record, path):
  lengths = text.lengths(record)
  picture = figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = picture.subplots()
  for (core, context), found in text.alike(record, "core", "context").items():
    text.plot(
      axes,
      lengths,
      [[text.bits(made, n) for made in found] for n in lengths],
      color=_COLOURS[core],
      linestyle=_STYLES[lengths.index(context)],
      marker="o",
      label=text.label(core, context),
    )
  axes.set(xlabel="context read, tokens", ylabel="bits a byte, test split")
  text.number_lengths(axes, lengths)
  axes.grid(alpha=0.3)
  picture.legend(loc="outside right upper", fontsize=9)
  curves.save(picture, path)


STUDY = runs.Study(_plan, text.measure, _table, _draw)
