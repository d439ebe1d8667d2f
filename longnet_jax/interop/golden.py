"""Goldens: a model's weights, inputs and outputs of another implementation.

An .npz file with the state under "param/NAME", the keyword dictionary as JSON
under "config", and inputs and outputs under the names in `compare`. The state
and the config may be left out where only outputs are compared.
"""

from collections.abc import Mapping
import functools
import os
from typing import Any

import jax
import numpy as np

from longnet_jax import checked, storage
from longnet_jax.interop import npz
from longnet_jax.interop.tensors import State
from longnet_jax.models import longvit, slide_encoder, transformer

_PREFIX = "param/"


def read(
  path: str | os.PathLike,
) -> tuple[State, dict[str, Any] | None, State]:
  """Returns the state, the keyword dictionary (or None) and all other arrays.

  Without "param/" names every array is of the state and of the others.
  """
  arrays = npz.read(path)
  config = None
  if "config" in arrays:
    try:
      config = dict(storage.parse_json(str(arrays.pop("config"))))
    except (TypeError, ValueError) as error:
      raise checked.RefusedError(
        f"config in {path} must be a dictionary as JSON: {error}"
      ) from error
  prefixed = {k: v for k, v in arrays.items() if k.startswith(_PREFIX)}
  state = {k.removeprefix(_PREFIX): v for k, v in prefixed.items()} or arrays
  others = {k: v for k, v in arrays.items() if k not in prefixed}
  return state, config, others


def compare(
  config, params: Mapping[str, Any], golden: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Returns each output's largest error relative to its largest entry.

  Inputs are tokens for decoders ("logits") and encoders ("encoder_out"), tiles
  and coords for slide encoders ("cls", "pooled", "all_layers_cls"), images for
  LongViT ("features", "logits").

  Raises:
    ValueError: an input is missing or of a type that none has, there is no
      output to compare, or an output says nothing.
  """
  functions, inputs = _functions(config)
  missing = [name for name in inputs if name not in golden]
  if missing:
    raise checked.RefusedError(
      f"the goldens have no {' and no '.join(missing)}"
    )
  outputs = [name for name in functions if name in golden]
  if not outputs:
    raise checked.RefusedError(
      f"the goldens have none of {', '.join(functions)}"
    )
  arguments = [_narrow(golden[name]) for name in inputs]
  errors = {}
  for name in outputs:
    found = jax.jit(functions[name])({"params": params}, *arguments)
    expected = golden[name]
    if found.shape != expected.shape:
      raise checked.RefusedError(
        f"{name} has shape {expected.shape} in the goldens, {found.shape} here"
      )
    difference = np.abs(np.asarray(found, np.float32) - expected).max()
    largest = np.abs(expected).max()
    if not 0 < largest < np.inf:
      raise checked.RefusedError(
        f"{name} in the goldens has nothing but zeros, or NaN"
      )
    errors[name] = float(difference / largest)
  return errors


def _functions(config):
  """Returns output name -> function, and the names of the inputs."""
  if isinstance(config, slide_encoder.SlideEncoderConfig):
    apply = slide_encoder.SlideEncoder(config).apply
    layers = functools.partial(apply, return_layers=True)
    return {
      "cls": apply,
      "pooled": functools.partial(apply, pool="mean"),
      "all_layers_cls": lambda *inputs: layers(*inputs)[1],
    }, ("tiles", "coords")
  if isinstance(config, longvit.LongViTConfig):
    apply = longvit.LongViT(config).apply
    functions = {"features": functools.partial(apply, method="features")}
    if config.num_classes:
      functions["logits"] = apply
    return functions, ("images",)
  return {
    "logits": transformer.LongNetLM(config).apply,
    "encoder_out": functools.partial(_encoder_out, config),
  }, ("tokens",)


def _encoder_out(config, variables, tokens):
  """Features, or logits if there is an output layer, as torchscale has it."""
  features = transformer.LongNetEncoder(config).apply(variables, tokens)
  params = variables["params"]
  if "output" not in params and not config.tie_embeddings:
    return features
  return transformer.unembed(features, transformer.output_matrix(params))


def _narrow(array):
  """JAX has no 64-bit numbers unless asked to."""
  kinds = {"i": np.int32, "u": np.int32, "f": np.float32}
  if array.dtype.kind not in kinds:
    raise checked.RefusedError(
      f"the goldens have an input of type {array.dtype}"
    )
  return array.astype(kinds[array.dtype.kind])
