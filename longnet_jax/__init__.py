"""LongNet in JAX: dilated attention for sequences of up to a billion tokens.

The package is a stack; each layer imports only from those above it:

  checked     configs checked by their annotations, the error that refuses
  storage     local folders and buckets alike
  pattern     which rows a head keeps of a branch, and how many: NumPy alone
  ops         mathematics of attention, positions and dilation
  parallel    meshes, sharding rules, sequence parallelism
  models      the LongNet decoder and encoders
  inference   caches, prefill, decoding and sampling
  data        real code as tokens, in batches that depend on the step alone
  analysis    FLOPs, reach and pictures of an attention pattern
  training    loss, optimizer, step, checkpoints, metrics
  interop     weights of torchscale and Prov-GigaPath
  scores      what a trained model has learned: table, picture, JSON
  evaluate    and how that is measured
  plan        what a training step takes of a pod, compiled without one
  estimate    the same by arithmetic

Shapes are written with one letter an axis: B batch, T positions, N query heads,
K key/value heads, H head width, D model width, F feed-forward width, V
vocabulary. Source: Ding et al., arXiv 2307.02486.
"""

import importlib

from longnet_jax.version import __version__ as __version__

_PUBLIC = {
  "LongNetConfig": "models.config",
  "LongNetEncoder": "models.transformer",
  "LongNetLM": "models.transformer",
  "SlideEncoder": "models.slide_encoder",
  "attention_fn": "ops.drop_in",
  "decode_step": "inference.decode",
  "dilated_attention": "ops.dilated_attention",
  "generate": "inference.sample",
  "load_checkpoint": "training.checkpoint",
  "load_tokenizer": "training.workdir",
  "prefill": "inference.prefill",
  "sequence_parallel_attention": "parallel.sequence",
}
_SUBPACKAGES = ("analysis", "interop")

__all__ = [*_PUBLIC, *_SUBPACKAGES]


def __getattr__(name):
  """Imports a public name on first use: `import longnet_jax` stays light."""
  if name in _PUBLIC:
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return getattr(module, name)
  if name in _SUBPACKAGES:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *__all__])
