"""LongViT's weights: every tensor in its place, and back unchanged."""

import jax
import numpy as np
import pytest

from longnet_jax.interop import longvit
from longnet_jax.models import longvit as model_lib

_CONFIG = {
  "num_heads": 2,
  "segment_length": "[4, 16]",
  "dilated_ratio": "[1, 2]",
}


def _state(classes=0, prefix=""):
  rng = np.random.default_rng(0)
  width, hidden = 8, 16
  linears = {
    **{f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")},
    "ffn.fc1": (hidden, width),
    "ffn.fc2": (width, hidden),
    "self_attn.inner_attn_ln": (width,),
    "self_attn_layer_norm": (width,),
    "ffn.ffn_layernorm": (hidden,),
    "final_layer_norm": (width,),
  }
  shapes = {
    f"encoder.layers.{i}.{k}": v for i in range(2) for k, v in linears.items()
  }
  shapes["patch_embed.proj"] = (width, 3, 4, 4)
  shapes = {prefix + name: shape for name, shape in shapes.items()}
  if classes:
    shapes |= {"fc_norm": (width,), "head": (classes, width)}
  arrays = {f"{prefix}pos_embed": (1, 16, width)}
  for name, shape in shapes.items():
    arrays[f"{name}.weight"] = shape
    arrays[f"{name}.bias"] = shape[:1]
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in arrays.items()
  }


@pytest.mark.parametrize("classes, prefix", [(0, ""), (3, "model.")])
def test_there_and_back_is_the_identity(classes, prefix):
  state = _state(classes, prefix)
  config, params = longvit.convert(state, _CONFIG)
  assert (config.image_size, config.patch_size) == (16, 4)
  assert (config.num_classes, config.encoder_norm) == (classes, False)
  again = longvit.export(config, params)
  assert again.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(again[name], array)


def test_a_prefix_of_all_names_is_taken_away_as_well():
  state = _state(3, "model.")
  wanted = longvit.convert(state, _CONFIG)
  wrapped = {f"module.{name}": x for name, x in state.items()}
  found = longvit.convert(wrapped, _CONFIG)
  assert found[0] == wanted[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])


def _layer_norm(x, weight, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def test_output_follows_from_torchs_tensors():
  # Queries and keys of zero make attention a mean; the feed-forward is off.
  state = _state()
  for name in state:
    if "q_proj" in name or "k_proj" in name or "fc2" in name:
      state[name] *= 0
  config, params = longvit.convert(
    state, _CONFIG | {"segment_length": "[16]", "dilated_ratio": "[1]"}
  )
  images = np.random.default_rng(1).normal(size=(1, 3, 16, 16))
  images = images.astype(np.float32)
  found = jax.jit(model_lib.LongViT(config).apply)({"params": params}, images)

  kernel = state["patch_embed.proj.weight"]
  x = np.stack(
    [
      np.einsum(
        "chw,dchw->d", images[0, :, 4 * i : 4 * i + 4, j : j + 4], kernel
      )
      for i in range(4)
      for j in range(0, 16, 4)
    ]
  )
  x += state["patch_embed.proj.bias"] + state["pos_embed"][0]
  for i in range(2):
    get = lambda name, i=i: state[f"encoder.layers.{i}.{name}"]
    pair = lambda name, get=get: (get(f"{name}.weight"), get(f"{name}.bias"))
    y = _layer_norm(x, *pair("self_attn_layer_norm"))
    weight, bias = pair("self_attn.v_proj")
    y = (y @ weight.T + bias).mean(0, keepdims=True)
    y = _layer_norm(y, *pair("self_attn.inner_attn_ln"))
    weight, bias = pair("self_attn.out_proj")
    x = x + y @ weight.T + bias
  np.testing.assert_allclose(found[0], x, atol=1e-4)


def test_released_settings_are_inferred():
  state = _state()
  shapes = {name: x.shape for name, x in state.items()}
  wide = {
    name: np.zeros([{8: 384, 16: 1536}.get(n, n) for n in shape], np.float32)
    for name, shape in shapes.items()
  }
  wide["patch_embed.proj.weight"] = np.zeros((384, 3, 32, 32), np.float32)
  wide["pos_embed"] = np.zeros((1, 128**2, 384), np.float32)
  for name in [name for name in wide if ".layers.1." in name]:
    for i in range(2, 12):
      wide[name.replace(".1.", f".{i}.")] = wide[name]
  config = longvit.infer_config(wide)
  assert (config.image_size, config.num_heads) == (4096, 16)
  assert config.segment_lengths == (1024, 2048, 4096, 8192, 16_384)


def test_refuses_by_name():
  with pytest.raises(ValueError, match="no key heads; did you mean num_heads"):
    longvit.convert(_state(), {"heads": 2})
  with pytest.raises(ValueError, match="img_size is 32 in the config and 16"):
    longvit.convert(_state(), _CONFIG | {"img_size": 32})
  with pytest.raises(ValueError, match="2 layers of width 8 are no released"):
    longvit.convert(_state())
  with pytest.raises(ValueError, match="a LongViT has one pos_embed"):
    longvit.convert({"w": np.zeros(2)})
  with pytest.raises(ValueError, match="1 not used: fc_norm.bias"):
    longvit.convert(_state() | {"fc_norm.bias": np.zeros(8)}, _CONFIG)
