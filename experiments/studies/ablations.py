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
  changes = _changes(record, longest)
  rows = []
  for (variant,), each in found.items():
    pairs = each[0]["attention_pairs"] / longest
    scores = (
      text.cell(text.bits(m, n) for m in each) for n in (shortest, longest)
    )
    change = changes.get(variant)
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


def _changes(record, length):
  """Returns variant -> bits per byte more than as configured, of each seed."""
  found = text.alike(record, "variant")
  base = {made["seed"]: text.bits(made, length) for made in found["",]}
  changes = {
    variant: [
      text.bits(made, length) - base[made["seed"]]
      for made in each
      if made["seed"] in base
    ]
    for (variant,), each in found.items()
    if variant
  }
  return {variant: change for variant, change in changes.items() if change}


def _draw(record, path):
  longest = text.lengths(record)[-1]
  changes = _changes(record, longest)
  picture = figure.Figure(figsize=(7, 3.5), layout="constrained")
  axes = picture.subplots()
  axes.axvline(0, color="k", linewidth=1)
  for place, change in enumerate(changes.values()):
    axes.plot(change, [place] * len(change), "o", color=curves.COLOURS[1])
  axes.set_yticks(range(len(changes)), [_NAMES[name] for name in changes])
  axes.invert_yaxis()
  axes.set_xlabel(f"change in bits a byte at {longest:,}; a dot a seed")
  axes.grid(alpha=0.3)
  curves.save(picture, path)


STUDY = runs.Study(_plan, text.measure, _table, _draw)
