"""Weights of LongViT, both ways.

Source: https://github.com/microsoft/torchscale/tree/main/examples/longvit.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.interop import keywords, tensors, torchscale
from longnet_jax.interop.tensors import State, Tensor
from longnet_jax.models import longvit

# Segment lengths that upstream sets by the edge of the image.
_SEGMENT_LENGTHS = {
  4096: (1024, 2048, 4096, 8192, 16_384),
  8192: (1024, 4096, 8192, 16_384, 65_536),
  16_384: (1024, 4096, 16_384, 65_536, 262_144),
  32_768: (1024, 4096, 32_768, 262_144, 1_048_576),
}
_DEFAULT_SEGMENT_LENGTHS = (64, 128, 256, 512, 1024)
_DILATION_RATES = (1, 2, 4, 8, 16)
_RELEASED = (12, 384)
_RELEASED_HEADS = 16

# What a config may say, by upstream's names, and what it says if not given.
_DEFAULTS = {
  "num_heads": _RELEASED_HEADS,
  "segment_length": None,  # follows from the edge of the image
  "dilated_ratio": _DILATION_RATES,
  "drop_path_rate": 0.0,
}
_HEAD = ("fc_norm.", "head.")


def convert(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[longvit.LongViTConfig, dict[str, Any]]:
  """Returns the config and parameters of a LongViT, its head included.

  Args:
    state: upstream's state dict as NumPy arrays; one prefix, such as "model.",
      may stand before the names of the encoder.
    config: what differs from the released models, by upstream's names:
      num_heads, segment_length, dilated_ratio, drop_path_rate. Sizes that the
      tensors tell are compared with them.

  Raises:
    ValueError: names an unknown key, a size that the tensors contradict, or the
      tensors that are missing, left over or of the wrong shape.
  """
  state = _without_prefix(state)
  image_config = infer_config(state, config)
  edge = image_config.image_size
  abstract = tensors.abstract_params(
    longvit.LongViT(image_config),
    jax.ShapeDtypeStruct((1, image_config.channels, edge, edge), np.float32),
  )
  table = model_tensors(image_config)
  return image_config, tensors.convert(state, table, abstract)


def export(config: longvit.LongViTConfig, params: Mapping[str, Any]) -> State:
  """Returns the state dict that upstream loads for these parameters."""
  keywords.check_exportable(config, decoder=False)
  state = tensors.export(params, model_tensors(config))
  if not config.num_classes:
    return state
  return {
    name if name.startswith(_HEAD) else f"model.{name}": x
    for name, x in state.items()
  }


def infer_config(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> longvit.LongViTConfig:
  """Returns the config that tensors and `config` (see `convert`) describe."""
  config = dict(config or {})
  depth = tensors.count_layers(state, "encoder.layers.")
  width, channels, patch, _ = tensors.shape_of(
    state, "patch_embed.proj.weight", 4
  )
  hidden, _ = tensors.shape_of(state, "encoder.layers.0.ffn.fc1.weight", 2)
  edge = math.isqrt(tensors.shape_of(state, "pos_embed", 3)[1]) * patch
  classes = len(state["head.weight"]) if "head.weight" in state else 0
  found = {
    "depth": depth,
    "embed_dim": width,
    "img_size": edge,
    "in_chans": channels,
    "patch_size": patch,
    "num_classes": classes,
  }
  checked.check_keys(config, [*found, *_DEFAULTS])
  keywords.check_sizes(config, found)
  if "num_heads" not in config and (depth, width) != _RELEASED:
    raise checked.RefusedError(
      f"{depth} layers of width {width} are no released LongViT, and tensors"
      " do not tell the number of heads; give config={'num_heads': ...}"
    )
  settings = {**_DEFAULTS, **config}
  lengths = settings["segment_length"] or _SEGMENT_LENGTHS.get(
    edge, _DEFAULT_SEGMENT_LENGTHS
  )
  parse = keywords.parse_ints
  return longvit.LongViTConfig(
    num_layers=depth,
    model_dim=width,
    num_heads=settings["num_heads"],
    ffn_dim=hidden,
    segment_lengths=parse("segment_length", lengths),
    dilation_rates=parse("dilated_ratio", settings["dilated_ratio"]),
    head_phase="blocked",
    padding="zeros",
    drop_path_rate=settings["drop_path_rate"],
    dtype="float32",
    image_size=edge,
    patch_size=patch,
    channels=channels,
    encoder_norm="encoder.layer_norm.weight" in state,
    num_classes=classes,
  )


def model_tensors(config: longvit.LongViTConfig) -> list[Tensor]:
  """The tensors of a LongViT."""
  table = [
    Tensor("patch_embed.proj.weight", "patch_embedding/kernel", "convolution"),
    Tensor("patch_embed.proj.bias", "patch_embedding/bias"),
    Tensor("pos_embed", "positions", "array", ones=1),
    *torchscale.block_tensors(config, prefix="encoder."),
  ]
  if config.encoder_norm:
    table += torchscale.layer_norm("encoder.layer_norm", "final_norm")
  if config.num_classes:
    table += torchscale.layer_norm("fc_norm", "pool_norm")
    table += torchscale.linear("head", "head")
  return table


def _without_prefix(state):
  """Takes away what stands before pos_embed from all names that have it."""
  state = tensors.unwrapped(state, "")
  found = [name for name in state if name.endswith("pos_embed")]
  if len(found) != 1:
    raise checked.RefusedError(
      f"a LongViT has one pos_embed, the state has {found or 'none'}"
    )
  prefix = found[0].removesuffix("pos_embed")
  return {name.removeprefix(prefix): x for name, x in state.items()}
