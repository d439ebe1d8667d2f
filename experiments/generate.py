"""Continues a text: python -m experiments.generate --workdir=DIR --prompt=...

The continuation and a line break go to stdout, byte by byte the model's; how
long it took goes to stderr. It ends at --max_new_tokens, where the model ends
the document, or at the last position that the model can number.
"""

import os
import sys
import time

from absl import flags
import numpy as np

from experiments import command
from longnet_jax import checked, storage
from longnet_jax.inference import sample
from longnet_jax.training import checkpoint
from longnet_jax.training import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_PROMPT = flags.DEFINE_string("prompt", None, "text to continue")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "file to continue")
_STREAM = flags.DEFINE_bool(
  "stream", False, "write each token when it is there"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "most to add")
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "divides the logits; 0 takes the likeliest token"
)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k likeliest only")
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "draw among the likeliest that have this probability together"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_CHUNK = flags.DEFINE_integer("chunk", 512, "prompt tokens computed at once")
_MAKE_MESH = command.define_mesh("seq", "model")
_WHICH = command.define_checkpoint()


def main(_) -> None:
  """Writes the continuation of the prompt."""
  workdir = command.trained(_WORKDIR)
  text = _read_prompt()
  mesh = _MAKE_MESH()
  which = {"step": _WHICH()}
  settings = workdir_lib.read_config(workdir, **which)
  tokenizer = workdir_lib.load_tokenizer(workdir, **which)
  config, params = checkpoint.load_checkpoint(workdir, **which)
  # A document begins with the separator in training as well.
  prompt = np.concatenate([[tokenizer.separator_id], tokenizer.encode(text)])
  _warn(f"prompt: {len(prompt):,} tokens")
  if len(prompt) > settings.data.window:
    _warn(
      f"warning: the prompt is longer than the {settings.data.window:,} tokens"
      " that the model was trained on at a time"
    )
  new_tokens = _room(config, len(prompt), _MAX_NEW_TOKENS.value)
  write = _writer(tokenizer)
  start = time.perf_counter()
  (found,) = sample.generate(
    config,
    params,
    [prompt.astype(np.int32)],
    max_new_tokens=new_tokens,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    stop_tokens=(tokenizer.separator_id,),
    seed=_SEED.value,
    callback=(lambda _, token: write([token])) if _STREAM.value else None,
    chunk=_CHUNK.value,
    mesh=mesh if mesh.size > 1 else None,
  )
  seconds = time.perf_counter() - start
  if not _STREAM.value:
    write(found)
  write([], final=True)
  _warn(f"{len(found)} tokens in {seconds:.1f} s, prompt included")
  if new_tokens < _MAX_NEW_TOKENS.value and len(found) == new_tokens:
    _warn(
      f"stopped at the last of {config.position_limit:,} positions that"
      f" position={config.position!r} of this model can number"
    )


def _read_prompt() -> bytes:
  if (_PROMPT.value is None) == (_PROMPT_FILE.value is None):
    raise checked.RefusedError("give either --prompt or --prompt_file")
  if _PROMPT.value is not None:
    return os.fsencode(_PROMPT.value)  # as the shell gave it, UTF-8 or not
  return storage.read(storage.path(_PROMPT_FILE.value))


def _room(config, length: int, wanted: int) -> int:
  """Returns how many tokens may be added; the last one is not read."""
  if length > config.position_limit:
    raise checked.RefusedError(
      f"the prompt has {length:,} tokens and position={config.position!r} of"
      f" this model numbers {config.position_limit:,} positions; shorten it"
    )
  return min(wanted, config.position_limit - length + 1)


def _writer(tokenizer):
  """Returns what writes the bytes of tokens to stdout, UTF-8 or not."""
  stdout = sys.stdout.buffer

  def write(tokens, final=False):
    stdout.write(tokenizer.decode(tokens) + b"\n" * final)
    stdout.flush()

  return write


def _warn(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
  command.run(main)
