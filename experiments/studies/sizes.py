"""LongNet at three sizes: loss against parameters, and against the prompt.

The paper's Figure 7, at the longest context. Widths are half, all and twice
that of the config.
"""

from matplotlib import figure

from experiments.studies import runs, text
from longnet_jax.training import curves


def _plan(config, seeds):
  model, window = config.model, config.data.window
  found = []
  for seed in range(seeds):
    for width in (model.model_dim, model.model_dim // 2, 2 * model.model_dim):
      changes = dict(
        model_dim=width, ffn_dim=model.ffn_dim * width // model.model_dim
      )
      variant = "" if width == model.model_dim else f"width{width}"
      found.append(
        runs.make_run(config, "dilated", window, seed, variant, **changes)
      )
  return found


def _table(record):
  lengths = text.lengths(record)
  rows = []
  for (width, parameters), found in _by_size(record).items():
    scores = (text.cell(text.bits(m, n) for m in found) for n in lengths)
    rows.append((f"{width}", f"{parameters:,}", f"{len(found)}", *scores))
  head = ("width of LongNet", "parameters", "seeds")
  return [(head + tuple(f"bits per byte at {n:,}" for n in lengths), rows)]


def _draw(record, path):
  lengths, found = text.lengths(record), _by_size(record)
  shortest, *_, longest = lengths
  picture = figure.Figure(figsize=(10, 4), layout="constrained")
  by_size, by_prompt = picture.subplots(1, 2)
  at_longest = [[text.bits(m, longest) for m in f] for f in found.values()]
  places = [parameters for _, parameters in found]
  text.plot(by_size, places, at_longest, color="k", marker="o")
  for ((width, _), each), colour in zip(
    found.items(), curves.colours(len(found)), strict=True
  ):
    series = [
      [text.bits(m, n) - text.bits(m, shortest) for m in each] for n in lengths
    ]
    style = dict(color=colour, marker="o", label=f"width {width}")
    text.plot(by_prompt, lengths, series, **style)
  by_size.set(xlabel="parameters", ylabel="bits a byte, test split")
  by_size.set_xscale("log")
  by_size.set_xticks(places, [f"{place:,}" for place in places], minor=False)
  by_size.set_xticks([], minor=True)
  by_prompt.set(
    xlabel="prompt, tokens", ylabel=f"bits a byte more than at {shortest:,}"
  )
  text.number_lengths(by_prompt, lengths)
  by_prompt.legend()
  for axes in (by_size, by_prompt):
    axes.grid(alpha=0.3)
  curves.save(picture, path)


def _by_size(record):
  return dict(sorted(text.alike(record, "width", "parameters").items()))


STUDY = runs.Study(_plan, text.measure, _table, _draw)
