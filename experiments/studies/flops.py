"""Loss against the FLOPs of training as the context grows: Figure 6.

Dense attention and LongNet at each context, with equal tokens in all. Each is
scored at the context it was trained on.
"""

from matplotlib import figure

from experiments import baselines
from experiments.studies import runs, text
from longnet_jax.training import curves


def _plan(config, seeds):
  contexts = runs.contexts(config)
  # The ends first.
  order = [contexts[0], contexts[-1], *contexts[1:-1]]
  return [
    runs.make_run(config, core, context, seed)
    for seed in range(seeds)
    for context in order
    for core in ("dilated", "dense")
  ]


def _table(record):
  rows = []
  for (core, context), found in text.alike(record, "core", "context").items():
    flops = found[0]["train_flops"]
    rows.append(
      (
        text.label(core, context),
        f"{len(found)}",
        f"{flops / 1e12:.2f}",
        f"{found[0]['attention_flops'] / flops:.0%}",
        text.cell(text.bits(made, context) for made in found),
      )
    )
  head = ("model", "seeds", "TFLOP of training", "of it attention")
  return [((*head, "bits per byte, test split"), rows)]


def _draw(record, path):
  picture = figure.Figure(figsize=(6, 4.5), layout="constrained")
  axes = picture.subplots()
  found = text.alike(record, "core", "context")
  cores = sorted({core for core, _ in found})
  for core, colour in zip(cores, curves.colours(len(cores)), strict=True):
    made = {n: each for (c, n), each in found.items() if c == core}
    flops = [each[0]["train_flops"] / 1e12 for each in made.values()]
    series = [[text.bits(m, n) for m in each] for n, each in made.items()]
    style = dict(color=colour, marker="o", label=baselines.LABELS[core])
    text.plot(axes, flops, series, **style)
    for place, values, context in zip(flops, series, made, strict=True):
      offset = dict(xytext=(6, -3), textcoords="offset points", fontsize=8)
      mean = sum(values) / len(values)
      axes.annotate(f"{context:,}", (place, mean), **offset)
  axes.set(xlabel="TFLOP of training", ylabel="bits a byte, test split")
  axes.grid(alpha=0.3)
  axes.margins(0.1)
  axes.legend(title="trained and read at")
  curves.save(picture, path)


STUDY = runs.Study(_plan, text.measure, _table, _draw)
