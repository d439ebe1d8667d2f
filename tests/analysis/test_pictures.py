from matplotlib import image as mpl_image
import numpy as np
import pytest

from longnet_jax import analysis
from longnet_jax.analysis import masks, pictures

PATTERN = analysis.Pattern(12, 3, (4, 12), (1, 3))
DRAWINGS = {
  "branches": analysis.draw_branches,
  "heads": analysis.draw_heads,
  "union": analysis.draw_union,
  "reach": analysis.draw_reach,
}


def cells(axes):
  """Returns the image under the axes' first layer."""
  return np.asarray(axes.images[0].get_array())


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_written(name, tmp_path):
  path = tmp_path / f"{name}.png"
  DRAWINGS[name](PATTERN, path)
  pixels = mpl_image.imread(path)
  assert min(pixels.shape[:2]) > 400
  colors = np.unique(pixels[..., :3].reshape(-1, 3), axis=0)
  assert len(colors) > 10
  background = np.all(pixels[..., :3] == 1, axis=-1)
  assert 0.1 < background.mean() < 0.8


def test_a_notebook_shows_a_picture(tmp_path):
  analysis.draw_branches(PATTERN, tmp_path / "branches.png")
  written = (tmp_path / "branches.png").read_bytes()
  assert analysis.draw_branches(PATTERN)._repr_png_() == written


def test_the_overview_is_written(tmp_path):
  path = tmp_path / "overview.png"
  figure = analysis.draw_overview(path=path)
  assert len(figure.axes) == 8
  titles = [axes.get_title() for axes in figure.axes]
  assert titles[1] == "head 0, w = 16, r = 2"
  assert mpl_image.imread(path)[..., :3].std() > 0.1


def test_the_overview_shows_a_setting():
  figure = analysis.draw_overview(PATTERN)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == [
    "head 0, w = 4, r = 1",
    "head 0, w = 12, r = 3",
    "head 0, union",
    "head 1, union",
    "head 2, union",
    "all heads, union",
  ]
  alone = analysis.draw_overview(analysis.Pattern(8, 1, (8,), (1,)))
  assert len(alone.axes) == 3


def test_a_million_positions_are_drawn_by_blocks(tmp_path):
  pattern = analysis.Pattern(2**20, 4, (2**14, 2**20), (1, 4))
  (axes,) = analysis.draw_branches(pattern).axes[:1]
  shown = np.any(cells(axes) != cells(axes)[-1, 0], axis=-1)
  np.testing.assert_array_equal(
    shown, masks.branch_mask(pattern, 0, 0, block=4096)
  )
  assert axes.get_xlim() == (-0.5, 2**20 - 0.5)
  assert (
    "a cell is 4,096 x 4,096" in analysis.draw_heads(pattern).get_suptitle()
  )
  assert len(analysis.draw_overview(pattern).axes) == 6
  path = tmp_path / "union.png"
  union = analysis.draw_union(pattern, path).axes[0].images[0].get_array()
  assert union[-1, 0] == 1 / 4  # four heads, of each a 16th
  assert mpl_image.imread(path)[..., :3].std() > 0.1


def test_the_reach_of_blocks_is_drawn():
  pattern = analysis.Pattern(1024, 2, (64, 512), (1, 2))
  layers = analysis.draw_reach(pattern).axes[0].images[0].get_array()
  np.testing.assert_array_equal(
    layers.filled(-1), masks.block_layers(pattern, 4)
  )
  assert np.all(layers.filled(-1)[128:, :128] == -1)
  assert 2 in layers.filled(-1)


def test_heads_show_the_most_dilated_branch():
  assert "w = 12, r = 3" in analysis.draw_heads(PATTERN).get_suptitle()


def test_panels_show_the_masks():
  figure = analysis.draw_heads(PATTERN, branch=1)
  assert len(figure.axes) == PATTERN.num_heads + 1
  assert "w = 12, r = 3" in figure.get_suptitle()
  for head, axes in enumerate(figure.axes[:-1]):
    shown = np.any(cells(axes) != cells(axes)[0, -1], axis=-1)
    mask = masks.branch_mask(PATTERN, 1, head)
    np.testing.assert_array_equal(shown, mask)
    assert axes.get_xlabel() == "key position"
    assert axes.get_ylabel() == "query position"


def test_the_union_shows_counts_and_reach_shows_layers():
  union = analysis.draw_union(PATTERN).axes[0].images[0].get_array()
  counts = masks.multiplicity(PATTERN)
  np.testing.assert_array_equal(union.filled(0), counts)
  layers = analysis.draw_reach(PATTERN).axes[0].images[0].get_array()
  for key in range(PATTERN.length):
    expected = analysis.hops_from(PATTERN, key)
    np.testing.assert_array_equal(layers.filled(-1)[:, key], expected)


def test_heads_that_read_nothing_are_drawn():
  pattern = analysis.Pattern(2, 3, (1,), (5,))
  union = analysis.draw_union(pattern).axes[0].images[0].get_array()
  np.testing.assert_array_equal(union.filled(0), np.eye(2))  # head 0 alone
  # A panel for each head and one for all of them.
  assert len(analysis.draw_heads(pattern).axes) == 4


def test_every_cell_of_the_largest_pattern_has_pixels():
  pattern = analysis.Pattern(512, 1, (512,), (12,))
  for figure in (analysis.draw_branches(pattern), analysis.draw_union(pattern)):
    figure.draw_without_rendering()
    width = figure.axes[0].get_window_extent().width / figure.dpi
    assert width * pictures._DPI > 1.8 * pattern.length


def test_a_single_position_has_whole_numbers_on_its_axes():
  axes, scale = analysis.draw_union(analysis.Pattern(1, 1, (1,), (1,))).axes
  assert [t for t in axes.get_xticks() if -0.5 <= t <= 0.5] == [0]
  assert [t for t in scale.get_yticks() if 0.5 <= t <= 1.5] == [1]


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match="length is 8388608: reach"):
    analysis.draw_reach(analysis.Pattern(2**23, 1, (8,), (1,)))
  with pytest.raises(ValueError, match="head is 3"):
    analysis.draw_branches(PATTERN, head=3)
  with pytest.raises(ValueError, match="branch is 2"):
    analysis.draw_heads(PATTERN, branch=2)
