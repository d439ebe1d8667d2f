"""Pictures of the attention pattern: branches, heads, union and reach.

Rows are queries and columns are keys, as in figures 2 and 3 of
arXiv 2307.02486. Every function returns a matplotlib Figure, which a notebook
shows, and, given a path, writes it there. Up to 512 positions are drawn pair by
pair, others block by block: a cell is coloured where any of its pairs is read.
"""

import io
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

_LARGEST = 512  # positions drawn one by one; beyond it pictures become large
_CELLS = 256  # blocks that stand for more positions, at most
_LONGEST_WALK = 1 << 22  # positions that are followed in seconds
_OUTLINED = 40  # positions up to which cells are told apart by white lines
_DPI = 160
_CELL = 2 / _DPI  # inches, at least: narrower cells drop out or beat
_ANY = ", coloured where any pair is read"
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


class _Figure(mpl_figure.Figure):
  """One that notebooks show though nobody has imported pyplot."""

  def __init__(self, figsize):
    super().__init__(figsize, dpi=_DPI, layout="constrained")

  def _repr_png_(self):
    image = io.BytesIO()
    self.savefig(image, dpi=_DPI)
    return image.getvalue()


def draw_branches(
  pattern: pattern_lib.Pattern,
  path: str | os.PathLike | None = None,
  *,
  head: int = 0,
) -> mpl_figure.Figure:
  """Draws each branch of one head, then their union, as the paper's figure 2.

  A pair that several branches read has the colour of the first of them.
  """
  pattern_lib.index("head", head, pattern.num_heads)
  figure, panels = _panels(len(pattern.branches) + 1, pattern)
  _draw_branch_panels(panels, pattern, head)
  title = f"Branches of head {head}: {_setting(pattern)}"
  figure.suptitle(title + _cell_note(pattern, _ANY))
  return _finish(figure, path)


def draw_heads(
  pattern: pattern_lib.Pattern,
  path: str | os.PathLike | None = None,
  *,
  branch: int | None = None,
) -> mpl_figure.Figure:
  """Draws each head of one branch, then their union, as the paper's figure 3.

  A pair that several heads read has the colour of the first of them. The
  branch is by default the one that is dilated most.
  """
  if branch is None:
    branch = int(np.argmax(pattern.dilation_rates))
  pattern_lib.index("branch", branch, len(pattern.branches))
  width, rate = pattern.branches[branch]
  masks = [_mask(pattern, branch, h) for h in range(pattern.num_heads)]
  figure, panels = _panels(len(masks) + 1, pattern)
  for head, mask in enumerate(masks):
    offset = pattern_lib.phase(pattern, rate, head)
    alone = np.where(mask, head + 1, 0)
    _show_owners(panels[head], pattern, alone, f"head {head}, phase {offset}")
  _show_owners(panels[-1], pattern, _owners(masks), "all heads")
  figure.suptitle(
    f"Heads of the branch w = {width:,}, r = {rate:,} ({pattern.head_phase} "
    f"phases){_cell_note(pattern, _ANY)}"
  )
  return _finish(figure, path)


def draw_union(
  pattern: pattern_lib.Pattern, path: str | os.PathLike | None = None
) -> mpl_figure.Figure:
  """Draws how many (branch, head) read each pair, in blocks on average."""
  label, block = "branches x heads that read a pair", _block(pattern)
  counts = masks_lib.multiplicity(pattern, block)
  if block == 1:
    return _draw_levels(pattern, np.where(counts, counts, -1), label, path)
  mean = counts / np.maximum(masks_lib.cell_pairs(pattern, block), 1)
  image = np.ma.masked_less_equal(mean, 0)
  return _draw_image(
    pattern,
    image,
    f"{label}, on average (blank: none)",
    path,
    cmap=matplotlib.colormaps["viridis_r"].with_extremes(bad=_UNREAD),
    norm=mpl_colors.LogNorm(image.min(), max(image.max(), 1)),
  )


def draw_reach(
  pattern: pattern_lib.Pattern, path: str | os.PathLike | None = None
) -> mpl_figure.Figure:
  """Draws after how many layers a query has heard of each key.

  Of blocks after how many half of their pairs are connected, in a sample; it is
  refused where following that would take minutes.
  """
  block = _block(pattern)
  if block == 1:
    keys = range(pattern.length)
    layers = np.stack([reach.hops_from(pattern, key) for key in keys], axis=1)
    label = "layers from key to query (blank: never)"
  elif pattern.length > _LONGEST_WALK:
    raise checked.RefusedError(
      f"length is {pattern.length}: reach is followed through up to "
      f"{_LONGEST_WALK} positions; draw a smaller pattern with the same "
      "proportions"
    )
  else:
    layers = masks_lib.block_layers(pattern, block)
    label = "layers that connect half of the pairs of a cell (blank: never)"
  return _draw_levels(pattern, layers, label, path)


def draw_overview(
  pattern: pattern_lib.Pattern | None = None,
  path: str | os.PathLike | None = None,
) -> mpl_figure.Figure:
  """Draws a setting in one picture: branches, their union, and other heads.

  Upper row: the branches of one head and their union. Lower row: the same union
  of other heads, as many as fit, each shifted by its phase, and of all heads.
  By default the setting is LongNet in small.
  """
  if pattern is None:
    pattern = pattern_lib.Pattern(32, 4, (8, 16, 32), (1, 2, 4))
  count = len(pattern.branches)
  others = range(1, min(pattern.num_heads, count + 1))
  figure, panels = _panels(count + 2 + len(others), pattern, columns=count + 1)
  _draw_branch_panels(panels[: count + 1], pattern, head=0)
  for panel, head in enumerate(others, count + 1):
    owners = _branch_owners(pattern, head)
    _show_owners(panels[panel], pattern, owners, f"head {head}, union")
  everything = _owners(
    [
      np.any(
        [_mask(pattern, b, head) for head in range(pattern.num_heads)], axis=0
      )
      for b in range(count)
    ]
  )
  _show_owners(panels[-1], pattern, everything, "all heads, union")
  figure.suptitle(
    "Dilated attention: near tokens densely, far tokens sparsely, "
    f"each head shifted{_cell_note(pattern, _ANY)}"
  )
  handles = [
    patches.Patch(color=_color(branch), label=f"w = {width:,}, r = {rate:,}")
    for branch, (width, rate) in enumerate(pattern.branches)
  ]
  if pattern.is_causal:
    handles.append(patches.Patch(color=_FUTURE, label="future: never read"))
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=min(len(handles), 6),
    frameon=False,
  )
  return _finish(figure, path)


def _draw_branch_panels(panels, pattern, head):
  """Fills one panel a branch and a last one with their union."""
  for branch, (width, rate) in enumerate(pattern.branches):
    mask = _mask(pattern, branch, head)
    title = f"head {head}, w = {width:,}, r = {rate:,}"
    _show_owners(panels[branch], pattern, np.where(mask, branch + 1, 0), title)
  owners = _branch_owners(pattern, head)
  _show_owners(panels[-1], pattern, owners, f"head {head}, union")


def _branch_owners(pattern, head):
  """Returns 1 + the first branch with which a head reads each pair, or 0."""
  return _owners(
    [_mask(pattern, branch, head) for branch in range(len(pattern.branches))]
  )


def _mask(pattern, branch, head):
  """Returns which pairs a head reads, or of which blocks any."""
  return masks_lib.branch_mask(pattern, branch, head, _block(pattern))


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
  """Draws an (n, n) or (n, n, 3) image of [query, key] with its axes."""
  n, block = len(image), _block(pattern)
  end = n * block - 0.5
  style |= dict(interpolation="nearest", extent=(-0.5, end, end, -0.5))
  drawn = axes.imshow(image, **style)
  if pattern.is_causal:
    future = np.zeros((n, n, 4))
    future[np.triu_indices(n, 1)] = mpl_colors.to_rgba(_FUTURE)
    axes.imshow(
      future, interpolation=style["interpolation"], extent=style["extent"]
    )
  if n <= _OUTLINED:
    edges = np.arange(n + 1) - 0.5
    axes.hlines(edges, -0.5, n - 0.5, color="white", linewidth=0.5)
    axes.vlines(edges, -0.5, n - 0.5, color="white", linewidth=0.5)
  bins = 5 if block == 1 else 3  # their labels are longer
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(
      ticker.MaxNLocator(bins, integer=True, min_n_ticks=1)
    )
    axis.set_major_formatter("{x:,.0f}")
  axes.set(xlabel="key position", ylabel="query position")
  last = pattern.length - 0.5
  axes.set(xlim=(-0.5, last), ylim=(last, -0.5))
  axes.spines[:].set_visible(False)
  return drawn


def _draw_levels(pattern, levels, label, path):
  """Draws an integer a cell, -1 for none, with a scale beside it."""
  low, high = levels[levels >= 0].min(initial=1), levels.max(initial=1)
  steps = high - low + 1
  palette = matplotlib.colormaps["viridis_r"].resampled(steps)
  return _draw_image(
    pattern,
    np.ma.masked_less(levels, 0),
    label,
    path,
    ticks=ticker.MaxNLocator(10, integer=True, min_n_ticks=1),
    cmap=palette.with_extremes(bad=_UNREAD),
    vmin=low - 0.5,
    vmax=low + steps - 0.5,
  )


def _draw_image(pattern, image, label, path, *, ticks=None, **style):
  """Draws a number a cell with a scale beside it."""
  side = max(4.7, len(image) * _CELL)
  figure = _Figure((side + 1.7, side + 0.9))
  axes = figure.add_subplot()
  drawn = _show(axes, pattern, image, **style)
  scale = figure.colorbar(drawn, ax=axes, label=label, shrink=0.85)
  if ticks is not None:
    scale.locator = ticks
    scale.update_ticks()
  axes.set_title(_setting(pattern) + _cell_note(pattern), fontsize=10)
  return _finish(figure, path)


def _panels(count, pattern, columns=None):
  """Returns a figure and `count` square axes, at most five in a row.

  With a number of columns there is room for a legend.
  """
  rows = -(-count // (columns or 5))
  around = 0.6 if columns else 0.25
  columns = columns or -(-count // rows)
  side = max(2.1, -(-pattern.length // _block(pattern)) * _CELL)
  figure = _Figure(((side + 0.6) * columns, (side + 0.85) * rows + around))
  grid = figure.subplots(rows, columns, squeeze=False).flat
  for axes in grid[count:]:
    axes.remove()
  return figure, grid[:count]


def _color(index):
  return _PALETTE[index % len(_PALETTE)]


def _setting(pattern):
  """Names a setting in one line."""
  branches = ", ".join(f"({w:,}, {r:,})" for w, r in pattern.branches)
  heads = "1 head" if pattern.num_heads == 1 else f"{pattern.num_heads} heads"
  return f"(w, r) = {branches}; {heads}"


def _finish(figure, path):
  if path is not None:
    figure.savefig(path, dpi=_DPI)
  return figure


def _block(pattern):
  """Returns the positions of a cell's side: 1, or a power of two."""
  if pattern.length <= _LARGEST:
    return 1
  return 1 << (-(-pattern.length // _CELLS) - 1).bit_length()


def _cell_note(pattern, meaning=""):
  """Says what a cell is where it is no pair, and what its colour means."""
  block = _block(pattern)
  if block == 1:
    return ""
  return f"\na cell is {block:,} x {block:,} positions{meaning}"
