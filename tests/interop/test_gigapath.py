"""Prov-GigaPath's slide encoder: same outputs, sizes read from tensors."""

import pathlib

import jax
import numpy as np
import pytest

from longnet_jax import checked, interop
from longnet_jax.interop import gigapath, golden, torchscale
from longnet_jax.models import slide_encoder

_PTH = pathlib.Path(__file__).parent.parent / "golden" / "gigapath_small.pth"


@pytest.fixture(scope="module")
def small(read_golden):
  _, config, arrays = read_golden("gigapath_small")
  return (*gigapath.convert(interop.read_pth(_PTH), config), arrays)


def test_both_pools_and_all_layers_match(small):
  errors = golden.compare(*small)
  assert sorted(errors) == ["all_layers_cls", "cls", "pooled"]
  assert max(errors.values()) < 1e-5


def test_padded_batches_match_too(small):
  config, params, arrays = small
  count = arrays["tiles"].shape[1]
  extra = ((0, 0), (0, 26), (0, 0))
  apply = jax.jit(slide_encoder.SlideEncoder(config).apply)
  found = apply(
    {"params": params},
    np.pad(arrays["tiles"], extra, constant_values=9),
    np.pad(arrays["coords"], extra),
    np.array([count, count]),
  )
  expected = arrays["cls"]
  error = np.abs(found - expected).max() / np.abs(expected).max()
  assert error < 1e-5


def test_there_and_back_is_the_identity(small):
  config, params, _ = small
  state = interop.read_pth(_PTH)
  again = gigapath.export(config, params)
  assert again.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(again[name], array)


def _random_state(depth, width, channels=1536):
  """A state of the right shapes whose pages are never touched."""
  config = slide_encoder.SlideEncoderConfig(
    num_layers=depth,
    model_dim=width,
    num_heads=16,
    ffn_dim=4 * width,
    segment_lengths=(1024,),
    dilation_rates=(1,),
    tile_dim=channels,
  )
  names = {}
  layer = {
    **{f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")},
    "self_attn.inner_attn_ln": (width,),
    "self_attn_layer_norm": (width,),
    "ffn.fc1": (4 * width, width),
    "ffn.fc2": (width, 4 * width),
    "ffn.ffn_layernorm": (4 * width,),
    "final_layer_norm": (width,),
  }
  for i in range(depth):
    names |= {f"encoder.layers.{i}.{k}": shape for k, shape in layer.items()}
  names |= {
    "patch_embed.proj": (width, channels),
    "encoder.layer_norm": (width,),
    "norm": (width,),
  }
  state = {"cls_token": np.zeros((1, 1, width), np.float32)}
  for name, shape in names.items():
    state[f"{name}.weight"] = np.zeros(shape, np.float32)
    state[f"{name}.bias"] = np.zeros(shape[:1], np.float32)
  return config, state


def test_released_size_needs_no_config():
  _, state = _random_state(12, 768)
  assert len(state) == 247
  assert sum(x.size for x in state.values()) == 86_330_880
  config, params = gigapath.convert(state)
  assert sum(x.size for x in jax.tree.leaves(params)) == 86_330_880
  assert (config.num_heads, config.head_dim) == (16, 48)
  assert config.segment_lengths == (1024, 5792, 32_768, 185_363, 1_048_576)
  assert config.dilation_rates == (1, 2, 4, 8, 16)
  assert torchscale.misplaced(config, 185_363) is None
  assert "longer than 185,363" in torchscale.misplaced(config, 185_364)
  assert (config.tile_dim, config.grid_size, config.tile_size) == (
    1536,
    1000,
    256,
  )


@pytest.mark.parametrize("depth, width", gigapath.RELEASED)
def test_architectures_are_recognized(depth, width):
  _, state = _random_state(depth, width)
  config = gigapath.infer_config(state)
  assert (config.num_layers, config.model_dim) == (depth, width)
  assert (config.num_heads, config.ffn_dim) == (16, 4 * width)


def test_segment_lengths_follow_the_slide_size():
  _, state = _random_state(12, 768)
  config = gigapath.infer_config(state, {"max_wsi_size": 65_536})
  assert config.segment_lengths == (1024, 2896, 8192, 23_170, 65_536)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"head": 8}, "no key head; did you mean heads"),
    ({"depth": 3}, "depth is 3 in the config and 2 in the tensors"),
    ({"depth": "2"}, "depth is '2' in the config and 2 in the tensors"),
    (
      {"max_wsi_size": 100, "segment_lengths": None},
      "max_wsi_size at least tile_size; got 100",
    ),
    (
      {"max_wsi_size": 10**400, "segment_lengths": None},
      "got 10000.*00[.]{3}$",
    ),
    (
      {"tile_size": 0, "segment_lengths": None},
      "tile_size must be pixels, such as 256",
    ),
    ({"heads": 7}, "num_heads is 7; it must be a divisor of model_dim=64"),
    ({"dilation_rates": "[1, 2]"}, "dilation_rates has 2 entries"),
  ],
)
def test_refuses_by_name(read_golden, change, message):
  state, config, _ = read_golden("gigapath_small")
  with pytest.raises(ValueError, match=message):
    gigapath.convert(state, config | change)


def test_refuses_to_guess_heads(read_golden):
  state, _, _ = read_golden("gigapath_small")
  with pytest.raises(ValueError, match="2 layers of width 64 are no released"):
    gigapath.convert(state)
  with pytest.raises(ValueError, match="no tensor encoder.layers.0"):
    gigapath.convert({"w": np.zeros(2)})


def test_refuses_gaps_and_empty_tensors_by_name(read_golden):
  state, config, _ = read_golden("gigapath_small")
  layer = "encoder.layers"
  far = {f"{layer}.1000000000.ffn.fc1.bias": np.zeros(256)}
  with pytest.raises(ValueError, match=f"{layer}.1000000000 and no {layer}.2"):
    gigapath.convert(state | far, config)
  empty = {"patch_embed.proj.weight": np.zeros((0, 24), np.float32)}
  with pytest.raises(ValueError, match=r"proj.weight has shape \(0, 24\)"):
    gigapath.convert(state | empty, config)


def test_a_saved_position_table_is_not_needed(read_golden):
  state, config, _ = read_golden("gigapath_small")
  table = np.zeros((1, 2501, 64), np.float32)
  with_table = gigapath.convert(state | {"pos_embed": table}, config)
  wanted = gigapath.convert(state, config)
  assert with_table[0] == wanted[0]
  jax.tree.map(np.testing.assert_array_equal, with_table[1], wanted[1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "slide_encoder."])
def test_a_prefix_changes_nothing(small, read_golden, prefix):
  wanted, params, _ = small
  _, config, _ = read_golden("gigapath_small")
  state = {
    prefix + name: x for name, x in gigapath.export(wanted, params).items()
  }
  assert gigapath.infer_config(state, config) == wanted
  found = gigapath.convert(state, config)
  assert found[0] == wanted
  jax.tree.map(np.testing.assert_array_equal, found[1], params)


def test_slides_are_read_from_files(tmp_path):
  path = tmp_path / "slide.npz"
  tiles, coords = np.ones((2, 3), np.float32), np.array([[0, 0], [256, 0]])
  np.savez(path, tiles=tiles, coords=coords, more=np.ones(3))
  slide = gigapath.read_slide(path)
  np.testing.assert_array_equal(slide.tiles, tiles)
  np.testing.assert_array_equal(slide.coords, coords)
  np.savez(path, features=tiles)
  with pytest.raises(
    checked.RefusedError, match="slide.npz has no coords and no tiles"
  ):
    gigapath.read_slide(path)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(
    checked.RefusedError, match="slide.npz is no .npz file of plain"
  ):
    gigapath.read_slide(path)
