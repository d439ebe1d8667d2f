"""Weights of Prov-GigaPath's slide encoder, both ways.

Source: https://github.com/prov-gigapath/prov-gigapath.
"""

from collections.abc import Mapping
import math
import os
from typing import Any

import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.interop import keywords, npz, tensors, torchscale
from longnet_jax.interop.tensors import State, Tensor
from longnet_jax.models import slide_encoder, slides

# (layers, width) of the released architectures; all have 16 heads, which the
# tensors do not tell.
RELEASED = ((12, 768), (24, 1024), (12, 1536))
_RELEASED_HEADS = 16
_DILATION_RATES = (1, 2, 4, 8, 16)
_ANCHOR = "encoder.layers.0.self_attn.q_proj.weight"

# What a config may say, by upstream's names, and what it says if not given.
_DEFAULTS = {
  "heads": _RELEASED_HEADS,
  "slide_ngrids": 1000,
  "tile_size": 256,
  "max_wsi_size": 262_144,
  "segment_lengths": None,  # follow from max_wsi_size and tile_size
  "dilation_rates": _DILATION_RATES,
  "dropout": 0.0,
  "drop_path_rate": 0.0,
}


def convert(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[slide_encoder.SlideEncoderConfig, dict[str, Any]]:
  """Returns the config and parameters of a slide encoder.

  Args:
    state: upstream's state dict as NumPy arrays; a prefix, such as "module." or
      "slide_encoder.", may stand before the names.
    config: what differs from the released models, by upstream's names: heads,
      segment_lengths, dilation_rates, slide_ngrids, tile_size, max_wsi_size,
      dropout, drop_path_rate. Sizes that the tensors tell (depth, embed_dim,
      in_chans, mlp_ratio) are compared with them.

  Raises:
    ValueError: names an unknown key, a size that the tensors contradict, or the
      tensors that are missing, left over or of the wrong shape.
  """
  state = tensors.unwrapped(state, _ANCHOR)
  slide_config = infer_config(state, config)
  width = slide_config.tile_dim
  abstract = tensors.abstract_params(
    slide_encoder.SlideEncoder(slide_config),
    jax.ShapeDtypeStruct((1, 1, width), np.float32),
    jax.ShapeDtypeStruct((1, 1, 2), np.float32),
  )
  table = model_tensors(slide_config)
  # Not in released files; where it was saved it is upstream's fixed table.
  state = {name: x for name, x in state.items() if name != "pos_embed"}
  return slide_config, tensors.convert(state, table, abstract)


def export(
  config: slide_encoder.SlideEncoderConfig, params: Mapping[str, Any]
) -> State:
  """Returns the state dict that upstream loads for these parameters."""
  keywords.check_exportable(config, decoder=False)
  return tensors.export(params, model_tensors(config))


def read_slide(path: str | os.PathLike) -> slides.Slide:
  """Returns the slide in an .npz file of tiles (T, C) and coords (T, 2).

  Raises:
    ValueError: one line; the file is none, is damaged or lacks one of them.
      Whether they make a slide is for `slides.check_slide` to say.
  """
  arrays = npz.read(path)
  missing = sorted({"tiles", "coords"} - arrays.keys())
  if missing:
    raise checked.RefusedError(f"{path} has no {' and no '.join(missing)}")
  return slides.Slide(arrays["tiles"], arrays["coords"])


def infer_config(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> slide_encoder.SlideEncoderConfig:
  """Returns the config that tensors and `config` (see `convert`) describe."""
  config = dict(config or {})
  state = tensors.unwrapped(state, _ANCHOR)
  depth = tensors.count_layers(state, "encoder.layers.")
  width, channels = tensors.shape_of(state, "patch_embed.proj.weight", 2)
  hidden, _ = tensors.shape_of(state, "encoder.layers.0.ffn.fc1.weight", 2)
  found = {
    "depth": depth,
    "embed_dim": width,
    "in_chans": channels,
    "mlp_ratio": hidden / width,
  }
  checked.check_keys(config, [*found, *_DEFAULTS])
  keywords.check_sizes(config, found)
  if "heads" not in config and (depth, width) not in RELEASED:
    raise checked.RefusedError(
      f"{depth} layers of width {width} are no released slide encoder, and"
      " tensors do not tell the number of heads; give config={'heads': ...}"
    )
  settings = {**_DEFAULTS, **config}
  lengths = settings["segment_lengths"] or released_segment_lengths(
    settings["max_wsi_size"], settings["tile_size"]
  )
  parse = keywords.parse_ints
  return slide_encoder.SlideEncoderConfig(
    num_layers=depth,
    model_dim=width,
    num_heads=settings["heads"],
    ffn_dim=hidden,
    segment_lengths=parse("segment_lengths", lengths),
    dilation_rates=parse("dilation_rates", settings["dilation_rates"]),
    head_phase="blocked",
    padding="zeros",
    dropout_rate=settings["dropout"],
    drop_path_rate=settings["drop_path_rate"],
    dtype="float32",
    tile_dim=channels,
    tile_size=settings["tile_size"],
    grid_size=settings["slide_ngrids"],
  )


def released_segment_lengths(
  max_wsi_size: int, tile_size: int
) -> tuple[int, ...]:
  """Five lengths from 1024 to the tiles of the largest slide.

  Their logarithms are evenly spaced, as upstream chooses them: 1024, 5792,
  32768, 185363 and 1048576 for slides of 262,144 pixels.
  """
  sizes = {"tile_size": tile_size, "max_wsi_size": max_wsi_size}
  for name, size in sizes.items():
    if type(size) is not int or not max(tile_size, 1) <= size < 2**31:
      raise checked.RefusedError(
        f"{name} must be pixels, such as {_DEFAULTS[name]}, below 2^31, and"
        f" max_wsi_size at least tile_size; got {checked.shown(size)}"
      )
  longest = int(math.log2((max_wsi_size // tile_size) ** 2))
  exponents = np.linspace(10, longest, len(_DILATION_RATES))
  return tuple(int(length) for length in 2**exponents)


def model_tensors(config: slide_encoder.SlideEncoderConfig) -> list[Tensor]:
  """The tensors of a slide encoder."""
  return [
    Tensor("cls_token", "cls_token", "array", ones=2),
    *torchscale.linear("patch_embed.proj", "tile_embedding"),
    *torchscale.block_tensors(config, prefix="encoder."),
    *torchscale.layer_norm("encoder.layer_norm", "encoder_norm"),
    *torchscale.layer_norm("norm", "final_norm"),
  ]
