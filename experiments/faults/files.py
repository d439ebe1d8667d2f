"""Every kind of file that is read, changed at random."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import random
import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from experiments.faults import damage, sandbox, trial
from longnet_jax import interop
from longnet_jax.data import corpus, documents, tokenizers
from longnet_jax.interop import gigapath, golden
from longnet_jax.training import attempts, metrics
from longnet_jax.training import config as config_lib
from longnet_jax.training import workdir as workdir_lib

_GOLDENS = pathlib.Path(__file__).parents[2] / "tests" / "golden"


class Kind(NamedTuple):
  """A kind of file: how one is made, and read; is_right(found, whole)."""

  make: Callable[[sandbox.Sandbox, pathlib.Path], None]
  read: Callable[[pathlib.Path], Any]
  is_right: Callable[[Any, Any], bool]


def _same(found, whole):
  """Whether trees of arrays are equal, names and types included."""
  same = lambda a, b: (
    np.asarray(a).dtype == np.asarray(b).dtype
    and np.shape(a) == np.shape(b)
    and np.asarray(a).tobytes() == np.asarray(b).tobytes()
  )
  if jax.tree.structure(found) != jax.tree.structure(whole):
    return False
  return all(jax.tree.leaves(jax.tree.map(same, found, whole)))


def _golden(name):
  return lambda box, path: shutil.copy(_GOLDENS / name, path)


def _make_slide(box, path):
  del box
  rng = np.random.default_rng(0)
  coords = 256 * np.stack([np.arange(20), np.arange(20)], 1)
  tiles = rng.normal(size=(20, 8)).astype(np.float32)
  np.savez_compressed(path, tiles=tiles, coords=coords)


def _make_safetensors(box, path):
  del box
  rng = np.random.default_rng(0)
  arrays = {
    "embed.weight": rng.normal(size=(7, 5)).astype(np.float32),
    "norm.bias": np.zeros(5, np.float16),
  }
  safetensors_numpy.save_file(arrays, path)


def _make_index(box, path):
  _make_safetensors(box, path.with_name(_SAFETENSORS))
  names = ("embed.weight", "norm.bias")
  index = {"weight_map": dict.fromkeys(names, _SAFETENSORS)}
  path.write_text(json.dumps(index))


def _from_run(box, path):
  _ = box.undisturbed
  shutil.copy(box.folder / "undisturbed" / path.name, path)


def _read_config(path):
  """What a start in the workdir and a reader of it make of config.json."""
  settings = dataclasses.asdict(workdir_lib.read_config(path.parent))
  whole = json.loads((path.parent / "whole").read_text())
  workdir_lib.check(path.parent, whole)
  return settings


def _read_attempts(path):
  return attempts.Attempts(path.parent, time.monotonic()).values()


def _is_numbers(found, _):
  return all(isinstance(value, (int, float)) for value in found.values())


def _is_config(found, _):
  return config_lib.build(found) is not None


def _is_arrays(found, whole):
  """These files have no checksum: only their form can be right."""
  del whole
  return all(isinstance(array, np.ndarray) for array in found.values())


def _is_metrics(found, whole):
  """Text has no checksum either: what is left are records of steps."""
  del whole
  return all(type(record["step"]) is int for record in found)


def _is_tokenizer(found, whole):
  """Another tokenizer has another fingerprint, and a run refuses it."""
  if found.fingerprint != whole.fingerprint:
    return True
  text = bytes(range(256))
  return found.decode(found.encode(text)) == text


_SAFETENSORS = "model.safetensors"
# By the name of the file.
KINDS = {
  "model.pth": Kind(_golden("gigapath_small.pth"), interop.read_pth, _same),
  "golden.npz": Kind(_golden("torchscale_decoder_0.npz"), golden.read, _same),
  "slide.npz": Kind(_make_slide, gigapath.read_slide, _same),
  _SAFETENSORS: Kind(_make_safetensors, interop.read_safetensors, _is_arrays),
  f"{_SAFETENSORS}.index.json": Kind(_make_index, interop.read_sharded, _same),
  "metrics.jsonl": Kind(
    _from_run, lambda path: metrics.read_metrics(path.parent), _is_metrics
  ),
  "attempts.json": Kind(_from_run, _read_attempts, _is_numbers),
  "config.json": Kind(_from_run, _read_config, _is_config),
  "tokenizer.json": Kind(_from_run, tokenizers.load, _is_tokenizer),
}


def run(box: sandbox.Sandbox, seed: int, *, name: str) -> list[trial.Trial]:
  """Reads a file of one kind with random changes."""
  kind = KINDS[name]
  path, content, whole = _whole(box, name)
  path.write_bytes(damage.mutated(content, random.Random(seed)))
  result = trial.attempt(
    f"file: {name}",
    lambda: kind.read(path),
    lambda found: kind.is_right(found, whole),
  )
  return [result]


@functools.cache
def _whole(box, name):
  """Where a kind's file lies, its bytes, and what they read as."""
  kind = KINDS[name]
  path = box.fresh("files") / name
  kind.make(box, path)
  content = path.read_bytes()
  (path.parent / "whole").write_bytes(content)
  return path, content, kind.read(path)


def run_data(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """Damages a file of the stored tokens, or of the dataset below them."""
  rng = random.Random(seed)
  config, whole = _tokens(box)
  root = pathlib.Path(config.cache_dir)
  copy = box.folder / "data-copy"
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(root, copy)
  files = [p for p in copy.rglob("*") if p.is_file() and p.stat().st_size]
  path = rng.choice(sorted(files))
  if rng.random() < 0.2:
    path.unlink()
  else:
    path.write_bytes(damage.mutated(path.read_bytes(), rng))
  of_tokens = "longnet_tokens" in str(path)
  there = dataclasses.replace(config, cache_dir=str(copy), data_dir=str(copy))

  def read():
    with contextlib.redirect_stderr(io.StringIO()):
      if not of_tokens:  # which would hide what is below them
        return list(documents.Documents(there).read("train"))
      tokenizer = corpus.bpe_tokenizer(there)
      return bytes(corpus.open_corpus(there, tokenizer, "train").tokens)

  row = f"file: {'tokens' if of_tokens else 'array_record and its records'}"
  return [trial.attempt(row, read, lambda found: found == whole[of_tokens])]


@functools.cache
def _tokens(box):
  """The settings of data, and its documents and tokens undamaged."""
  _ = box.undisturbed
  path = box.folder / "undisturbed"
  config = workdir_lib.read_config(path).data
  tokenizer = corpus.bpe_tokenizer(config)
  tokens = bytes(corpus.open_corpus(config, tokenizer, "train").tokens)
  return config, (list(documents.Documents(config).read("train")), tokens)


def run_text(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A corpus of changed text: its bytes, exactly, or a refusal."""
  rng = random.Random(seed)
  folder = box.fresh("text")
  source = sorted((box.folder / "text").glob("*.py"))[:6]
  texts = [damage.mutated(path.read_bytes(), rng) for path in source]
  for path, text in zip(source, texts, strict=True):
    (folder / path.name).write_bytes(text)
  cache = str(folder / "cache")
  config = dataclasses.replace(
    _tokens(box)[0],
    folder=str(folder),
    data_dir=cache,
    cache_dir=cache,
    tokenizer="bytes",
  )
  tokenizer = tokenizers.ByteTokenizer()

  def read():
    found = []
    for split in ("train", "validation", "test"):
      tokens = np.asarray(corpus.open_corpus(config, tokenizer, split).tokens)
      ends = np.flatnonzero(tokens == tokenizer.separator_id)
      parts = np.split(tokens, ends)[1:-1]
      found += [tokenizer.decode(part[1:]) for part in parts]
    return sorted(found)

  whole = sorted(text for text in texts if text)
  try:
    return [
      trial.attempt("file: text of the corpus", read, lambda x: x == whole)
    ]
  finally:
    shutil.rmtree(folder)


def run_compiled(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """Damages all programs that are kept, or one, and starts a run."""
  rng = random.Random(seed)
  fingerprint = box.undisturbed[0]
  folder = box.fresh("programs")
  shutil.copytree(box.compiled, folder / "kept")
  kept = sorted(p for p in (folder / "kept").iterdir() if p.is_file())
  for path in kept if seed % 2 else [rng.choice(kept)]:
    path.write_bytes(damage.mutated(path.read_bytes(), rng))
  process = box.start(folder / "run", compiled=str(folder / "kept"))
  code, out, err = process.finish()
  row = "file: compiled program"
  if code is None:
    return [trial.Trial(row, trial.HANG, err[-300:])]
  if code:
    return [trial.of_process(row, code, err, ())]
  is_right = out.split()[-1] == fingerprint
  return [trial.Trial(row, trial.UNDISTURBED if is_right else trial.WRONG)]


JOBS = {
  **{name: (2000, functools.partial(run, name=name)) for name in KINDS},
  "data": (2000, run_data),
  "text": (2000, run_text),
  "compiled": (20, run_compiled),
}
