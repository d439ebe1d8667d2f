"""Weights of other implementations, both ways.

  state = interop.read_pth(path)          or read_safetensors, read_sharded
  config, params = interop.gigapath.convert(state)
  config, params = interop.longvit.convert(state)
  config, params = interop.torchscale.convert(state, keywords)
  state = interop.torchscale.export(config, params)

A state is a dictionary of NumPy arrays by torch's names. Every tensor is used
and every parameter found, or the error lists what is not.
"""

from longnet_jax.interop import gigapath, longvit, torchscale
from longnet_jax.interop.weights import (
  read_pth,
  read_safetensors,
  read_sharded,
)

__all__ = [
  "gigapath",
  "longvit",
  "read_pth",
  "read_safetensors",
  "read_sharded",
  "torchscale",
]
