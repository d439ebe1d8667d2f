"""Pictures of the attention pattern: branches, heads, union and reach.

Rows are queries and columns are keys, as in figures 2 and 3 of
arXiv 2307.02486. Every function returns a matplotlib Figure and, given a path,
writes it there; patterns are drawn pair by pair, so keep them small.
"""

import os

import matplotlib
from matplotlib import colors as mpl_colors
from matplotlib import figure as mpl_figure
from matplotlib import patches, ticker
import numpy as np

from longnet_jax import checked
from longnet_jax import pattern as pattern_lib
from longnet_jax.analysis import masks as masks_lib
from longnet_jax.analysis import reach

_LARGEST = 512  # positions; beyond it pictures become very large
_OUTLINED = 40  # positions up to which cells are told apart by white lines
_DPI = 160
_CELL = 2 / _DPI  # inches, at least: narrower cells drop out or beat
_UNREAD = "#f4f4f4"
_FUTURE = "#d9d9d9"
# Okabe and Ito's: colour-blind readers tell them apart too. Their yellow, pale
# beside the background, is left out.
_PALETTE = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#d55e00",
  "#000000",
)


def draw_branches(
  pattern: pattern_lib.Pattern,
  path: str | os.PathLike | None = None,
  *,
  head: int = 0,
) -> mpl_figure.Figure:
  """Draws each branch of one head, then their union, as the paper's figure 2.

  A pair that several branches read has the colour of the first of them.
  """
  _check(pattern)
  pattern_lib.index("head", head, pattern.num_heads)
  figure, panels = _panels(len(pattern.branches) + 1, pattern.length)
  _draw_branch_panels(panels, pattern, head)
  figure.suptitle(f"Branches of head {head}: {_setting(pattern)}")
  return _finish(figure, path)


def draw_heads(
  pattern: pattern_lib.Pattern,
  path: str | os.PathLike | None = None,
  *,
  branch: int = 0,
) -> mpl_figure.Figure:
  """Draws each head of one branch, then their union, as the paper's figure 3.

  A pair that several heads read has the colour of the first of them.
  """
  _check(pattern)
  pattern_lib.index("branch", branch, len(pattern.branches))
  width, rate = pattern.branches[branch]
  masks = [
    masks_lib.branch_mask(pattern, branch, head)
    for head in range(pattern.num_heads)
  ]
  figure, panels = _panels(len(masks) + 1, pattern.length)
  for head, mask in enumerate(masks):
    offset = pattern_lib.phase(pattern, rate, head)
    alone = np.where(mask, head + 1, 0)
    _show_owners(panels[head], pattern, alone, f"head {head}, phase {offset}")
  _show_owners(panels[-1], pattern, _owners(masks), "all heads")
  figure.suptitle(
    f"Heads of the branch w = {width}, r = {rate} ({pattern.head_phase} phases)"
  )
  return _finish(figure, path)


def draw_union(
  pattern: pattern_lib.Pattern, path: str | os.PathLike | None = None
) -> mpl_figure.Figure:
  """Draws how many (branch, head) read each pair."""
  _check(pattern)
  counts = masks_lib.multiplicity(pattern)
  return _draw_levels(
    pattern,
    np.where(counts, counts, -1),
    "branches x heads that read a pair",
    path,
  )


def draw_reach(
  pattern: pattern_lib.Pattern, path: str | os.PathLike | None = None
) -> mpl_figure.Figure:
  """Draws after how many layers a query has heard of each key."""
  _check(pattern)
  keys = range(pattern.length)
  layers = np.stack([reach.hops_from(pattern, key) for key in keys], axis=1)
  return _draw_levels(
    pattern, layers, "layers from key to query (blank: never)", path
  )


def draw_overview(path: str | os.PathLike) -> mpl_figure.Figure:
  """Draws LongNet in one picture: branches, their union, and the other heads.

  Upper row: three branches of one head and their union. Lower row: the same
  union of the other heads, each shifted by its phase, and all heads together.
  """
  pattern = pattern_lib.Pattern(32, 4, (8, 16, 32), (1, 2, 4))
  figure, panels = _panels(8, pattern.length, columns=4)
  _draw_branch_panels(panels[:4], pattern, head=0)
  unions = [_branch_owners(pattern, head) for head in range(pattern.num_heads)]
  for head in range(1, pattern.num_heads):
    _show_owners(panels[3 + head], pattern, unions[head], f"head {head}, union")
  everything = _owners(
    [
      np.any([union == branch + 1 for union in unions], axis=0)
      for branch in range(len(pattern.branches))
    ]
  )
  _show_owners(panels[-1], pattern, everything, "all heads, union")
  figure.suptitle(
    "Dilated attention: near tokens densely, far tokens sparsely, "
    "each head shifted"
  )
  figure.legend(
    handles=[
      patches.Patch(color=_color(branch), label=f"w = {width}, r = {rate}")
      for branch, (width, rate) in enumerate(pattern.branches)
    ]
    + [patches.Patch(color=_FUTURE, label="future: never read")],
    loc="outside lower center",
    ncols=len(pattern.branches) + 1,
    frameon=False,
  )
  return _finish(figure, path)


def _draw_branch_panels(panels, pattern, head):
  """Fills one panel a branch and a last one with their union."""
  for branch, (width, rate) in enumerate(pattern.branches):
    mask = masks_lib.branch_mask(pattern, branch, head)
    title = f"head {head}, w = {width}, r = {rate}"
    _show_owners(panels[branch], pattern, np.where(mask, branch + 1, 0), title)
  owners = _branch_owners(pattern, head)
  _show_owners(panels[-1], pattern, owners, f"head {head}, union")


def _branch_owners(pattern, head):
  """Returns 1 + the first branch with which a head reads each pair, or 0."""
  return _owners(
    [
      masks_lib.branch_mask(pattern, branch, head)
      for branch in range(len(pattern.branches))
    ]
  )


def _owners(masks):
  """Returns 1 + the index of the first mask that holds, 0 where none does."""
  return np.where(np.any(masks, axis=0), np.argmax(masks, axis=0) + 1, 0)


def _show_owners(axes, pattern, owners, title):
  """Draws 0 as unread and i as colour i - 1, and the future in grey."""
  colors = [_UNREAD, *map(_color, range(owners.max()))]
  image = np.array([mpl_colors.to_rgb(color) for color in colors])[owners]
  _show(axes, pattern, image)
  axes.set_title(title, fontsize=10)


def _show(axes, pattern, image, **style):
  """Draws an (N, N) or (N, N, 3) image of [query, key] with its axes."""
  n = pattern.length
  drawn = axes.imshow(image, interpolation="nearest", **style)
  if pattern.is_causal:
    future = np.zeros((n, n, 4))
    future[np.triu_indices(n, 1)] = mpl_colors.to_rgba(_FUTURE)
    axes.imshow(future, interpolation="nearest")
  if n <= _OUTLINED:
    edges = np.arange(n + 1) - 0.5
    axes.hlines(edges, -0.5, n - 0.5, color="white", linewidth=0.5)
    axes.vlines(edges, -0.5, n - 0.5, color="white", linewidth=0.5)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(5, integer=True, min_n_ticks=1))
  axes.set(xlabel="key position", ylabel="query position")
  axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
  axes.spines[:].set_visible(False)
  return drawn


def _draw_levels(pattern, levels, label, path):
  """Draws an integer a pair, -1 for none, with a scale beside it."""
  side = max(4.7, pattern.length * _CELL)
  figure = mpl_figure.Figure(
    figsize=(side + 1.7, side + 0.9), layout="constrained"
  )
  axes = figure.add_subplot()
  low, high = levels[levels >= 0].min(initial=1), levels.max(initial=1)
  steps = high - low + 1
  palette = matplotlib.colormaps["viridis_r"].resampled(steps)
  palette = palette.with_extremes(bad=_UNREAD)
  drawn = _show(
    axes,
    pattern,
    np.ma.masked_less(levels, 0),
    cmap=palette,
    vmin=low - 0.5,
    vmax=low + steps - 0.5,
  )
  scale = figure.colorbar(drawn, ax=axes, label=label, shrink=0.85)
  scale.locator = ticker.MaxNLocator(10, integer=True, min_n_ticks=1)
  scale.update_ticks()
  axes.set_title(_setting(pattern), fontsize=10)
  return _finish(figure, path)


def _panels(count, length, columns=None):
  """Returns a figure and `count` square axes, at most five in a row."""
  rows = -(-count // (columns or 5))
  columns = columns or -(-count // rows)
  side = max(2.1, length * _CELL)
  figure = mpl_figure.Figure(
    figsize=((side + 0.6) * columns, (side + 0.85) * rows + 0.6),
    layout="constrained",
  )
  grid = figure.subplots(rows, columns, squeeze=False).flat
  for axes in grid[count:]:
    axes.remove()
  return figure, grid[:count]


def _color(index):
  return _PALETTE[index % len(_PALETTE)]


def _setting(pattern):
  """Names a setting in one line."""
  branches = ", ".join(f"({w}, {r})" for w, r in pattern.branches)
  heads = "1 head" if pattern.num_heads == 1 else f"{pattern.num_heads} heads"
  return f"(w, r) = {branches}; {heads}"


def _finish(figure, path):
  if path is not None:
    figure.savefig(path, dpi=_DPI)
  return figure


def _check(pattern):
  if pattern.length > _LARGEST:
    raise checked.RefusedError(
      f"length is {pattern.length}: pictures hold up to {_LARGEST} positions;"
      " draw a smaller pattern with the same proportions"
    )
