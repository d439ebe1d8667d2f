"""Recall against distance, beside the layers that the pattern needs for it.

Each core learns to recall a digit, the only one in a window of letters, at many
distances. Nothing but attention can carry it, over as many layers as
`analysis.hops` says. LongNet has three settings: as configured; with one layer,
to which a distance of two hops is closed; and with more phases than heads in
its longest branch, where some distances take a hop more. A model is read at the
distances it has learned, and in windows of twice the length one window further.
"""

import dataclasses
import statistics

import jax
from matplotlib import figure
import numpy as np

from experiments import baselines
from experiments.studies import runs, text
from longnet_jax import analysis, checked
from longnet_jax.data import needle
from longnet_jax.models import transformer
from longnet_jax.training import checkpoint, curves

_WINDOWS = 64  # of each distance


def _plan(config, seeds):
  if config.data.dataset != "needle":
    checked.refuse(
      "data.dataset", config.data.dataset, "needle, as in configs/reach.py"
    )
  model, window = config.model, config.data.window
  *rates, last = model.dilation_rates
  gaps = dict(dilation_rates=(*rates, max(last, 2 * model.num_heads)))
  return [
    runs.make_run(config, core, window, seed, variant, **changes)
    for seed in range(seeds)
    for core, variant, changes in (
      ("dilated", "", {}),
      ("dense", "", {}),
      ("dilated", "one_layer", dict(num_layers=1)),
      ("sparse", "", {}),
      ("dilated", "gaps", gaps),
    )
  ]


def _measure(config, run, workdir):
  runs.train(run, workdir)
  model, params = checkpoint.load_checkpoint(workdir)
  data = run.config.data
  further = dataclasses.replace(
    data,
    window=2 * run.context,
    needle_distances=tuple(d + run.context for d in data.needle_distances),
  )
  read = lambda settings: _recalled(model, params, settings)
  return {
    **runs.describe(run),
    "inside": read(data),
    "beyond": read(further),
  }


def _recalled(model, params, data):
  """Share of digits recalled at each distance, and the hops to it."""
  apply = jax.jit(transformer.LongNetLM(model).apply)
  found = []
  for distance in data.needle_distances:
    only = dataclasses.replace(
      data, needle_distances=(distance,), seed=data.seed + distance
    )
    source = needle.Needle(only, "test")
    batch = source.batch(0, _WINDOWS, shuffled=False)
    logits = apply({"params": params}, batch["tokens"], batch["positions"])
    asked = batch["weights"] > 0
    right = np.argmax(logits, -1)[asked] == batch["targets"][asked]
    target = data.window - 1
    hops = _hops(model, data.window, target - distance + 1, target)
    found.append(
      {"distance": distance, "hops": hops, "recalled": float(right.mean())}
    )
  return found


def _hops(model, length, source, target):
  """Layers that the pattern takes from a key to a query, None if never."""
  if model.attention == "sparse":
    block, summary = model.sparse_block, model.sparse_summary
    is_local = source // block == target // block
    return 1 if is_local or source % block >= block - summary else 2
  pattern = analysis.Pattern(
    length,
    model.num_heads,
    model.segment_lengths,
    model.dilation_rates,
    head_phase=model.head_phase,
  )
  if model.attention == "dense":
    pattern = analysis.dense(pattern)
  return analysis.hops(pattern, source, target)


def _table(record):
  rows = []
  for label, found in _by_model(record).items():
    first = found[0]
    for hops in _hop_counts(first["inside"] + first["beyond"]):
      cells = []
      for place in ("inside", "beyond"):
        shares = [_shares(made[place], hops) for made in found]
        cells += [f"{len(shares[0])}", _percent(shares)]
      rows.append((label, f"{len(found)}", _words(hops), *cells))
  inside = "distances in the trained window", "recalled"
  beyond = "distances beyond it", "recalled"
  return [(("model", "seeds", "to the digit", *inside, *beyond), rows)]


def _draw(record, path):
  found = _by_model(record)
  picture = figure.Figure(figsize=(9, 1 + 1.6 * len(found)), layout="tight")
  panels = picture.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
  for axes, (label, each) in zip(panels, found.items(), strict=True):
    rows = [row for made in each for row in made["inside"] + made["beyond"]]
    for hops in _hop_counts(rows):
      chosen = [row for row in rows if row["hops"] == hops]
      axes.plot(
        [row["distance"] for row in chosen],
        [row["recalled"] for row in chosen],
        "o",
        color=curves.COLOURS[hops or 0],
        label=_words(hops),
      )
    axes.axvline(each[0]["context"], color="grey", linestyle="--")
    axes.axhline(0.1, color="grey", linestyle=":")
    axes.set(ylim=(0, 1.05), ylabel="recalled")
    axes.set_title(label, fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  panels[-1].set_xlabel(
    "distance, tokens; dashed: the trained window, dotted: chance"
  )
  curves.save(picture, path)


def _shares(rows, hops):
  """What is recalled at the distances of so many hops."""
  return [row["recalled"] for row in rows if row["hops"] == hops]


def _percent(shares):
  """The mean over distances and seeds, and half of what seeds differ by."""
  if not shares[0]:
    return ""
  means = [100 * statistics.fmean(each) for each in shares]
  spread = f" ± {(max(means) - min(means)) / 2:.0f}" if means[1:] else ""
  return f"{statistics.fmean(means):.0f}{spread}%"


def _hop_counts(rows):
  """Numbers of hops that occur, and last that none suffices."""
  return sorted({row["hops"] for row in rows}, key=lambda hops: hops or 99)


def _words(hops):
  if hops is None:
    return "never"
  return f"{hops} hop" + "s" * (hops > 1)


def _by_model(record):
  """The runs that differ in their seed alone, by a name of the model."""
  found = {}
  for made in sorted(record["measured"], key=text.core_first):
    gaps = ", gaps" if made["variant"] == "gaps" else ""
    layers = f", {made['layers']} layer" + "s" * (made["layers"] > 1)
    label = baselines.LABELS[made["core"]] + gaps + layers
    found.setdefault(label, []).append(made)
  return found


STUDY = runs.Study(_plan, _measure, _table, _draw)
