"""LongNet at the longest context with one of its parts changed.

The gradient through the mixing weights (exact, or detached as in torchscale),
the phases of heads (interleaved, or blocked), the positions (xPos, or RoPE) and
the branches: one, which is local, and six with the FLOPs of the config's, and
some whose last one has more phases than there are heads, so that none reads
half of its rows.
"""

from matplotlib import figure

from experiments.studies import runs, text
from longnet_jax.training import curves

# Segments as 64ths of the window, and rates. Four heads score as many pairs, to
# 5%, as with (4, 16, 64) at the rates (1, 2, 4).
_BRANCHES = {
  "one_branch": ((12,), (1,)),
  "six_branches": ((2, 4, 8, 16, 32, 64), (1, 2, 2, 4, 4, 4)),
  "gaps": ((7, 16, 64), (1, 2, 8)),
}
_CHANGES = {
  "": {},
  "detached": dict(mixing_gradient=False),
  "blocked": dict(head_phase="blocked"),
  "rope": dict(position="rope"),
}
_NAMES = {
  "": "LongNet as configured",
  "detached": "gradient of the mixing weights detached",
  "blocked": "blocked phases",
  "rope": "RoPE in place of xPos",
  "one_branch": "one branch, local",
  "six_branches": "six branches",
  "gaps": "gaps: rate of the last branch 8",
}


def variants(window: int) -> dict[str, dict]:
  """Settings of the model that each variant changes."""
  return _CHANGES | {
    name: dict(
      segment_lengths=tuple(window * part // 64 for part in parts),
      dilation_rates=rates,
    )
    for name, (parts, rates) in _BRANCHES.items()
  }


def _plan(config, seeds):
  window = config.data.window
  return [
    runs.make_run(config, "dilated", window, seed, name, **changes)
    for name, changes in variants(window).items()
    for seed in range(seeds)
  ]


def _table(record):
  shortest, *_, longest = text.lengths(record)
  found = text.alike(record, "variant")
  base = {made["seed"]: made for made in found["",]}
  rows = []
  for (variant,), each in found.items():
    pairs = each[0]["attention_pairs"] / longest
    scores = (
      text.cell(text.bits(m, n) for m in each) for n in (shortest, longest)
    )
    change = [
      text.bits(made, longest) - text.bits(base[made["seed"]], longest)
      for made in each
      if variant and made["seed"] in base
    ]
    rows.append(
      (
        _NAMES[variant],
        f"{len(each)}",
        f"{pairs:.0f}",
        *scores,
        text.cell(change) if change else "",
      )
    )
  head = ("LongNet", "seeds", "pairs a token", f"bits per byte at {shortest:,}")
  return [((*head, f"at {longest:,}", "change, seed by seed"), rows)]


def _draw(record, path):
  longest = text.lengths(record)[-1]
  found = text.alike(record, "variant")
  picture = figure.Figure(figsize=(7, 3.5), layout="constrained")
  axes = picture.subplots()
  for place, ((variant,), each) in enumerate(found.items()):
    scores = [text.bits(made, longest) for made in each]
    colour = curves.COLOURS[1 if variant else 0]
    axes.plot(scores, [place] * len(scores), "o", color=colour)
  axes.set_yticks(range(len(found)), [_NAMES[variant] for (variant,) in found])
  axes.invert_yaxis()
  axes.set_xlabel(f"bits a byte at {longest:,}, test split; a dot a seed")
  axes.grid(alpha=0.3)
  curves.save(picture, path)


STUDY = runs.Study(_plan, text.measure, _table, _draw)
