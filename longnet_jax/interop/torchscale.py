"""Weights of torchscale's LongNet decoders and encoders, both ways."""

from collections.abc import Mapping
import re
from typing import Any

import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.interop import keywords, tensors
from longnet_jax.interop.tensors import State, Tensor
from longnet_jax.models import config as model_config
from longnet_jax.models import transformer

_OUTPUT = "output_projection.weight"
_XPOS = re.compile(r"layers\.\d+\.self_attn\.xpos\.scale")


def convert(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[model_config.LongNetConfig, dict[str, Any]]:
  """Returns the config and parameters of a torchscale decoder or encoder.

  Args:
    state: torchscale's state dict as NumPy arrays; a prefix, such as "module."
      or "decoder.", may stand before the names.
    config: its keyword dictionary; decoder_* or encoder_* keys say which.

  An encoder with an output layer has its matrix in the parameters, although
  `LongNetEncoder` returns features: `transformer.unembed` turns these into
  logits with `transformer.output_matrix(params)`.

  Raises:
    ValueError: names the settings that this package does not compute, or the
      tensors that are missing, left over or of the wrong shape.
  """
  longnet = keywords.convert(config)
  decoder = keywords.is_decoder(config)
  state = tensors.unwrapped(state, "layers.0.self_attn.q_proj.weight")
  model = transformer.LongNetLM if decoder else transformer.LongNetEncoder
  inputs = jax.ShapeDtypeStruct((1, 1), np.int32)
  if not decoder and not longnet.vocab_size:  # embeddings are made elsewhere
    inputs = jax.ShapeDtypeStruct((1, 1, longnet.model_dim), np.float32)
  abstract = tensors.abstract_params(model(longnet), inputs)
  if not decoder and keywords.has_output(config) and not longnet.tie_embeddings:
    if _OUTPUT in state:
      shape = longnet.model_dim, longnet.vocab_size
      abstract["output"] = jax.ShapeDtypeStruct(shape, np.float32)
  table = model_tensors(longnet, output="output" in abstract)
  state = _without_copies(state, longnet)
  return longnet, tensors.convert(state, table, abstract)


def export(
  config: model_config.LongNetConfig, params: Mapping[str, Any]
) -> State:
  """Returns the state dict that torchscale loads for these parameters.

  Those of an encoder may have an output matrix as well, as `convert` gives it.
  """
  decoder = config.tie_embeddings or "output" in params
  keywords.check_exportable(config, decoder=decoder)
  state = tensors.export(params, model_tensors(config, "output" in params))
  if config.tie_embeddings:
    state[_OUTPUT] = state["embed_tokens.weight"].copy()
  if config.position == "xpos":
    for i in range(config.num_layers):
      state[f"layers.{i}.self_attn.xpos.scale"] = _xpos_scale(config)
  return state


def misplaced(
  config: model_config.LongNetConfig, length: int | None = None
) -> str | None:
  """Says where torchscale's outputs differ from ours; None where they do not.

  Where r does not divide a segment of w, torchscale fills every segment up to
  the next multiple of r and cuts the result at the end alone, so that what it
  computes for the rows of segment n comes n (-w mod r) rows too late. Here all
  rows stay where they are.

  Args:
    config: of the model.
    length: of the sequences; of any length if None.
  """
  if config.attention != "dilated":
    return None
  branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
  found = [
    (w, r) for w, r in branches if w % r and (length is None or length > w)
  ]
  if not found:
    return None
  w, r = min(found)
  return (
    f"torchscale misplaces rows of sequences longer than {w:,}, because the"
    f" dilation rate {r} does not divide that segment length; here they are in"
    " their place, so outputs differ from torchscale's there"
  )


def model_tensors(
  config: model_config.LongNetConfig, output: bool
) -> list[Tensor]:
  """The tensors of a decoder or encoder; `output` if it has a matrix for it."""
  table = block_tensors(config, prefix="")
  if config.vocab_size:
    table.append(Tensor("embed_tokens.weight", "embedding", "array"))
  if config.norm_position == "pre":
    table += layer_norm("layer_norm", "final_norm")
  if output:
    table.append(Tensor(_OUTPUT, "output", "matrix"))
  return table


def block_tensors(
  config: model_config.LongNetConfig, prefix: str
) -> list[Tensor]:
  """The tensors of all blocks; `prefix` stands before torchscale's names."""
  torch, ours = f"{prefix}layers.{{}}.", "layers/"
  attention, ffn = torch + "self_attn.", torch + "ffn."
  table = []
  for name in ("query", "key", "value"):
    table += linear(f"{attention}{name[0]}_proj", f"{ours}attention/{name}")
  table += linear(attention + "out_proj", ours + "attention/out", inputs=2)
  table += linear(ffn + "fc1", ours + "ffn/fc1")
  table += linear(ffn + "fc2", ours + "ffn/fc2")
  table += layer_norm(torch + "self_attn_layer_norm", ours + "attention_norm")
  table += layer_norm(torch + "final_layer_norm", ours + "ffn_norm")
  if config.sub_layernorm:
    table += layer_norm(attention + "inner_attn_ln", ours + "attention/norm")
    table += layer_norm(ffn + "ffn_layernorm", ours + "ffn/norm")
  return table


def linear(name: str, path: str, inputs: int = 1) -> list[Tensor]:
  """A linear map, whose kernel has `inputs` leading axes of inputs."""
  return [
    Tensor(f"{name}.weight", f"{path}/kernel", "matrix", inputs),
    Tensor(f"{name}.bias", f"{path}/bias"),
  ]


def layer_norm(name: str, path: str) -> list[Tensor]:
  """A LayerNorm."""
  return [
    Tensor(f"{name}.weight", f"{path}/scale"),
    Tensor(f"{name}.bias", f"{path}/bias"),
  ]


def _without_copies(state, config):
  """Leaves out what follows from the rest, after checking that it does."""
  kept = {name: x for name, x in state.items() if not _XPOS.fullmatch(name)}
  for name in state.keys() - kept.keys():
    if config.position != "xpos":
      raise checked.RefusedError(
        f"the state has {name}, but xpos_rel_pos is False"
      )
    scale, found = _xpos_scale(config), np.asarray(state[name])
    if found.shape != scale.shape or not np.allclose(found, scale, rtol=1e-5):
      raise checked.RefusedError(
        f"{name} is not the scale of xPos for this head width"
      )
  embedding = "embed_tokens.weight"
  if config.tie_embeddings and _OUTPUT in kept and embedding in kept:
    if not np.array_equal(kept[_OUTPUT], kept[embedding]):
      raise checked.RefusedError(
        f"{_OUTPUT} differs from {embedding}; for an untied model set"
        " share_decoder_input_output_embed, or that of the encoder, to False"
      )
    del kept[_OUTPUT]
  return kept


def _xpos_scale(config):
  """The base of xPos' decay per pair, which torchscale keeps as a buffer."""
  width = config.head_dim
  pairs = np.arange(0, width, 2, dtype=np.float32)
  return (pairs + 0.4 * width) / (1.4 * width)
